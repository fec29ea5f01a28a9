# SPDX-License-Identifier: Apache-2.0
"""A snapshot as JSON, for programs. Pure.

schema        1; grows when something is taken away or changes its meaning, and not when something is added
ok            nothing is missing, down, or failed without a newer start
ready         every role that the models need serves (`wait` proves it by a completion, too)
time          seconds since 1970, as all times here
run_dir       the deployment's folder, or null
workers       one object each: key, name, namespace, component, endpoint, model, role, engine, layout {tp_size, pp_size, cp_size, ep_size,
              attention_dp, ranks, text}, hosts, phase, phase_since, started, in_flight, progress {done, ranks, slowest_rank, slowest_host,
              seconds, read}, attempt, job, step, host, pid, launch, instance, system, trace, dynamo_mpi, trtllm. Null is what isn't known.
missing       workers that `launch` has started, and that have no record: name, role, nodes
failures      of the last hour: the fields of the record in etcd, name, and followed: whether a newer start is there
services      name, url, up, note; empty without a run folder
launcher      {host, pid, job, gone}, or null: of the deployment that runs
ended         {exit_code, report, time}, or null: of the last deployment in the folder
warnings      texts
error         {exit_code, found, needed, fix}: beside ok alone, where nothing could be read
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dynamo_mpi.operating.readiness import lacks_of

if TYPE_CHECKING:
    from dynamo_mpi.errors import BootstrapError
    from dynamo_mpi.operating.snapshot import Snapshot
    from dynamo_mpi.operating.views import Worker

SCHEMA = 1


def as_json(snapshot: Snapshot) -> dict[str, Any]:
    """Return a snapshot as plain data."""
    place, still = snapshot.place, snapshot.open_failures
    deployment, ended = place.deployment, place.ended
    return {
        "schema": SCHEMA,
        "ok": snapshot.is_well,
        "ready": not lacks_of(snapshot),
        "time": snapshot.time,
        "run_dir": None if place.run_dir is None else str(place.run_dir),
        "workers": [_worker(snapshot, worker) for worker in snapshot.workers],
        "missing": [{"name": w.name, "role": w.role, "nodes": list(w.nodes)} for w in snapshot.missing],
        "failures": [
            {**asdict(failure), "name": snapshot.name_of(failure), "followed": failure not in still}
            for failure in snapshot.failures
        ],
        "services": [{"name": s.name, "url": s.url, "up": s.is_up, "note": s.note} for s in snapshot.services],
        "launcher": None
        if deployment is None
        else {
            "host": deployment.host,
            "pid": deployment.pid,
            "job": deployment.job or None,
            "gone": place.is_orphaned,
        },
        "ended": None if ended is None else asdict(ended),
        "warnings": list(snapshot.warnings),
    }


def error_as_json(error: BootstrapError) -> dict[str, Any]:
    """Return why there is no snapshot."""
    return {"ok": False, "error": error.plain()}


def _worker(snapshot: Snapshot, worker: Worker) -> dict[str, Any]:
    content = asdict(worker)
    if worker.layout is not None:
        content["layout"]["text"] = str(worker.layout)
    return {**content, "name": snapshot.name_of(worker)}
