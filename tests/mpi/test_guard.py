# SPDX-License-Identifier: Apache-2.0
"""Rank 0's guard over real ranks: one report, the right code, from wherever it comes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Mpirun

pytestmark = pytest.mark.mpi
PROGRAM = Path(__file__).parent / "programs" / "guarded_world.py"


def test_a_world_that_comes_through_ends_with_zero(mpirun: Mpirun) -> None:
    done = mpirun(3, PROGRAM, "nothing", "9")
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr


@pytest.mark.landing("2")
@pytest.mark.parametrize("victim", [0, 2])
def test_an_error_is_reported_with_its_rank(mpirun: Mpirun, victim: int) -> None:
    done = mpirun(3, PROGRAM, "raise", str(victim))
    assert done.returncode == 70, done.stderr
    assert done.stderr.count("error in environment: ") == 1
    assert ("rank 2 on here: Traceback" in done.stderr) is (victim == 2)
    assert "ValueError: this rank has had enough" in done.stderr
    assert "cleaned up" in done.stderr


def test_a_missed_deadline_reports_the_phase_of_every_rank(mpirun: Mpirun) -> None:
    done = mpirun(3, PROGRAM, "hang", "1")
    assert done.returncode == 124, done.stderr
    assert "the barrier was not passed after 1 s" in done.stderr
    assert "--timeout gives it longer" in done.stderr
    _, _, stacks = done.stderr.partition("where the ranks are:\n")
    hung, others = stacks.index("rank 1 on here:\n"), stacks.index("ranks 0, 2 on here:\n")
    assert hung < stacks.index("in wait_for_what_never_comes") < others


def test_a_rank_that_can_not_answer_is_reported_first(mpirun: Mpirun) -> None:
    done = mpirun(3, PROGRAM, "stop", "1")
    assert done.returncode == 124, done.stderr
    _, _, stacks = done.stderr.partition("where the ranks are:\n")
    assert stacks.startswith("rank 1 on here: no answer"), done.stderr


def test_a_death_is_reported_before_the_launcher_ends_rank_0(mpirun: Mpirun, tmp_path: Path) -> None:
    done = mpirun(3, PROGRAM, "kill", "1", env={"TIMEOUT": "30", "FAILURES": str(tmp_path)})
    assert done.returncode == 137, done.stderr
    assert done.stderr.count("error in environment: rank 1 on here died: ") == 1
    (file,) = tmp_path.glob("*.json")
    assert file.name == "worker-rank-0.json"
    assert file.stat().st_mode & 0o077 == 0
    report = json.loads(file.read_text())
    assert (report["rank"], report["host"], report["cause"], report["exit_code"]) == (1, "here", "disconnect", 70)
    assert report["report"] in done.stderr


def test_a_death_after_the_result_is_not_the_preflights(mpirun: Mpirun) -> None:
    # rank 0 has sent the result, and hasn't begun the next phase
    done = mpirun(3, PROGRAM, "kill_in_load", "1", env={"PATIENCE": "30"})
    assert done.stderr.count("error in load: rank 1 on here died: ") == 1, done.stderr


def test_the_others_see_that_rank_0_has_died(mpirun: Mpirun, tmp_path: Path) -> None:
    done = mpirun(3, PROGRAM, "kill", "0", env={"TIMEOUT": "30", "FAILURES": str(tmp_path)})
    assert done.returncode == 137, done.stderr
    assert done.stderr.count("dynamo_mpi: rank 1 on here: error in ") == 1
    assert "rank 0 on " in done.stderr
    assert "rank 2 on here" not in done.stderr


@pytest.mark.landing("1")
@pytest.mark.parametrize("victim", [0, 1])
def test_silence_is_reported(mpirun: Mpirun, victim: int) -> None:
    done = mpirun(3, PROGRAM, "stop", str(victim), env={"TIMEOUT": "30", "HEARTBEAT": "2"})
    assert done.returncode != 0
    assert done.stderr.count(f"rank {victim} on {'here' if victim else ''}") >= 1
    assert "is stopped or stuck: no heartbeat for 2 s" in done.stderr
    assert "--heartbeat-timeout sets the timeout" in done.stderr


def test_each_rank_that_fails_writes_a_file(mpirun: Mpirun, tmp_path: Path) -> None:
    done = mpirun(3, PROGRAM, "raise", "2", env={"FAILURES": str(tmp_path / "made")})
    assert done.returncode == 70, done.stderr
    own = json.loads((tmp_path / "made" / "worker-rank-2.json").read_text())
    whole = json.loads((tmp_path / "made" / "worker-rank-0.json").read_text())
    assert own["error"] == "ValueError: this rank has had enough"
    assert own["traceback"] == whole["traceback"]
    assert own["traceback"].startswith("Traceback")
    assert (own["rank"], own["sequence"], whole["consequences"]) == (2, 1, [])


def in_namespaces(prepare: str) -> tuple[str, ...]:
    """Return what to put before a command that runs in network, mount and host-name namespaces of its own, prepared by a shell."""
    unshare = ("unshare", "--net", "--mount", "--uts")
    if os.geteuid() or subprocess.run([*unshare, "ip", "link"], capture_output=True).returncode:
        pytest.skip("no network namespaces here: needs root and iproute2")
    return (*unshare, "sh", "-ec", f'ip link set lo up; {prepare}; exec "$@"', "sh")


@pytest.mark.landing("kill-fd00:9:8::/64")
@pytest.mark.parametrize("network", ["::1", "fd00:9:8::/64"])
@pytest.mark.parametrize("what", ["nothing", "kill"])
def test_liveness_over_ipv6(mpirun: Mpirun, network: str, what: str) -> None:
    before = in_namespaces("ip address add fd00:9:8::1/64 dev lo nodad")
    done = mpirun(3, PROGRAM, what, "2", env={"TIMEOUT": "30", "NETWORK": network}, before=before)
    if what == "nothing":
        assert done.returncode == 0, done.stderr
    else:
        assert "error in environment: rank 2 on here died: " in done.stderr


def test_an_address_that_is_not_this_hosts_is_no_traceback(mpirun: Mpirun, tmp_path: Path) -> None:
    """As with a wrong line in /etc/hosts."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n192.0.2.7 elsewhere\n")
    before = in_namespaces(f"hostname elsewhere; mount --bind {hosts} /etc/hosts")
    done = mpirun(2, PROGRAM, "nothing", "9", env={"NETWORK": ""}, before=before)
    assert done.returncode == 64, done.stderr
    assert (
        "refused: rank 0 can't listen at 192.0.2.7 for the other ranks: Cannot assign requested address" in done.stderr
    )
    assert "set --liveness-network to an interface or network of this host" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("what", "found", "cure"),
    [
        ("crowd", "Too many open files", "raise the limit of open files (ulimit -n)"),
        ("ports", "Address already in use", "free some of this host's ports"),
    ],
)
def test_nothing_to_listen_with_is_no_traceback(mpirun: Mpirun, what: str, found: str, cure: str) -> None:
    done = mpirun(2, PROGRAM, what, "9", before=in_namespaces("true"))
    assert done.returncode == 64, done.stderr
    assert f"refused: rank 0 can't listen at 127.0.0.1 for the other ranks: {found}" in done.stderr
    assert cure in done.stderr
    assert "Traceback" not in done.stderr
