# SPDX-License-Identifier: Apache-2.0
"""Which rank and which host are blamed, by what ranks, node agents and launchers leave."""

from __future__ import annotations

import pytest

from dynamo_mpi.common.failure import DetectedBy
from dynamo_mpi.deploy.blame import Blame, Evidence, RankReport, blame
from dynamo_mpi.deploy.first_death import Death, first_death

NODES = ("n3", "n4")
DISCONNECT, REPORT, LOST, SILENT = (
    DetectedBy.DISCONNECT,
    DetectedBy.REPORT,
    DetectedBy.HOST_UNREACHABLE,
    DetectedBy.HEARTBEAT,
)
DIED = "died: its process exited without reporting an error"


def report(rank: int, host: str, cause: DetectedBy, error: str, time: float = 1.0, **more: object) -> RankReport:
    values = {"phase": "serve", "code": 70, **more}
    return RankReport(rank, host, str(values.pop("phase")), cause, values.pop("code"), error, time, **values)  # type: ignore[arg-type]


KILLED = Death((1,), "n4", signal=9)
COMPOSED = report(1, "n4", DISCONNECT, DIED, is_composed=True, text="rank 1 on n4 died")
PEER = report(0, "n3", REPORT, "EngineError: Connection reset by peer", 0.9)

CASES: dict[str, tuple[Evidence, tuple[int, str, tuple[str, ...]]]] = {
    "the report of the whole worker": (Evidence(70, NODES, (COMPOSED,)), (1, "n4", ())),
    "a rank that only lost its peer wrote first": (Evidence(70, NODES, (PEER, COMPOSED)), (1, "n4", ())),
    "without a composed report the peer's loss isn't the cause": (
        Evidence(70, NODES, (PEER, report(1, "n4", DISCONNECT, DIED))),
        (1, "n4", ()),
    ),
    "the launcher alone": (Evidence(143, NODES, (), KILLED), (1, "n4", ())),
    "a launcher that was already ending the ranks blames no host": (
        Evidence(143, NODES, (), KILLED._replace(is_sure=False)),
        (1, "", ()),
    ),
    "nothing": (Evidence(14, NODES), (-1, "", ())),
    "a host that doesn't answer": (
        Evidence(75, NODES, (report(1, "n4", LOST, "is lost: its host doesn't answer", is_composed=True),)),
        (1, "n4", ("n4",)),
    ),
    "each half calls the other lost": (
        Evidence(
            75,
            NODES,
            (
                report(1, "n4", LOST, "is lost", 1.0, is_composed=True),
                report(0, "n3", LOST, "is lost", 1.2, is_composed=True),
            ),
        ),
        (1, "n4", ("n4", "n3")),
    ),
    "… and the clock of the one that is cut off is behind": (
        Evidence(
            75,
            NODES,
            (
                report(1, "n4", LOST, "is lost", 1.2, is_composed=True),
                report(0, "n3", LOST, "is lost", 1.0, is_composed=True),
            ),
        ),
        (1, "n4", ("n4", "n3")),
    ),
    "rank 0's host is lost, and another rank was asked to stop": (
        Evidence(
            75,
            NODES,
            (
                report(1, "n4", DetectedBy.SIGNAL, "stopped by SIGTERM", 0.9, is_composed=True),
                report(0, "n3", LOST, "is lost", 1.0, is_composed=True),
            ),
        ),
        (0, "n3", ("n3",)),
    ),
    "the launcher knows which node is lost": (
        Evidence(75, NODES, (report(0, "n3", LOST, "is lost", is_composed=True),), None, "", ("n4",)),
        (-1, "n4", ("n4",)),
    ),
    "a host by its long name": (
        Evidence(70, NODES, (report(1, "n4.cluster.example", DISCONNECT, DIED, is_composed=True),)),
        (1, "n4", ()),
    ),
    "a hostfile's entry with a user": (
        Evidence(70, ("me@n3", "me@n4"), (report(1, "n4", DISCONNECT, DIED, is_composed=True),)),
        (1, "me@n4", ()),
    ),
    "hosts of a hostfile by their addresses": (
        Evidence(
            70,
            ("10.0.0.3", "10.0.0.4"),
            (report(3, "gpu-b", DISCONNECT, DIED, is_composed=True),),
            ranks_per_node=2,
        ),
        (3, "10.0.0.4", ()),
    ),
    "a rank that there isn't": (
        Evidence(70, NODES, (report(9, "elsewhere", DISCONNECT, DIED, is_composed=True),), ranks_per_node=2),
        (9, "", ()),
    ),
    "the hardware check, which rank 0 reports, names the node": (
        Evidence(
            64,
            NODES,
            (
                report(
                    0,
                    "n3",
                    REPORT,
                    "1 error",
                    phase="hardware_check",
                    code=64,
                    is_composed=True,
                    text="V2: the weights don't fit\n  found: rank 1 on n4, GPU 0: 1.0 GiB free; fix: not n44",
                ),
            ),
        ),
        (0, "n4", ("n4",)),
    ),
    "a signal to rank 0 follows from something else": (
        Evidence(
            143,
            NODES,
            (report(0, "n3", DetectedBy.SIGNAL, "stopped by SIGTERM", 1.0), report(1, "n4", DISCONNECT, DIED, 1.1)),
        ),
        (1, "n4", ()),
    ),
    "srun's words of a lost node": (
        Evidence(1, NODES, (), first_death("srun: error: Node failure on n4\n")),
        (-1, "n4", ("n4",)),
    ),
}


@pytest.mark.parametrize(
    ("code", "words", "expected"),
    [
        (143, "srun: error: Node failure on n4\n", 75),
        (64, "srun: error: Node failure on n4\n", 64),
        (143, "srun: error: n4: task 1: Terminated\n", 143),
    ],
)
def test_a_lost_node_without_a_report_is_temporary(code: int, words: str, expected: int) -> None:
    assert blame(Evidence(code, NODES, (), first_death(words))).code == expected


@pytest.mark.parametrize("name", CASES)
def test_the_right_one_is_blamed(name: str) -> None:
    evidence, (rank, host, suspects) = CASES[name]
    found = blame(evidence)
    assert (found.rank, found.host, found.suspects) == (rank, host, suspects)
    assert not found.is_mistake


@pytest.mark.parametrize(
    ("code", "reports", "is_mistake"),
    [
        (64, (), True),
        (78, (report(0, "n3", REPORT, "error B1", phase="preflight", code=78, is_composed=True),), True),
        # the launcher's code is another one
        (143, (report(0, "n3", REPORT, "no such file", phase="load", code=66, is_composed=True),), True),
        (64, (report(0, "n3", REPORT, "V2", phase="hardware_check", code=64, is_composed=True),), False),
        (70, (COMPOSED,), False),
    ],
)
def test_mistakes(code: int, reports: tuple[RankReport, ...], is_mistake: bool) -> None:
    assert blame(Evidence(code, NODES, reports)).is_mistake == is_mistake


def test_the_same_cause_on_another_host_at_another_time_is_the_same() -> None:
    first, second = (
        blame(Evidence(70, nodes, (report(rank, host, REPORT, text, phase="load", is_composed=True),)))
        for nodes, rank, host, text in (
            (("n3", "n4"), 1, "n4", "RuntimeError: CUDA error 719 on n4, pid 4711, at 0x7f12"),
            (("n3", "n12"), 0, "n12", "RuntimeError: CUDA error 719 on n12, pid 23, at 0x7aaa"),
        )
    )
    assert first.cause == second.cause == "report: RuntimeError: CUDA error # on HOST, pid #, at #"
    other = blame(Evidence(70, NODES, (report(1, "n4", REPORT, "MemoryError", phase="load", is_composed=True),)))
    assert other.cause != first.cause


def test_what_the_launcher_saw_of_a_death_is_its_cause() -> None:
    found = blame(Evidence(70, NODES, (COMPOSED,), KILLED))
    assert found.error == "was killed by signal 9 (SIGKILL)"
    assert str(found) == "rank 1 on n4 in serve: was killed by signal 9 (SIGKILL)"
    assert str(Blame(75)) == "a rank"


@pytest.mark.parametrize(
    ("evidence", "is_killed"),
    [
        (Evidence(70, NODES, (COMPOSED,), KILLED, is_reported=True), True),
        # the launcher has composed the report itself: the node's agent may be gone with the node
        (Evidence(70, NODES, (COMPOSED,), KILLED), False),
        (Evidence(70, NODES, (report(1, "n4", DISCONNECT, DIED),), KILLED, is_reported=True), False),
        # a sick GPU makes ranks crash
        (Evidence(70, NODES, (COMPOSED,), KILLED._replace(signal=11), is_reported=True), False),
        (Evidence(70, NODES, (COMPOSED,), KILLED._replace(is_sure=False), is_reported=True), False),
        (Evidence(70, NODES, (COMPOSED,), KILLED._replace(ranks=(0,)), is_reported=True), False),
        (Evidence(70, NODES, (COMPOSED, report(0, "n3", LOST, "is lost")), KILLED, is_reported=True), False),
        (Evidence(75, NODES, (COMPOSED,), KILLED, "", ("n4",), is_reported=True), False),
    ],
)
def test_whether_a_rank_was_killed_while_all_hosts_answered(evidence: Evidence, is_killed: bool) -> None:
    assert blame(evidence).is_killed == is_killed


def test_a_failure_file_is_read() -> None:
    content = {
        "rank": 1,
        "host": "n4",
        "phase": "load",
        "cause": "heartbeat",
        "exit_code": 124,
        "error": "is stuck\n  fix: look",
        "time": 7,
        "report": "rank 1 on n4 is stuck",
        "unknown": [],
    }
    assert RankReport.of(content) == RankReport(
        1, "n4", "load", SILENT, 124, "is stuck", 7.0, True, "rank 1 on n4 is stuck"
    )
    with pytest.raises(KeyError):
        RankReport.of({})
