# SPDX-License-Identifier: Apache-2.0
"""The rank's side of the fabric check over NCCL: it starts the child process that runs it, sends it the id to join, and ends it at the
deadline.

NCCL's id goes through pipes and MPI. A child that hangs is killed, so unlike over MPI, the worker can go on.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import select
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from dynamo_mpi.checks.fabric_steps import FAILED, LATE, OK, SKIPPED, FabricAnswer, Timing
from dynamo_mpi.checks.hang_diagnosis import WaitState
from dynamo_mpi.checks.hardware import START_SHARE
from dynamo_mpi.common.codec import decode_strings, encode_strings
from dynamo_mpi.common.fabric_payload import corruption_injected
from dynamo_mpi.common.process import set_activity
from dynamo_mpi.common.subprocess import ManagedProcess, Streams

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.checks.hardware import HardwareCheckPlan
    from dynamo_mpi.mpi.world import World

_READ_BYTES = 65536
_STDERR_BYTES = 2000
_EXIT_SECONDS = 2.0


class EndedError(RuntimeError):
    """The child failed or exited; the text is the reason."""


class LateError(RuntimeError):
    """The child has not answered in time."""


class CheckProcess:
    """One rank's child process. Start it from the main thread: it is killed when that thread ends.

    Args:
        rank: its rank.
        size: ranks of the world.
        plan: the checks.
        environ: its whole environment: the rank's own, so that it sees what the engine will see.
    """

    def __init__(self, rank: int, size: int, plan: HardwareCheckPlan, environ: Mapping[str, str]) -> None:
        words = [sys.executable, "-m", "dynamo_mpi.checks.nccl_child", str(rank), str(size), plan.pack()]
        self._stderr = os.memfd_create("check-stderr")
        self._process = ManagedProcess(
            "fabric check",
            [*words, "--spoil"] if corruption_injected() else words,
            environment=environ,
            streams=Streams(subprocess.PIPE, subprocess.PIPE, self._stderr),
        )
        self._input, self._output = self._process.popen.stdin, self._process.popen.stdout
        self._text = b""

    def send_line(self, line: str) -> None:
        """Send it a command."""
        assert self._input is not None  # noqa: S101 - it is a pipe
        with contextlib.suppress(OSError):  # it has exited; the next read reports that
            self._input.write(line.encode() + b"\n")
            self._input.flush()

    def read_line(self, end: float) -> tuple[str, str]:
        """Return its next line, split into the first word and the rest.

        Raises:
            EndedError: it failed, or has exited.
            LateError: no line arrived until ``end``.
        """
        assert self._output is not None  # noqa: S101 - it is a pipe
        while b"\n" not in self._text:
            if not has_input(self._output.fileno(), end):
                raise LateError
            data = os.read(self._output.fileno(), _READ_BYTES)
            if not data:
                raise EndedError(f"the process of the check {self._exit_text()}: {self._error_output()}")
            self._text += data
        line, _, self._text = self._text.partition(b"\n")
        verb, _, rest = line.decode("utf-8", "replace").partition(" ")
        if verb == "failed":
            raise EndedError(rest)
        return verb, rest

    def close(self) -> None:
        """End it, and wait until it has exited and its GPU memory is free. Idempotent."""
        self._process.kill_group()
        self._process.wait(_EXIT_SECONDS)  # if it hangs in the driver, the kernel ends it when this process ends
        for stream in (self._input, self._output):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = -1

    def _exit_text(self) -> str:
        if self._process.wait(_EXIT_SECONDS):
            return f"ended with {self._process.popen.returncode}"
        return "does not exit"  # it hangs in the driver

    def _error_output(self) -> str:
        size = os.fstat(self._stderr).st_size
        text = os.pread(self._stderr, _STDERR_BYTES, max(0, size - _STDERR_BYTES)).decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else "no output on stderr"


def measure_over_nccl(world: World, plan: HardwareCheckPlan, environ: Mapping[str, str], began: float) -> FabricAnswer:
    """Run this rank's part. Collective: uses two collectives of the world.

    Args:
        world: all ranks.
        plan: the checks.
        environ: this rank's environment.
        began: start of the checks on this rank, by `time.monotonic`.
    """
    # ranks arrive at different times: some wait until memory is freed, and the others wait for them
    end = time.monotonic() + plan.seconds * START_SHARE
    child: CheckProcess | None = None
    try:
        about: dict[str, Any] = {}
        problem, unique_id = "", ""
        try:
            child = CheckProcess(world.rank, world.size, plan, environ)
            about = json.loads(child.read_line(end)[1])
            if world.rank == 0:
                child.send_line("identify")
                unique_id = child.read_line(end)[1]
        except (EndedError, LateError) as error:
            problem = str(error) or f"it did not start in {plan.seconds * START_SHARE:g} s"
        except (OSError, ValueError) as error:  # for example no more processes: no reason to end a worker
            problem = f"its process can't be started: {error}"
        answers = world.gather(encode_strings([problem]))
        # if a rank can't take part, all others would wait for it
        able = all(not decode_strings(answer)[0] for answer in answers)
        joined = world.broadcast(unique_id.encode() if able else b"").decode()
        library = str(about.get("library", ""))
        if child is None or not joined:
            return FabricAnswer(FAILED if problem else SKIPPED, problem, library)
        child.send_line(f"join {joined}")
        return read_results(child, library, began, time.monotonic() + plan.seconds)
    finally:
        set_activity("")
        if child is not None:
            child.close()


def read_results(child: CheckProcess, library: str, began: float, end: float) -> FabricAnswer:
    """Read the results of a child that has got the id, until it is done.

    Args:
        child: the child process.
        library: the library that it reported.
        began: start of the check, by `time.monotonic`.
        end: the deadline.
    """
    timings: list[Timing] = []
    note, about, begin = "", {}, 0.0
    state, text = OK, ""
    try:
        while True:
            verb, rest = child.read_line(end)
            words = rest.split(" ")
            if verb == "at":
                note = str(WaitState(int(words[0]), int(words[1]), _ranks(words[2])))
                begin = begin or (time.monotonic() - began if words[0] != "-1" else 0.0)
                set_activity(note)
            elif verb == "took":
                step, size, seconds, sent, resent, wrong = words
                timings.append(Timing(int(step), int(size), float(seconds), _ranks(wrong), int(sent), int(resent)))
            elif verb == "done":
                about = json.loads(rest)
                break
    except EndedError as error:
        state, text = FAILED, str(error)
    except LateError:
        state, text = LATE, note
    links = tuple(about.get("links", ()))
    return FabricAnswer(state, text, library, about.get("network", ""), links, has_cards(), begin, tuple(timings))


def _ranks(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()


def has_input(file: int, end: float) -> bool:
    """Wait for input or end of file; return whether there is any before ``end``, by `time.monotonic`.

    Not by `select.select`, which can't handle file numbers of 1024 or more: rank 0 has one for each rank.
    """
    poller = select.poll()
    poller.register(file, select.POLLIN)
    return bool(poller.poll(max(0.0, end - time.monotonic()) * 1000))


def has_cards(folder: str = "/sys/class/infiniband") -> bool:
    """Whether this node has an InfiniBand or RoCE card with a port that is up (``ACTIVE``, 4 of ``enum ib_port_state``)."""
    for path in glob.glob(os.path.join(folder, "*", "ports", "*", "state")):
        with contextlib.suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
            if file.read().startswith("4:"):
                return True
    return False
