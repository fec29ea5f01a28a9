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
    from dynamo_mpi.deploy.nodes import Worker
    from dynamo_mpi.deploy.settings import LaunchSettings
    from dynamo_mpi.deploy.step_commands import Command, CommandBuilder
    from dynamo_mpi.deploy.workers import WorkerSet

SCHEMA = 1


class DeploymentDescription:
    """Describes one deployment. It is asked twice a second, so commands are built once for each place.

    Args:
        settings: the deployment's settings.
        builder: builds the commands of its steps.
        failures: where the workers are.
        workers: the workers' states.
    """

    def __init__(
        self, settings: LaunchSettings, builder: CommandBuilder, failures: FailureHandler, workers: WorkerSet
    ) -> None:
        self._settings, self._builder, self._failures, self._workers = settings, builder, failures, workers
        self._commands: dict[Worker, Command] = {}
        self._steps: dict[tuple[object, ...], list[str]] = {}

    def content(self, url: str) -> Mapping[str, Any]:
        """Return the content of ``deployment.json``, as it is now.

        Args:
            url: the frontend's; empty if it isn't known (yet).
        """
        settings, failures = self._settings, self._failures
        return {
            "schema": SCHEMA,
            "pid": os.getpid(),
            "host": os.uname().nodename,
            "job_id": os.environ.get("SLURM_JOB_ID", ""),
            "url": url,
            "model": settings.served_model_name or settings.model,
            "workers": [self._worker(worker) for worker in failures.workers],
            "max_restarts": settings.max_restarts,
            **failures.describe(),
            "steps": self._step_names(),
        }

    def _worker(self, worker: Worker) -> Mapping[str, Any]:
        command = self._command(worker)
        return {
            "name": worker.name,
            "role": worker.role,
            "nodes": worker.nodes,
            "ranks": worker.ranks,
            "step": command.step,
            "launch": command.environment.get(LAUNCH_VARIABLE),
            "departed": self._workers.departed.get(worker.name),
            "restarts": self._failures.restarts(worker.name),
            "given_up": self._workers.given_up.get(worker.name),
        }

    def _command(self, worker: Worker) -> Command:
        if worker not in self._commands:
            self._commands[worker] = self._builder.worker(worker)
        return self._commands[worker]

    def _step_names(self) -> list[str]:
        """Return the names of everything that the deployment may run, on nodes that it has or had."""
        workers = self._failures.workers
        nodes = tuple(one.node for one in self._failures.excluded)
        if (key := (*workers, *nodes)) in self._steps:
            return self._steps[key]
        builder, commands = self._builder, []
        if not builder.checks_in_services:
            commands.append(builder.check())
        if needs_kv_check(self._settings, workers):
            commands.append(builder.kv_check(workers))
        commands += [builder.services(), *map(self._command, workers)]
        spares = [spare.node for spare in self._failures.spares.spares]
        for node in dict.fromkeys((*(node for worker in workers for node in worker.nodes), *spares, *nodes)):
            probe = builder.probe(node)
            commands += [probe] if probe is not None else []
        for node in spares:
            commands += builder.prepare(node)
        self._steps = {key: [command.step for command in commands]}
        return self._steps[key]
