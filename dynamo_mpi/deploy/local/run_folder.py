# SPDX-License-Identifier: Apache-2.0
"""The folder of ``dynamo-mpi local`` as a run folder, by which `status`, `wait` and `down` find the stack. It is removed at the end."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from dynamo_mpi.common.process import host_name
from dynamo_mpi.deploy.head_node import services
from dynamo_mpi.deploy.run_files import DEPLOYMENT, STOP, TIMELINES, open_run_dir, write_object
from dynamo_mpi.deploy.step_commands import SERVICES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from dynamo_mpi.deploy.local.workers import WorkerSpec


class StopRequested(Exception):
    """`dynamo-mpi down` requests the end."""


class LocalRunFolder:
    """The run folder of one stack.

    Args:
        path: the stack's private folder.
        workers: its workers.
    """

    def __init__(self, path: Path, workers: Sequence[WorkerSpec]) -> None:
        self._path, self._workers = path, workers

    def launch_name(self, worker: WorkerSpec) -> str:
        """Return the name by which a worker's records are known as this stack's."""
        return f"{self._path.name}-{worker.name}"

    def timeline(self, worker: WorkerSpec) -> Path:
        """Return the file for a worker's timeline, where `dynamo-mpi timeline` finds it."""
        return self._path / TIMELINES / f"{worker.name}.html"

    def write_timeline(self, began: float, seconds: Mapping[str, float]) -> None:
        """Write the services' start, for `dynamo-mpi timeline`; arguments as in `write_services`."""
        from dynamo_mpi.deploy.timeline import write_services

        write_services(self._path / TIMELINES / "launch.json", began, seconds)

    def describe(self, model: str, url: str = "") -> None:
        """Write ``deployment.json``, as `launch` does.

        Args:
            model: the served name.
            url: the frontend's; empty if it isn't known yet.

        Raises:
            OSError: it can't be written.
        """
        workers = [
            {
                "name": spec.name,
                "role": spec.role,
                "nodes": [host_name()],
                "ranks": spec.tp_size,
                "step": spec.name,
                "launch": self.launch_name(spec),
                "departed": None,
            }
            for spec in self._workers
        ]
        launcher = {"schema": 1, "pid": os.getpid(), "host": os.uname().nodename, "job_id": ""}
        content = {**launcher, "url": url, "model": model, "workers": workers, "steps": []}
        with open_run_dir(self._path) as folder:
            write_object(folder, DEPLOYMENT, content)

    def publish(self, url: str, environment: Mapping[str, str]) -> None:
        """Write ``services.json``.

        Args:
            url: the frontend's.
            environment: the variables for clients of etcd and NATS.

        Raises:
            OSError: it can't be written.
        """
        with open_run_dir(self._path) as folder:
            write_object(folder, SERVICES, services(url, None, environment))

    def check(self) -> None:
        """Raise `StopRequested` if `down` requests the end."""
        with contextlib.suppress(OSError):
            if (self._path / STOP).exists():
                raise StopRequested
