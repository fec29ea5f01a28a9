# SPDX-License-Identifier: Apache-2.0
"""Starts the readiness probe and passes its results to rank 0."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import IO, TYPE_CHECKING, Any, cast

from dynamo_mpi.common.subprocess import ManagedProcess, Streams
from dynamo_mpi.engines.trtllm.process import describe_end

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.config.worker import Settings


class ReadinessProbe:
    """A running readiness probe.

    Args:
        settings: the worker's settings.
        pid: process id of ``dynamo.trtllm``.
        token_id: the prompt, one token.
        environment: the child's environment, from which the probe finds etcd.
        on_message: called from a thread with each object that the probe writes, and with ``{"died": …}`` if it exits without a result.
    """

    def __init__(
        self,
        settings: Settings,
        pid: int,
        token_id: int,
        environment: Mapping[str, str],
        on_message: Callable[[dict[str, Any]], None],
    ) -> None:
        command = [sys.executable, "-m", "dynamo_mpi.engines.trtllm.readiness_main"]
        command += ["--pid", str(pid), "--token-id", str(token_id)]
        command += ["--endpoint", settings.endpoint, "--role", settings.role]
        command += ["--discovery-backend", settings.discovery_backend, "--request-plane", settings.request_plane]
        probe_environment = {name: value for name, value in environment.items() if not name.startswith("TLLM_")}
        # its runtime must not log, nor use the child's ports
        probe_environment |= {"DYN_LOG": "error"}
        for name in ("DYN_SYSTEM_PORT", "DYN_TCP_RPC_PORT"):
            probe_environment.pop(name, None)
        self._on_message = on_message
        self._process = ManagedProcess(
            "proof", command, environment=probe_environment, streams=Streams(stdout=subprocess.PIPE)
        )
        threading.Thread(target=self._read, name="proof", daemon=True).start()

    def kill(self) -> None:
        """Kill the probe if it still runs."""
        self._process.kill_group()

    def _read(self) -> None:
        last: dict[str, Any] = {}
        for line in cast("IO[bytes]", self._process.popen.stdout):
            try:
                message = json.loads(line)
            except ValueError:  # output of the runtime
                continue
            if isinstance(message, dict):
                last = message
                self._on_message(message)
        code = self._process.popen.wait()
        if code != 0 and not {"error", "proven"} & last.keys():
            self._on_message({"died": f"the readiness probe {describe_end(code)}"})
