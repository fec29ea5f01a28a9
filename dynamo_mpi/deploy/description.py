# SPDX-License-Identifier: Apache-2.0
"""What a running deployment says of itself in ``deployment.json``, for the operator's commands."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dynamo_mpi.deploy.step_commands import needs_kv_check
from dynamo_mpi.discovery.records import LAUNCH_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.deploy.failures import FailureHandler
    from dynamo_mpi.deploy.settings import LaunchSettings
    from dynamo_mpi.deploy.step_commands import CommandBuilder
    from dynamo_mpi.deploy.workers import WorkerSet

SCHEMA = 1


def describe_deployment(
    settings: LaunchSettings, builder: CommandBuilder, failures: FailureHandler, workers: WorkerSet, url: str
) -> Mapping[str, Any]:
    """Return the content of ``deployment.json``.

    Args:
        settings: the deployment's settings.
        builder: builds the commands of its steps.
        failures: where the workers are.
        workers: the workers' states.
        url: the frontend's; empty if it isn't known (yet).
    """
    return {
        "schema": SCHEMA,
        "pid": os.getpid(),
        "host": os.uname().nodename,
        "job_id": os.environ.get("SLURM_JOB_ID", ""),
        "url": url,
        "model": settings.served_model_name or settings.model,
        "workers": [
            {
                "name": worker.name,
                "role": worker.role,
                "nodes": worker.nodes,
                "ranks": worker.ranks,
                "step": command.step,
                "launch": command.environment.get(LAUNCH_VARIABLE),
                "departed": workers.departed.get(worker.name),
                "restarts": failures.restarts(worker.name),
                "given_up": workers.given_up.get(worker.name),
            }
            for worker in failures.workers
            for command in [builder.worker(worker)]
        ],
        "max_restarts": settings.max_restarts,
        **failures.describe(),
        "steps": _steps(settings, builder, failures),
    }


def _steps(settings: LaunchSettings, builder: CommandBuilder, failures: FailureHandler) -> list[str]:
    """Return the names of everything that the deployment may run."""
    workers = failures.workers
    commands = [] if builder.checks_in_services else [builder.check()]
    if needs_kv_check(settings, workers):
        commands.append(builder.kv_check(workers))
    commands += [builder.services(), *map(builder.worker, workers)]
    spares = [spare.node for spare in failures.spares.spares]
    nodes = [*(node for worker in workers for node in worker.nodes), *spares, *(one.node for one in failures.excluded)]
    for node in dict.fromkeys(nodes):
        probe = builder.probe(node)
        commands += [probe] if probe is not None else []
    for node in spares:
        commands += builder.prepare(node)
    return [command.step for command in commands]
