# SPDX-License-Identifier: Apache-2.0
"""A fault in a running worker, and all that must follow from it, whatever launched the worker.

A case is a fault, a phase and a rank. `run_case` waits for the phase, lets the fault happen, and measures; `Outcome.check` asserts.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pytest

from tests.conftest import ROOT
from tests.dynamo.running import eventually
from tests.fault_traces import Keys, Streams, has_ended, run_out_of_memory

if TYPE_CHECKING:
    from _pytest.mark.structures import ParameterSet

HEARTBEAT = 3.0
"""Seconds for ``--heartbeat-timeout``: longer than what holds Python's lock while two shared cores load three ranks."""
PROMPT_SECONDS = 3.0
"""From the fault to the launcher's end, without the heartbeat's time."""
KEYS_SECONDS = 1.5
"""From when a fault can be known to the last key's end: a second, and what a look takes on a busy machine."""
STREAMS, TOKENS = 8, 1500
PHASES = ("mpi_init", "preflight", "load", "serve", "drain")
FAULTS = ("kill", "stop", "hang", "exception", "exit0", "exit3", "oom")
SILENT = ("stop", "hang")
DROPPED = re.compile(r"PMIX_ERR_UNREACH|assert \(!closed\) failed")
"""What mpirun of Open MPI 5.0.11 says where it doesn't print what ranks write once one of them has left with an error, on another host; and
mpiexec of MPICH 5.0.2 where its proxies end before they have."""
CHILD = -1
"""Stands for the rank where it is rank 0's child, ``dynamo.trtllm``, that meets the fault. Then the test does it by a signal."""
CHILD_FAULTS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "exit0": signal.SIGTERM, "oom": signal.SIGKILL}
# Debian's mpirun alone may take 4 s more than the others
_HUNG_SECONDS = HEARTBEAT + PROMPT_SECONDS + 5

TRTLLM_ENVIRONMENT = {
    # the stand-in for TensorRT-LLM comes first
    "PYTHONPATH": os.pathsep.join(
        filter(None, (os.environ.get("PYTHONPATH"), str(ROOT / "tests/standins"), str(ROOT)))
    ),
    "OMP_NUM_THREADS": "1",
}


class Case(NamedTuple):
    """What happens.

    Args:
        fault: one of `FAULTS`.
        phase: one of `PHASES`.
        rank: where, or `CHILD`.
        engine: "reference" or "trtllm".
        signalled: whether the test sends the signal, "kill" or "stop", to the rank, which otherwise does it to itself.
        number: distinguishes several that are alike, and run one after the other.
    """

    fault: str
    phase: str
    rank: int
    engine: str = "reference"
    signalled: bool = False
    number: int = 0

    def __str__(self) -> str:
        where = "child" if self.rank == CHILD else f"rank{self.rank}"
        engine = "-trtllm" if self.engine == "trtllm" else ""
        return f"{self.phase}-{self.fault}-{where}{engine}{f'-{self.number}' if self.number else ''}"

    @property
    def namespace(self) -> str:
        """A namespace of its own, also for the model's name: what one case leaves in etcd is nothing to the next."""
        return str(self).replace("-", "_")

    @property
    def streaming(self) -> bool:
        """Whether it needs requests that are in flight."""
        return self.phase in ("serve", "drain")

    @property
    def from_outside(self) -> bool:
        """Whether it is the test that does it, to a process."""
        return self.fault == "oom" or self.rank == CHILD or self.signalled

    def flags(self, failures: Path) -> tuple[str, ...]:
        """Return the worker's flags; its failure files go to ``failures``."""
        names = ["--namespace", self.namespace, "--served-model-name", self.namespace]
        if self.engine == "trtllm":
            names += ["--engine", "trtllm", "--allow-no-gpu", "--max-seq-len", "2048", "--max-batch-size", str(STREAMS)]
        return (*names, "--heartbeat-timeout", str(HEARTBEAT), "--failure-dir", str(failures))

    def environment(self, trigger: Path) -> dict[str, str]:
        """Return what the ranks need, and what arms the fault; memory runs out by the test's doing, once the rank says that it is slow."""
        variables: dict[str, str] = {}
        if self.engine == "trtllm":
            # a drain waits all of this time, and nothing else does
            grace = "5" if self.phase == "drain" else "0.2"
            variables = {**TRTLLM_ENVIRONMENT, "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": grace}
        if self.rank == CHILD or self.signalled:
            return variables
        when = {"serve": f"serve@{trigger}", "drain": "drain+0.2"}.get(self.phase, self.phase)
        action = self.fault
        if self.fault == "oom":
            # long enough for the test to notice on a busy machine
            action = "slow=0" if self.streaming else "slow=4"
        armed = {"DYN_MPI_FAULT": f"rank{self.rank}:{when}:{action}", "DYN_MPI_ALLOW_FAULTS": "1"}
        return {**variables, **armed}


def trtllm_parameters(chosen: Sequence[Case], rank: int) -> list[ParameterSet]:
    """Return the cases of TensorRT-LLM's workers: of rank 0's child, and of a rank, as `parameters` does."""
    every = [*CHILD_CASES, *(Case(fault, phase, rank, "trtllm") for phase in CHILD_PHASES for fault in FAULTS)]
    rest = [case for case in every if case not in chosen]
    later = [pytest.param(case, id=str(case), marks=pytest.mark.all_faults) for case in rest]
    return [*(pytest.param(case, id=str(case)) for case in chosen), *later]


def parameters(chosen: Sequence[Case], rank: int) -> list[ParameterSet]:
    """Return the cases as pytest's parameters: those chosen first, and with ``--all-faults`` all others.

    Args:
        chosen: what every run of the tests has.
        rank: stands for all ranks but 0.
    """
    every = [Case(fault, phase, victim) for phase in PHASES for fault in FAULTS for victim in (rank, 0)]
    rest = [case for case in every if case not in chosen]
    found = []
    for case in (*chosen, *rest):
        marks = [pytest.mark.all_faults] if case in rest else []
        found.append(pytest.param(case, id=str(case), marks=marks))
    return found


CHILD_PHASES = ("load", "serve", "drain")
CHILD_CASES = tuple(
    Case(fault, phase, CHILD, "trtllm")
    for phase in CHILD_PHASES
    for fault in CHILD_FAULTS
    # asked to end, it does so in order while it drains, and dies of the signal while it loads
    if fault != "exit0" or phase == "serve"
)
CHILD_CODES = {"kill": (137,), "oom": (137,), "stop": (124,), "exit0": (75,)}
"""The exit codes under every launcher where it is the child that meets the fault."""


class Worker(Protocol):
    """A worker under a launcher: ``RunningWorker``, ``SlurmWorker``, ``HostsWorker``."""

    log: Path

    @property
    def process(self) -> Any:
        """The launcher."""

    def text(self) -> str:
        """Return what launcher and ranks have printed."""

    def ready(self, seconds: float = 90) -> dict[str, Any]:
        """Wait until it serves."""


class LeftBehind(AssertionError):
    """Something is there that should have gone with the worker."""


@dataclass
class Outcome:
    """What was seen.

    Attributes:
        case: what happened.
        code: the launcher's exit code; None where it did not end.
        seconds: from the fault to the launcher's end.
        keys_seconds: from the fault to the last key's end, 0 where there were none any more.
        text: what was printed.
        streams_seconds: from the fault to the last stream's end.
        streams: how each stream has ended.
        reports: the failure files by name.
        left: what is left behind, in words.
    """

    case: Case
    code: int | None
    seconds: float
    keys_seconds: float
    text: str
    streams_seconds: float = 0.0
    streams: list[dict[str, Any]] = field(default_factory=list)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.case}: {self.seconds:.2f} s, exit code {self.code}, keys {self.keys_seconds:.2f} s, "
            f"streams {self.streams_seconds:.2f} s {sorted({stream['end'][:100] for stream in self.streams})}"
        )

    def check(self, host: str, codes: Sequence[int], launcher_seconds: float = 0.0) -> None:
        """Assert that everything is as expected.

        Args:
            host: of the rank.
            codes: the launcher's, each of them as good.
            launcher_seconds: that the launcher takes for itself, to end others than our ranks, too.

        Raises:
            LeftBehind: all is well, but that something is left; the last to be looked at.
        """
        noticed_after = HEARTBEAT if self.case.fault in SILENT else 0.0
        print(self)  # for pytest -rA
        assert self.code is not None, f"it still ran {self.seconds:.1f} s after the fault\n{self.text}"
        assert self.seconds <= noticed_after + PROMPT_SECONDS + launcher_seconds, f"{self.seconds:.2f} s\n{self.text}"
        assert self.code in codes, f"exit code {self.code}\n{self.text}"
        self.check_report(host)
        if self.case.streaming:
            assert len(self.streams) == STREAMS, self.streams
            for stream in self.streams:
                assert stream["end"] != "done", stream
            assert self.streams_seconds <= noticed_after + PROMPT_SECONDS, f"streams for {self.streams_seconds:.2f} s"
        if self.left:
            raise LeftBehind(f"{self.left} is left, keys for {self.keys_seconds:.2f} s\n{self.text}")
        assert self.keys_seconds <= noticed_after + KEYS_SECONDS, f"keys for {self.keys_seconds:.2f} s\n{self.text}"

    @property
    def blocks(self) -> list[tuple[str, str, str]]:
        """The reports that were printed: who speaks, the phase, and the first line."""
        return re.findall(r"dynamo_mpi: (rank \d+ on \S+): error in (\w+): ([^\n]*)", self.text)

    def check_report(self, host: str) -> None:
        """Assert that there is exactly one report, about the right rank and host."""
        case, name = self.case, f"rank {max(0, self.case.rank)} on {host}"
        blocks = self.blocks
        if not blocks and DROPPED.search(self.text):
            (report,) = self.reports.values()
            assert (report["rank"], report["host"]) == (max(0, case.rank), host), report
            return
        assert len(blocks) == 1, f"{blocks}\n{self.text}"
        ((speaker, phase, line),) = blocks
        is_at_end = (case.phase, phase, case.fault in SILENT) == ("drain", "exit", True)
        assert phase == case.phase or is_at_end, blocks
        assert name in (speaker, line[: len(name)]), blocks
        if case.rank == CHILD:
            texts = {"stop": "has been stopped for", "exit0": "ended with code 0 although it was not asked"}
            assert line.startswith("dynamo.trtllm "), blocks
            assert texts.get(case.fault, "was ended by signal 9") in line, blocks
        else:
            texts = {"exception": "Traceback", **dict.fromkeys(SILENT, "is stopped or stuck")}
            assert texts.get(case.fault, "died") in line, blocks
        if case.fault == "exception":
            assert self.text.count("FaultError: a fault on demand") >= 1, self.text
        if case.phase in ("mpi_init", "preflight") and not self.reports:
            return  # where the files go is known with the verdict
        # who speaks writes it all down
        by = re.sub(r"rank (\d+) on .*", r"rank-\1.json", speaker)
        (report,) = [content for file, content in self.reports.items() if file.endswith(by)]
        assert (report["rank"], report["host"]) == (max(0, case.rank), host), report
        assert line in report.get("report", report["error"]), report


def run_case(
    case: Case,
    worker: Worker,
    trigger: Path,
    keys: Keys,
    open_streams: Callable[[], Streams],
    begin_drain: Callable[[], object],
    find_rank: Callable[[int], int],
    stop: Callable[[], object],
    look: Callable[[], object] = lambda: None,
) -> Outcome:
    """Let the fault happen, and look on until the launcher has ended, or has not.

    Args:
        case: what happens; the worker was started with its environment.
        worker: starts, or serves.
        trigger: the case's.
        keys: its own.
        open_streams: begins requests.
        begin_drain: asks the worker to end in order.
        find_rank: returns a rank's pid on this machine; of `CHILD`, 0 where it isn't there yet.
        stop: ends what has not ended.
        look: called while all ranks are still there.
    """
    streams = None
    if case.streaming:
        worker.ready()
        assert keys.now
        streams = open_streams()
        streams.wait_open()
        look()
    with contextlib.ExitStack() as limits:
        if case.phase == "drain":
            begin_drain()
        trigger.touch()
        words = "fault: "
        if case.rank == CHILD or case.signalled:
            words = {"load": "run mgmn leader", "drain": "drain: "}.get(case.phase, "")
        eventually(lambda: words in worker.text() or worker.process.poll() is not None, "it has come so far", 90)
        fault = time.time()
        look()
        assert words in worker.text(), worker.text()
        pid = eventually(lambda: find_rank(case.rank), "the process is there", 20) if case.from_outside else 0
        fault = time.time() if pid else fault
        if case.fault == "oom":
            fault = limits.enter_context(run_out_of_memory(pid))
        elif pid:
            os.kill(pid, CHILD_FAULTS[case.fault])
            if case.fault == "exit0":  # which is what comes of the signal, in order and in its time
                eventually(lambda: has_ended(pid), "the child has ended", 20)
                fault = time.time()
        code = _wait(worker, fault + _HUNG_SECONDS)
        seconds = time.time() - fault
        if code is None:
            stop()
    with contextlib.suppress(AssertionError):
        eventually(lambda: not keys.now, "the keys are gone", KEYS_SECONDS)
    outcome = Outcome(case, code, seconds, max(0.0, keys.gone_since() - fault), worker.text(), left=list(keys.now))
    if streams is not None and code is not None:
        outcome.streams = streams.ends(PROMPT_SECONDS + HEARTBEAT)
        outcome.streams_seconds = max((stream["time"] for stream in outcome.streams), default=fault) - fault
    return outcome


def _wait(worker: Worker, end: float) -> int | None:
    while (code := worker.process.poll()) is None and time.time() < end:
        time.sleep(0.01)
    return None if code is None else int(code)
