# SPDX-License-Identifier: Apache-2.0
"""Faults on demand: how they are asked for, refused, and what they do to a real process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.subprocess import session_members
from dynamo_mpi.supervisor.fault_injection import Fault, parse_fault
from tests.conftest import ROOT

PROGRAM = Path(__file__).with_name("programs") / "faulty_rank.py"
SECONDS = 10.0


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("rank3:load:kill", Fault(3, "load", "kill")),
        ("rank0:mpi_init:stop", Fault(0, "mpi_init", "stop")),
        ("rank1:serve+5:exit0", Fault(1, "serve", "exit", 0, 5)),
        ("rank1:serve+0.25:exit137", Fault(1, "serve", "exit", 137, 0.25)),
        ("rank1:serve@/a:b/c+1:kill", Fault(1, "serve", "kill", trigger="/a:b/c+1")),
        ("rank1:drain:slow", Fault(1, "drain", "slow", 5)),
        ("rank1:warmup:slow=0.5", Fault(1, "warmup", "slow", 0.5)),
        # former names
        ("rank1:prove:kill", Fault(1, "warmup", "kill")),
        ("rank2:world:stop", Fault(2, "mpi_init", "stop")),
        ("rank2:probe:corrupt", Fault(2, "hardware_check", "corrupt")),
        (" rank12:exit:exception\n", Fault(12, "exit", "exception")),
    ],
)
def test_a_fault_is_read(text: str, fault: Fault) -> None:
    assert parse_fault(text) == fault


@pytest.mark.parametrize(
    "text",
    [
        "",
        "kill",
        "rank1:load",
        "1:load:kill",
        "rank-1:load:kill",
        "rank1:lunch:kill",
        "rank1:load:explode",
        "rank1:load:exit",
        "rank1:load:exit256",
        "rank1:load:exit=3",
        "rank1:load:kill=3",
        "rank1:load:kill3",
        "rank1:load:slow3",
        "rank1:load+x:kill",
        "rank1:load@relative:kill",
        "rank1:load:kill:now",
    ],
)
def test_what_is_no_fault_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_fault(text)
    assert re.search("rankN:PHASE:ACTION", str(caught.value))


class Rank:
    """The program in a session of its own."""

    def __init__(self, fault: str, rank: int = 1, how: str = "sleep", allow: str | None = "1") -> None:
        environment = os.environ | {"DYN_MPI_FAULT": fault, "PYTHONPATH": str(ROOT)}
        environment.pop("DYN_MPI_ALLOW_FAULTS", None)
        if allow is not None:
            environment["DYN_MPI_ALLOW_FAULTS"] = allow
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), "3", how],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def end(self) -> tuple[int, str, str]:
        """Wait, and return exit code, what it printed without the ticks, and what it said."""
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out.replace("tick\n", ""), err

    def comes_to(self, word: str) -> None:
        """Read until it prints ``word``."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == word:
                return
        raise AssertionError(f"it never printed {word}")

    def state(self) -> str:
        """Return the process's state, a letter."""
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextlib.contextmanager
def running(rank: Rank) -> Iterator[Rank]:
    """Kill what is left in the end."""
    try:
        yield rank
    finally:
        for pid in session_members(rank.process.pid):
            os.kill(pid, signal.SIGKILL)
        rank.process.communicate()


@pytest.mark.parametrize("allow", [None, "", "0", "yes"])
def test_faults_must_be_allowed(allow: str | None) -> None:
    code, out, err = Rank("rank1:load:kill", 0, allow=allow).end()
    assert code == 64
    assert "DYN_MPI_ALLOW_FAULTS=1" in out
    assert "is armed" not in err


def test_a_rank_that_there_is_not_is_refused() -> None:
    code, out, _ = Rank("rank3:load:kill", 0).end()
    assert code == 64
    assert "there is no rank 3" in out
    assert "0 to 2" in out


def test_rank_0_warns_and_others_live() -> None:
    with running(Rank("rank1:load:kill", 0)) as rank:
        rank.comes_to("serve")
        rank.process.kill()
        _, _, err = rank.end()
    (line,) = err.splitlines()
    assert line == (
        "dynamo_mpi: rank 0 on here: warning: a fault is armed (DYN_MPI_FAULT): rank 1 is killed (SIGKILL) in load"
    )


@pytest.mark.parametrize(("action", "code"), [("kill", -signal.SIGKILL), ("exit0", 0), ("exit3", 3), ("exit255", 255)])
@pytest.mark.parametrize("phase", ["environment", "mpi_init", "preflight", "load"])
def test_an_end_comes_when_the_phase_begins(phase: str, action: str, code: int) -> None:
    ended, out, err = Rank(f"rank1:{phase}:{action}").end()
    assert ended == code
    assert out.split() == ["environment", "mpi_init", "preflight", "load"][: len(out.split())]
    assert phase not in out
    assert f"fault: {action.replace('exit', 'exit ')} in {phase}" in err


def test_an_exception_is_raised_in_the_phase() -> None:
    code, out, err = Rank("rank1:load:exception").end()
    assert code == 1
    assert out.split() == ["environment", "mpi_init", "preflight"]
    assert err.rstrip().endswith("FaultError: a fault on demand, in load")
    assert "with phases.enter(name):" in err


@pytest.mark.parametrize("how", ["sleep", "queue", "asyncio", "uvloop"])
def test_a_late_exception_comes_up_in_the_main_thread_whatever_it_waits_for(how: str) -> None:
    if how == "uvloop":
        pytest.importorskip("uvloop", reason="uvloop isn't installed")
    code, out, err = Rank("rank0:serve+0.1:exception", 0, how).end()
    assert code == 1
    assert out.split()[-1] == "serve"
    assert "FaultError: a fault on demand, in serve" in err
    assert "in wait" in err


def test_a_file_triggers_it(tmp_path: Path) -> None:
    trigger = tmp_path / "now: please"
    with running(Rank(f"rank0:serve@{trigger}:exit3", 0)) as rank:
        rank.comes_to("serve")
        rank.comes_to("tick")
        assert rank.process.poll() is None
        trigger.touch()
        assert rank.process.wait(SECONDS) == 3


def test_a_delay_is_kept() -> None:
    with running(Rank("rank0:serve+0.4:exit3", 0)) as rank:
        rank.comes_to("serve")
        begin = time.monotonic()
        assert rank.process.wait(SECONDS) == 3
    # what it printed before was read a little later
    assert time.monotonic() - begin > 0.3


def test_a_stopped_rank_is_stopped() -> None:
    with running(Rank("rank0:serve+0.1:stop", 0)) as rank:
        rank.comes_to("serve")
        os.waitid(os.P_PID, rank.process.pid, os.WSTOPPED | os.WNOWAIT)
        assert rank.state() == "T"


def test_a_hang_stops_all_threads_and_heeds_no_signal() -> None:
    with running(Rank("rank0:serve+0.1:hang", 0)) as rank:
        assert rank.process.stderr is not None
        for line in rank.process.stderr:
            if "fault: hang" in line:
                break
        assert rank.process.stdout is not None
        descriptor = rank.process.stdout.fileno()
        os.set_blocking(descriptor, False)
        time.sleep(0.1)  # for a tick under way
        with contextlib.suppress(BlockingIOError):
            while os.read(descriptor, 1 << 16):
                pass
        time.sleep(0.3)
        with pytest.raises(BlockingIOError):
            os.read(descriptor, 1 << 16)
        assert rank.process.poll() is None
        assert rank.state() == "S"


def test_a_slow_rank_comes_later() -> None:
    begin = time.monotonic()
    with running(Rank("rank0:load:slow=0.5", 0)) as rank:
        rank.comes_to("load")
        assert time.monotonic() - begin > 0.5
        rank.comes_to("serve")


def test_a_rank_other_than_0_loads_first_whatever_it_calls_it() -> None:
    """With TensorRT-LLM it enters "serve" for all that comes after the verdict. Here "load" comes before, so "serve" is never its own."""
    with running(Rank("rank1:serve:kill", 1)) as rank:
        rank.comes_to("serve")
        rank.comes_to("tick")
        assert rank.process.poll() is None
