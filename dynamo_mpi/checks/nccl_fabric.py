# SPDX-License-Identifier: Apache-2.0
"""The rank's side of the fabric probe over NCCL: it starts the child that does it, tells it whom to join, and ends it when its time is up.

The id that NCCL's ranks join by goes through pipes and MPI. A child that hangs is killed, so unlike MPI's, such a probe ends in order.
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

from dynamo_mpi.checks.fabric_timing import FAILED, LATE, OK, SKIPPED, FabricAnswer, Timing
from dynamo_mpi.checks.hang_diagnosis import WaitState
from dynamo_mpi.checks.hardware_check_plan import START_SHARE
from dynamo_mpi.common.activity import set_activity
from dynamo_mpi.common.codec import decode_strings, encode_strings
from dynamo_mpi.common.fabric_payload import corruption_injected
from dynamo_mpi.common.subprocess import ManagedProcess

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.checks.hardware_check_plan import HardwareCheckPlan
    from dynamo_mpi.mpi.world import World

_READ_BYTES = 65536
_STDERR_BYTES = 2000
_LEAVE_SECONDS = 2.0


class EndedError(RuntimeError):
    """The child can't go on; why."""


class LateError(RuntimeError):
    """The child has not answered in its time."""


class ProbeChild:
    """One rank's child. Start it from the main thread, at whose end it is killed.

    Args:
        rank: its rank.
        size: ranks of the world.
        plan: what to do.
        environ: all of its environment: the rank's own, so that it sees what the engine will see.
    """

    def __init__(self, rank: int, size: int, plan: HardwareCheckPlan, environ: Mapping[str, str]) -> None:
        words = [sys.executable, "-m", "dynamo_mpi.checks.nccl_child", str(rank), str(size), plan.pack()]
        self._stderr = os.memfd_create("probe-stderr")
        self._process = ManagedProcess(
            "fabric probe",
            [*words, "--spoil"] if corruption_injected() else words,
            environment=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )
        self._input, self._output = self._process.popen.stdin, self._process.popen.stdout
        self._text = b""

    def tell(self, line: str) -> None:
        """Tell it something."""
        assert self._input is not None  # noqa: S101 - it is a pipe
        with contextlib.suppress(OSError):  # it has gone, as the next answer says
            self._input.write(line.encode() + b"\n")
            self._input.flush()

    def hear(self, end: float) -> tuple[str, str]:
        """Return its next line: the first word and the rest.

        Raises:
            EndedError: it failed, or has gone.
            LateError: nothing came until ``end``.
        """
        assert self._output is not None  # noqa: S101 - it is a pipe
        while b"\n" not in self._text:
            if not has_words(self._output.fileno(), end):
                raise LateError
            data = os.read(self._output.fileno(), _READ_BYTES)
            if not data:
                raise EndedError(f"the process of the probe {self._end()}: {self._last_words()}")
            self._text += data
        line, _, self._text = self._text.partition(b"\n")
        verb, _, rest = line.decode("utf-8", "replace").partition(" ")
        if verb == "failed":
            raise EndedError(rest)
        return verb, rest

    def close(self) -> None:
        """End it, and wait until it is gone, and with it what it held of the GPU. Idempotent."""
        self._process.kill_group()
        self._process.wait(_LEAVE_SECONDS)  # where it is stuck in the driver, the kernel ends it with us
        for stream in (self._input, self._output):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = -1

    def _end(self) -> str:
        if self._process.wait(_LEAVE_SECONDS):
            return f"ended with {self._process.popen.returncode}"
        return "does not come to its end"  # a driver holds it

    def _last_words(self) -> str:
        size = os.fstat(self._stderr).st_size
        text = os.pread(self._stderr, _STDERR_BYTES, max(0, size - _STDERR_BYTES)).decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"


def measure_over_nccl(world: World, plan: HardwareCheckPlan, environ: Mapping[str, str], began: float) -> FabricAnswer:
    """Do this rank's part. Collective: two collectives of the world's.

    Args:
        world: all ranks.
        plan: what to do.
        environ: this rank's environment.
        began: when the probes began on this rank, by `time.monotonic`.
    """
    # ranks come at different times: those that wait for memory keep the others waiting, at no one's cost
    end = time.monotonic() + plan.seconds * START_SHARE
    child: ProbeChild | None = None
    try:
        about: dict[str, Any] = {}
        trouble, unique_id = "", ""
        try:
            child = ProbeChild(world.rank, world.size, plan, environ)
            about = json.loads(child.hear(end)[1])
            if world.rank == 0:
                child.tell("identify")
                unique_id = child.hear(end)[1]
        except (EndedError, LateError) as error:
            trouble = str(error) or f"it did not start in {plan.seconds * START_SHARE:g} s"
        except (OSError, ValueError) as error:  # no more processes, say: that is no reason to end a worker
            trouble = f"its process can't be started: {error}"
        answers = world.gather(encode_strings([trouble]))
        # a rank that can't take part would be waited for by all others
        able = all(not decode_strings(answer)[0] for answer in answers)
        joined = world.broadcast(unique_id.encode() if able else b"").decode()
        library = str(about.get("library", ""))
        if child is None or not joined:
            return FabricAnswer(FAILED if trouble else SKIPPED, trouble, library)
        child.tell(f"join {joined}")
        return listen(child, library, began, time.monotonic() + plan.seconds)
    finally:
        set_activity("")
        if child is not None:
            child.close()


def listen(child: ProbeChild, library: str, began: float, end: float) -> FabricAnswer:
    """Hear a child that has been told whom to join, to its end.

    Args:
        child: the child.
        library: what it says it uses.
        began: when the probe began, by `time.monotonic`.
        end: when it has to have ended.
    """
    timings: list[Timing] = []
    note, about, begin = "", {}, 0.0
    state, text = OK, ""
    try:
        while True:
            verb, rest = child.hear(end)
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


def has_words(file: int, end: float) -> bool:
    """Wait until there is something to read, or its end; tell whether there is before ``end``, by `time.monotonic`.

    Not by `select.select`, which can't be asked of a file whose number is 1024 or more: rank 0 has one for each rank.
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
