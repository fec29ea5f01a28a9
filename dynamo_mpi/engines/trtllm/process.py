# SPDX-License-Identifier: Apache-2.0
"""The processes that rank 0 of a TensorRT-LLM worker starts, which end with it: ``dynamo.trtllm``, and the readiness probe.

The last output lines of ``dynamo.trtllm`` are kept for reports.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from typing import IO, TYPE_CHECKING, Any, cast

from dynamo_mpi.common.credentials import split_clients
from dynamo_mpi.common.errors import ExitCode, of_signal
from dynamo_mpi.common.log_writer import log_writer
from dynamo_mpi.common.redact import process_redactor
from dynamo_mpi.common.subprocess import ManagedProcess, Streams

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_mpi.config.worker import Settings

# a chain of tracebacks, whose first error is the cause, is that long
_LINES_KEPT = 400
_LONGEST_LINE = 2000
_PIPE_BYTES = 1 << 20
_USAGE_CODE = 2  # argparse's


class TrtllmProcess(ManagedProcess):
    """A running child. Its stdout and stderr are forwarded to rank 0's stderr, line by line.

    Args:
        command: the command to run.
        environment: the whole environment; addresses and credentials reach the child by a file in memory.
        on_end: called from a thread with the exit code, as in `subprocess.Popen.returncode`, and the last output lines.
        on_stop: called from the same thread when the child is stopped (True) or resumed (False). It must be quick.
        secret: removed from the output: at verbose log levels, Dynamo logs its environment.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        on_end: Callable[[int, list[str]], None],
        on_stop: Callable[[bool], None],
        secret: str,
    ) -> None:
        self._secret = secret.encode()
        self._lines: collections.deque[str] = collections.deque(maxlen=_LINES_KEPT)
        self._on_end, self._on_stop = on_end, on_stop
        self._code: int | None = None
        self._exited = threading.Event()
        streams = Streams(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        rest, services = split_clients(environment)
        super().__init__("dynamo.trtllm", command, environment=rest, streams=streams, services=services)
        self._output = cast("IO[bytes]", self.popen.stdout)
        with contextlib.suppress(OSError):  # a larger pipe is only an optimization
            fcntl.fcntl(self._output, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._pump = threading.Thread(target=self._forward, name="child output", daemon=True)
        self._pump.start()
        threading.Thread(target=self._watch, name="child end", daemon=True).start()

    # only the watching thread calls wait: a child that another thread has reaped can't be waited for again

    def exit_code(self) -> int | None:
        """Return the exit code as in a shell; None while the child runs."""
        code = self._code
        return code if code is None or code >= 0 else of_signal(-code)

    def wait(self, seconds: float) -> bool:
        """Wait until the child has exited, at most ``seconds``; return whether it has."""
        return self._exited.wait(seconds)

    def _forward(self) -> None:
        for raw in self._output:
            line = raw.replace(self._secret, b"<secret>")
            log_writer.write_raw(line)
            text = line[:_LONGEST_LINE].decode("utf-8", "replace").rstrip()
            if text:
                self._lines.append(text)

    def _watch(self) -> None:
        stops = os.WSTOPPED | os.WCONTINUED
        # while it is a zombie its pid is not reused, so the rest of its session can be killed safely
        while (seen := os.waitid(os.P_PID, self.pid, os.WEXITED | stops | os.WNOWAIT)) is not None:
            if seen.si_code not in (os.CLD_STOPPED, os.CLD_CONTINUED):
                self._code = seen.si_status if seen.si_code == os.CLD_EXITED else -seen.si_status
                break
            os.waitid(os.P_PID, self.pid, stops | os.WNOHANG)
            self._on_stop(seen.si_code == os.CLD_STOPPED)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        code = self.popen.wait()
        self._exited.set()
        # its last lines explain its exit
        self._pump.join(1.0)
        # redacted together, because a secret may span several lines
        self._on_end(code, process_redactor().redact("\n".join(self._lines)).splitlines())


def describe_end(code: int) -> str:
    """Describe how a process ended.

    Args:
        code: as in `subprocess.Popen.returncode`: negative for a signal.
    """
    if code >= 0:
        return f"ended with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    return f"was ended by signal {-code} ({name})"


def exit_code_for(code: int) -> int:
    """Translate the exit code of ``dynamo.trtllm``, if it exited by itself, into this worker's exit code.

    0 means a lost lease (``dynamo.trtllm`` returns 0 in that case), 2 an error of ``argparse``.
    """
    if code < 0:
        return of_signal(-code)
    return int({0: ExitCode.TEMPORARY, _USAGE_CODE: ExitCode.USAGE}.get(code, ExitCode.ENGINE))


class ReadinessProbe:
    """A running readiness probe.

    Args:
        settings: the worker's settings.
        pid: process id of ``dynamo.trtllm``.
        token_id: the prompt, one token.
        log_probs: whether to look at log probabilities.
        environment: the child's environment, from which the probe finds etcd.
        on_message: called from a thread with each object that the probe writes, and with ``{"died": …}`` if it exits without a result.
    """

    def __init__(
        self,
        settings: Settings,
        pid: int,
        token_id: int,
        log_probs: bool,
        environment: Mapping[str, str],
        on_message: Callable[[dict[str, Any]], None],
    ) -> None:
        command = [sys.executable, "-m", "dynamo_mpi.engines.trtllm.readiness_main"]
        command += ["--pid", str(pid), "--token-id", str(token_id)]
        command += ["--log-probs"] if log_probs else []
        command += ["--endpoint", settings.endpoint, "--role", settings.role]
        command += ["--discovery-backend", settings.discovery_backend, "--request-plane", settings.request_plane]
        probe_environment, services = split_clients(
            {name: value for name, value in environment.items() if not name.startswith("TLLM_")}
        )
        # its runtime must not log, nor use the child's ports
        probe_environment |= {"DYN_LOG": "error"}
        for name in ("DYN_SYSTEM_PORT", "DYN_TCP_RPC_PORT"):
            probe_environment.pop(name, None)
        self._on_message = on_message
        self._process = ManagedProcess(
            "proof",
            command,
            environment=probe_environment,
            streams=Streams(stdout=subprocess.PIPE),
            services=services,
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
