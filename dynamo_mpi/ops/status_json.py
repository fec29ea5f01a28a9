# SPDX-License-Identifier: Apache-2.0
"""The status of a deployment as JSON, for programs. Pure.

schema        1; increases if a key is removed or changes its meaning, not if one is added
ok            nothing is missing, down, or failed without a newer start
ready         every role that the models need serves (`wait` also requests a completion)
time          seconds since 1970, as all times here
run_dir       the deployment's folder, or null
workers       one object each: key, name, namespace, component, endpoint, model, role, engine, layout {tp_size, pp_size, cp_size, ep_size,
              attention_dp, ranks, text}, hosts, phase, phase_since, started, in_flight, progress {done, ranks, slowest_rank, slowest_host,
              seconds, read}, attempt, job, step, host, pid, launch, instance, system, trace, dynamo_mpi, trtllm. Unknown values are null.
missing       workers that `launch` has started but that have no record: name, role, nodes
failures      of the last hour: the fields of the record in etcd, name, and followed: whether a newer start exists
services      name, url, up, note; empty without a run folder
launcher      {host, pid, job, gone} of the running deployment, or null
ended         {exit_code, report, time} of the last deployment in the folder, or null
warnings      texts
error         {exit_code, found, needed, fix}: only with ok, if nothing could be read
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.record_codec import sanitize
from dynamo_mpi.ops.readiness import missing_items

if TYPE_CHECKING:
    from dynamo_mpi.common.errors import DynamoMpiError
    from dynamo_mpi.discovery.failure_records import StoredFailure
    from dynamo_mpi.discovery.records import StoredRecord
    from dynamo_mpi.ops.status import DeploymentStatus

SCHEMA = 1
# for partners, not for operators
_HIDDEN = ("contract", "probe")


def as_json(status: DeploymentStatus) -> dict[str, Any]:
    """Return the status as plain data."""
    deployment, still = status.deployment, status.open_failures
    launch, end = deployment.launch, deployment.end
    return {
        "schema": SCHEMA,
        "ok": status.is_well,
        "ready": not missing_items(status),
        "time": status.time,
        "run_dir": None if deployment.run_dir is None else str(deployment.run_dir),
        "workers": [_worker(status, worker) for worker in status.workers],
        "missing": [{"name": w.name, "role": w.role, "nodes": list(w.nodes)} for w in status.missing],
        "failures": [_failure(status, failure, failure not in still) for failure in status.failures],
        "services": [{"name": s.name, "url": s.url, "up": s.is_up, "note": s.note} for s in status.services],
        "launcher": None
        if launch is None
        else {
            "host": launch.host,
            "pid": launch.pid,
            "job": launch.job_id or None,
            "gone": deployment.launcher_is_dead,
        },
        "ended": None if end is None else asdict(end),
        "warnings": list(status.warnings),
    }


def error_as_json(error: DynamoMpiError) -> dict[str, Any]:
    """Return the JSON of an error."""
    return {"ok": False, "error": error.plain()}


def _worker(status: DeploymentStatus, worker: StoredRecord) -> dict[str, Any]:
    record, content = worker.record, asdict(worker.record)
    for name in _HIDDEN:
        content.pop(name, None)
    # values that are missing in the record
    for name in ("started", "engine", "endpoint", "dynamo_mpi"):
        content[name] = content[name] or None
    del content["layout"]["gpus_per_node"]
    layout = {**content["layout"], "text": str(record.layout)} if record.layout.is_known else None
    return {"key": sanitize(worker.key), **content, "layout": layout, "name": status.name_of(worker)}


def _failure(status: DeploymentStatus, failure: StoredFailure, followed: bool) -> dict[str, Any]:
    content = asdict(failure.record)
    del content["endpoint"]
    content |= {"key": sanitize(failure.key), "name": status.name_of(failure), "followed": followed}
    return {**content, "rank": failure.record.rank if failure.record.rank >= 0 else None}
