# SPDX-License-Identifier: Apache-2.0
"""The fabric check without a fabric: its steps, its messages, what becomes of ranks' words, who is blamed, and the rules."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import time
from collections.abc import Callable, Iterator
from ctypes import c_uint64, c_void_p
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.checks.fabric import judge_fabric, least_rate
from dynamo_mpi.checks.fabric_steps import (
    ALL_REDUCE,
    ALL_TO_ALL,
    EXCHANGE,
    FAILED,
    FAR,
    LATE,
    NEAR,
    OK,
    STAGES,
    FabricAnswer,
    Measured,
    Segments,
    Step,
    Timing,
    bus_share,
    gather_up,
    segments,
    steps_of,
)
from dynamo_mpi.checks.hang_diagnosis import START, WaitState, find_blocking_ranks, read_note
from dynamo_mpi.checks.hardware import NODE, EvaluationInput, HardwareCheckPlan
from dynamo_mpi.checks.nccl_child import _agree
from dynamo_mpi.checks.nccl_fabric import (
    CheckProcess,
    EndedError,
    LateError,
    has_cards,
    has_input,
    measure_over_nccl,
    read_results,
)
from dynamo_mpi.checks.nccl_library import Cuda
from dynamo_mpi.common.fabric_payload import expected, expected_sum, outgoing
from dynamo_mpi.layout.finding import Severity

GB = 1e9


class Place(NamedTuple):
    host: str


def plan(nodes: int, per_node: int, over: str = "nccl", tp: int = 0, pp: int = 1) -> HardwareCheckPlan:
    """Return the plan of a world whose stages are made of neighbouring ranks."""
    size = nodes * per_node
    by_node = tuple(tuple(range(node * per_node, (node + 1) * per_node)) for node in range(nodes))
    stage = tp or size // pp
    kinds = [(NODE, by_node)]
    if stage > 1:
        kinds.append(("tp", tuple(tuple(range(at, at + stage)) for at in range(0, size, stage))))
    if pp > 1:
        kinds.append(("pp", tuple(tuple(range(at, size, stage)) for at in range(stage))))
    return HardwareCheckPlan(("fabric",), 5.0, over, tuple(kinds))


def places(some: HardwareCheckPlan) -> list[Place]:
    return [Place(f"n{node + 1}") for node, ranks in enumerate(some.of_kind(NODE)) for _ in ranks]


def test_a_plan_travels_as_text() -> None:
    for some in (plan(2, 4, pp=2), plan(1, 1), HardwareCheckPlan(("gpu",), 0.5)):
        assert HardwareCheckPlan.unpack(some.pack()) == some


@given(st.integers(1, 5), st.integers(1, 6))
def test_every_pair_comes_once_and_no_rank_is_in_two_at_a_time(nodes: int, per_node: int) -> None:
    some = plan(nodes, per_node)
    steps = [step for step in steps_of(some) if step.operation == EXCHANGE]
    pairs = [frozenset(group) for step in steps for group in step.groups]
    assert len(pairs) == len(set(pairs))
    for step in steps:
        ranks = [rank for group in step.groups for rank in group]
        assert len(ranks) == len(set(ranks))
    hosts = [place.host for place in places(some)]
    for kind, same in ((NEAR, True), (FAR, False)):
        of_kind = [pair for step in steps if step.kind == kind for pair in step.groups]
        assert all((hosts[one] == hosts[other]) is same for one, other in of_kind)
    met = {rank for pair in pairs for rank in pair}
    assert met == (set(range(nodes * per_node)) if nodes * per_node > 1 else set())
    # O(1): a ring takes three rounds at the most
    assert len(steps) <= 6


def test_stages_that_meet_nowhere_else_are_pairs_too() -> None:
    some = plan(1, 4, tp=2, pp=2)
    steps = steps_of(some)
    assert [(step.operation, step.kind) for step in steps] == [
        (EXCHANGE, NEAR),
        (EXCHANGE, NEAR),
        (EXCHANGE, STAGES),
        (ALL_REDUCE, "tp"),
        (ALL_TO_ALL, "tp"),
    ]
    assert steps[2].groups == ((0, 2), (1, 3))
    assert [step.number for step in steps] == [0, 1, 2, 3, 4]


def test_experts_take_the_all_to_all() -> None:
    some = plan(1, 4)
    steps = steps_of(some._replace(groups=(*some.groups, ("moe_ep", ((0, 1), (2, 3))))))
    assert [(step.operation, step.kind, step.groups) for step in steps[-2:]] == [
        (ALL_REDUCE, "tp", ((0, 1, 2, 3),)),
        (ALL_TO_ALL, "moe_ep", ((0, 1), (2, 3))),
    ]


@given(st.integers(0, 600), st.integers(0, 600), st.integers(1, 300))
def test_a_message_is_distinguished_from_every_other_and_from_itself_shifted(
    source: int, target: int, words: int
) -> None:
    size = 4 * (words + 61)
    message = outgoing(source, target, size)
    assert message == expected(source, target, size)
    assert len(message) == size
    assert message != expected(source + 1, target, size)
    assert message != expected(source, target + 1, size)
    assert message[4:] != message[:-4]


def test_a_sum_is_the_sum() -> None:
    parts = [memoryview(expected(rank, 0, 400)).cast("i") for rank in (0, 3, 5)]
    assert list(memoryview(expected_sum((0, 3, 5), 0, 400)).cast("i")) == [
        sum(words) for words in zip(*parts, strict=True)
    ]


def test_an_answer_travels_as_texts() -> None:
    timings = (Timing(0, 4096, 1.5e-05), Timing(3, 1 << 20, 0.25, (1, 7), 812, 3))
    for answer in (
        FabricAnswer(OK, "", "NCCL 2.28.9", "IB", ("P2P/CUMEM", "NET/IB"), True, 1.25, timings),
        FabricAnswer(LATE, "a, b"),
    ):
        assert FabricAnswer.unpack(answer.pack()) == answer


def test_rates_are_counted_as_nccl_tests_does() -> None:
    assert bus_share(ALL_REDUCE, 8) == pytest.approx(2 * 7 / 8)
    assert bus_share(ALL_TO_ALL, 8) == pytest.approx(7 / 8)
    assert bus_share(EXCHANGE, 2) == 1
    step = Step(0, ALL_REDUCE, "tp", ((0, 1),), (1 << 26,))
    # 64 MiB in 252 us on two H200s: NCCL's own figure there was 267 GB/s
    assert Measured(step, (0, 1), 1 << 26, 252e-6).rate == pytest.approx(266.3 * GB, rel=0.001)


def test_a_group_is_as_slow_as_its_slowest_and_a_rank_that_did_not_come_through_takes_it_along() -> None:
    steps = (Step(0, EXCHANGE, NEAR, ((0, 1), (2, 3)), (8,)),)
    answers = [
        FabricAnswer(OK, timings=(Timing(0, 8, seconds, (), 9, 2 * at),)) for at, seconds in enumerate((0.1, 0.3, 0.2))
    ]
    (one,) = gather_up(steps, [*answers, FabricAnswer(LATE)])
    assert (one.group, one.seconds, one.sent, one.resent) == ((0, 1), 0.3, 9, 2)


# who is blamed

STEPS = steps_of(plan(4, 1))
HOSTS = ["n1", "n2", "n3", "n4"]


def named(ranks: object) -> str:
    return f"R{list(ranks)}"  # type: ignore[call-overload] # ranks are a sequence


def test_a_note_can_be_read_where_it_stands_in_a_stack() -> None:
    notes = (
        WaitState(3, 4096, (1, 2)),
        WaitState(START, 0, (0,)),
        WaitState(4, 8, (1,), 7, 2500.0),
        WaitState(4, 8, (1, 2), None, 0.0, 3, ()),
        WaitState(4, 8, (1, 2, 3), 2, 2500.0, 12, (2, 3)),
    )
    for note in notes:
        assert read_note(f"{note}\nfile.py:3 in wait") == note
    assert read_note("file.py:3 in wait") is None


def test_ranks_that_wait_for_others_are_not_where_it_began() -> None:
    # 1 and 2 are stuck in the second step; 0 and 3 are through with it, and wait in the third
    notes = {
        0: WaitState(2, 4096, (1, 2, 3)),
        1: WaitState(1, 4096, (2,)),
        2: WaitState(1, 4096, (1,)),
        3: WaitState(2, 4096, (0, 1, 2)),
    }
    found = find_blocking_ranks(notes, [], STEPS, HOSTS, 5, named)
    assert (found.rule, found.severity) == ("N2", Severity.ERROR)
    assert found.message == "the check hangs: a message of 4096 bytes does not arrive between R[1] and R[2]"
    assert "look at the network of n2, n3 " in found.fix


def test_a_rank_that_does_not_answer_comes_first() -> None:
    notes = {0: WaitState(1, 4096, (3,)), 1: WaitState(2, 8, (0, 2, 3)), 2: None}
    found = find_blocking_ranks(notes, [3], STEPS, HOSTS, 5, named)
    assert found.message == "the check hangs: R[3] does not answer; R[0, 1] wait for that"
    assert "n4" in found.fix


def test_what_several_pairs_have_in_common_is_named() -> None:
    notes = {0: WaitState(0, 4096, (1,)), 1: WaitState(0, 4096, (0, 2)), 2: WaitState(0, 4096, (1,))}
    found = find_blocking_ranks(notes, [], STEPS, HOSTS, 5, named)
    assert found.message.endswith("between R[0] and R[1]; R[1] and R[2]; what they have in common is n2")


def test_a_collective_that_is_late_names_the_pairs_that_were_slow() -> None:
    notes = {
        0: WaitState(2, 8, (1, 2, 3), 1, 1e9),
        1: WaitState(2, 8, (0, 2, 3), 2, 1e6),
        2: WaitState(2, 8, (0, 1, 3), 1, 1.1e6),
        3: WaitState(2, 8, (0, 1, 2), 0, 8e8),
    }
    assert STEPS[2].operation == ALL_REDUCE
    found = find_blocking_ranks(notes, [], STEPS, HOSTS, 5, named)
    assert found.message == (
        "the check hangs in an all-reduce of 8 bytes over R[0, 1, 2, 3]; before that, the slowest were R[1] and R[2], by a factor of 1000"
    )


def test_a_collective_that_is_late_names_the_pairs_that_do_not_hear_each_other() -> None:
    # 1 and 2 are cut off from each other; 4 has not waited for long enough to call; 3 is already in the next wait, and misses those behind
    notes = {
        0: WaitState(2, 8, (1, 2, 3, 4), 1, 1e9, 5, (4,)),
        1: WaitState(2, 8, (0, 2, 3, 4), 0, 1e3, 5, (2, 4)),
        2: WaitState(2, 8, (0, 1, 3, 4), None, 0.0, 5, (1, 4)),
        3: WaitState(2, 8, (0, 1, 2, 4), None, 0.0, 6, (0, 1, 2, 4)),
        4: WaitState(2, 8, (0, 1, 2, 3)),
    }
    found = find_blocking_ranks(notes, [], STEPS, [*HOSTS, "n5"], 5, named)
    assert found.message == (
        "the check hangs in an all-reduce of 8 bytes over R[0, 1, 2, 3, 4]: no message arrives between R[1] and R[2]"
    )
    assert "look at the network of n2, n3 " in found.fix


def test_a_collective_over_a_node_that_is_cut_off_names_the_node() -> None:
    notes = {rank: WaitState(2, 8, (), None, 0.0, 5, (2,)) for rank in (0, 1, 3)}
    notes = {rank: note._replace(waits=tuple({0, 1, 2, 3} - {rank})) for rank, note in notes.items()}
    notes[2] = WaitState(2, 8, (0, 1, 3), None, 0.0, 5, (0, 1, 3))
    found = find_blocking_ranks(notes, [], STEPS, HOSTS, 5, named)
    assert found.message.endswith("between R[0] and R[2]; R[1] and R[2]; R[2] and R[3]; what they have in common is n3")
    assert "look at the network of n3 " in found.fix


def test_what_comes_before_a_collective_is_reported_as_such() -> None:
    notes = {rank: WaitState(2, 0, tuple({0, 1, 2, 3} - {rank})) for rank in range(4)}
    assert (
        find_blocking_ranks(notes, [], STEPS, HOSTS, 5, named).message
        == "the check hangs before an all-reduce over R[0, 1, 2, 3]"
    )


def test_nccl_that_does_not_start_is_reported_as_such() -> None:
    found = find_blocking_ranks(
        {0: WaitState(START, 0, (1,)), 1: WaitState(START, 0, (0,))}, [], STEPS, HOSTS, 5, named
    )
    assert "while NCCL's ranks connect: R[0, 1]" in found.message
    assert "no rank reports what it waits for" in find_blocking_ranks({0: None}, [], STEPS, HOSTS, 5, named).message


# the rules


def world(
    some: HardwareCheckPlan, rates: dict[frozenset[str], float], usual: float = 40 * GB, **changes: object
) -> list[FabricAnswer]:
    """Return what ranks would report of a world whose nodes reach each other at ``usual`` bytes a second, and as ``rates`` says otherwise."""
    hosts = [place.host for place in places(some)]
    answers = []
    for rank in range(len(hosts)):
        timings = []
        for step in steps_of(some):
            group = step.group_of(rank)
            ends = frozenset(hosts[other] for other in group)
            worst = min([rate for pair, rate in rates.items() if pair <= ends] or [usual])
            timings += [
                Timing(step.number, size, size * bus_share(step.operation, len(group)) / worst + 1e-5)
                for size in (step.sizes if group else ())
            ]
        answers.append(FabricAnswer(OK, timings=tuple(timings))._replace(**changes))  # type: ignore[arg-type] # fields of it
    return answers


def findings(
    some: HardwareCheckPlan, answers: list[FabricAnswer], kind: str | None = None, **gpu: object
) -> list[tuple[str, str]]:
    case = EvaluationInput(some, places(some), kind, earlier={"gpu": gpu} if gpu else {})
    return [(found.rule, found.message) for found in judge_fabric(answers, case).findings]


def test_a_world_that_is_alike_is_no_finding() -> None:
    for some in (plan(1, 8), plan(2, 8), plan(4, 1), plan(3, 2, "mpi")):
        assert findings(some, world(some, {})) == []


@pytest.mark.parametrize("nodes", [3, 4, 5, 8])
def test_a_node_that_is_slow_to_all_is_named(nodes: int) -> None:
    some = plan(nodes, 2)
    slow = {frozenset({"n2", f"n{other}"}): 5 * GB for other in range(1, nodes + 1) if other != 2}
    found = findings(some, world(some, slow))
    assert found[0] == ("N3", "node n2 is far slower to reach than others")
    assert all(rule == "N3" for rule, _ in found)


def test_one_way_that_is_slow_names_the_pair_and_not_a_node() -> None:
    some = plan(4, 1)
    (found,) = findings(some, world(some, {frozenset({"n2", "n3"}): 5 * GB}))
    assert found == ("N3", "the path between rank 1 on n2 and rank 2 on n3 is far slower than others")


def test_two_nodes_are_compared_with_nothing() -> None:
    some = plan(2, 1)
    assert findings(some, world(some, {}, usual=0.1 * GB)) == []


def test_over_mpi_what_is_fast_enough_is_not_slow() -> None:
    some = plan(4, 1, "mpi")
    assert findings(some, world(some, {frozenset({"n2", "n3"}): 0.2 * GB})) == []
    assert findings(some, world(some, {frozenset({"n2", "n3"}): 0.02 * GB}))[0][0] == "N3"


def test_a_group_that_is_slow_among_its_like_is_reported() -> None:
    some = plan(4, 2, tp=2)
    answers = world(some, {})
    step = next(step for step in steps_of(some) if step.operation == ALL_REDUCE)
    slow = tuple(
        one._replace(seconds=one.seconds * 5) if one.step == step.number else one for one in answers[5].timings
    )
    answers[5] = answers[5]._replace(timings=slow)
    assert findings(some, answers) == [("N4", "1 group of ranks is far slower than others")]


def test_wrong_data_are_an_error_and_name_who_sent_them() -> None:
    some = plan(1, 4)
    answers = world(some, {})
    for step in steps_of(some):
        for group in step.groups if step.operation == EXCHANGE else ():
            if 2 in group:
                (other,) = set(group) - {2}
                bad = tuple(
                    one._replace(wrong=(2,)) if one.step == step.number else one for one in answers[other].timings
                )
                answers[other] = answers[other]._replace(timings=bad)
    outcome = judge_fabric(answers, EvaluationInput(some, places(some)))
    (found,) = outcome.findings
    assert (found.rule, found.severity) == ("N1", Severity.ERROR)
    assert found.message == "data are wrong when they arrive: rank 2 on n1"
    assert "rank 1 on n1 got wrong data from rank 2 on n1, exchange of 64 KiB" in found.found


def test_a_wrong_sum_names_the_group() -> None:
    some = plan(1, 2)
    answers = world(some, {})
    step = next(step for step in steps_of(some) if step.operation == ALL_REDUCE)
    bad = tuple(one._replace(wrong=(0, 1)) if one.step == step.number else one for one in answers[0].timings)
    (found,) = judge_fabric(
        [answers[0]._replace(timings=bad), answers[1]], EvaluationInput(some, places(some))
    ).findings
    assert (found.rule, found.message) == ("N1", "data are wrong when they arrive")
    assert found.found.startswith("wrong results in an all-reduce of 64 KiB in tp over ranks 0-1 on n1")


def test_a_probe_that_was_ended_says_between_whom_unless_a_process_had_gone() -> None:
    some = plan(2, 1)
    late = [FabricAnswer(LATE, str(WaitState(0, 65536, (1,)))), FabricAnswer(LATE, str(WaitState(0, 65536, (0,))))]
    assert findings(some, late) == [
        ("N2", "the check hangs: a message of 65536 bytes does not arrive between rank 0 on n1 and rank 1 on n2")
    ]
    assert findings(some, [late[0], FabricAnswer(FAILED, "it has gone")]) == [
        ("N7", "the fabric could not be checked: rank 1 on n2")
    ]


def test_two_gpus_below_what_their_link_allows_are_reported_where_it_is_known() -> None:
    some = plan(1, 2)
    slow, fine = world(some, {}, usual=20 * GB), world(some, {}, usual=250 * GB)
    assert findings(some, slow) == []
    assert findings(some, slow, "h100") == []
    assert findings(some, fine, "h100", nvlinks_up=18, pcie_generation=5) == []
    (found,) = findings(some, slow, "h100", nvlinks_up=[17, 18], pcie_generation=5)
    assert found == ("N5", "1 pair of GPUs is slower than NVLink of h100 has to be")
    assert findings(some, slow, "h100", nvlinks_up=12, pcie_generation=5, bridged=True) == []
    assert findings(some, slow, "l40s", nvlinks_up=0, pcie_generation=4) == []
    assert least_rate("l40s", 0, 4) == (4 * GB, "PCI Express 4")
    assert least_rate("h100", None, 5) is None
    assert least_rate("l4", 4, None) is None


def test_sockets_beside_infiniband_are_reported_between_nodes_alone() -> None:
    for some, expected_rules in ((plan(2, 1), ["N6"]), (plan(1, 2), [])):
        measured = world(some, {}, network="Socket", cards=True)
        assert [rule for rule, _ in findings(some, measured)] == expected_rules
    some = plan(2, 1)
    assert findings(some, world(some, {}, network="IB", cards=True)) == []
    assert findings(some, world(some, {}, network="Socket", cards=False)) == []


def test_lost_packets_name_the_pair() -> None:
    some = plan(4, 1)
    answers = world(some, {}, network="Socket")
    lost = tuple(one._replace(sent=1000, resent=30) if one.step == 0 else one for one in answers[2].timings)
    answers[2] = answers[2]._replace(timings=lost)
    assert findings(some, answers) == [("N8", "packets are lost between rank 2 on n3 and rank 3 on n4")]
    # what the host's TCP loses otherwise is none of NCCL's
    over_verbs = [answer._replace(network="IB") for answer in answers]
    assert findings(some, over_verbs) == []
    one_node = plan(1, 4)
    within = [answer._replace(timings=own.timings) for answer, own in zip(answers, world(one_node, {}), strict=True)]
    within[2] = within[2]._replace(timings=tuple(one._replace(sent=1000, resent=30) for one in within[2].timings))
    assert findings(one_node, within) == []
    few = tuple(one._replace(resent=9) for one in lost)
    answers[2] = answers[2]._replace(timings=few)
    assert findings(some, answers) == []


def test_figures_are_few_whatever_the_size() -> None:
    some = plan(8, 8)
    figures = judge_fabric(world(some, {}), EvaluationInput(some, places(some))).figures
    assert list(figures["kinds"]) == ["exchange near", "exchange far", "all-reduce tp", "all-to-all tp"]
    assert figures["kinds"]["exchange far"]["gbps"] == [39.763, 39.763]
    assert len(str(figures)) < 1000


# the child's words


class Child:
    """Answers what the test sets, as `CheckProcess` does."""

    def __init__(self, *lines: str | Exception) -> None:
        self.lines = [*lines]

    def read_line(self, end: float) -> tuple[str, str]:
        line = self.lines.pop(0)
        if isinstance(line, Exception):
            raise line
        verb, _, rest = line.partition(" ")
        return verb, rest


def heard(*lines: str | Exception) -> FabricAnswer:
    return read_results(Child(*lines), "NCCL 2.28.9", 0.0, 1.0)  # type: ignore[arg-type] # as a child is heard


BEGUN = ("at -1 0 1", "at 0 65536 1", "took 0 65536 2.5e-05 10 0 ", "at 0 67108864 1")


def test_a_child_that_comes_through_is_believed() -> None:
    answer = heard(*BEGUN, "took 0 67108864 0.001 0 0 1", 'done {"network": "IB", "links": ["P2P/CUMEM"]}')
    assert (answer.state, answer.network, answer.links) == (OK, "IB", ("P2P/CUMEM",))
    assert answer.timings == (Timing(0, 65536, 2.5e-05, (), 10), Timing(0, 67108864, 0.001, (1,)))


def test_a_child_that_hangs_says_where() -> None:
    answer = heard(*BEGUN, LateError())
    assert answer.state == LATE
    assert read_note(answer.text) == WaitState(0, 67108864, (1,))
    assert len(answer.timings) == 1
    failed = heard(*BEGUN, EndedError("ncclSend: unhandled system error"))
    assert (failed.state, failed.text) == (FAILED, "ncclSend: unhandled system error")


def test_a_rank_that_cannot_fork_reports_it_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> NoReturn:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    class Alone:
        rank, size = 0, 1

        def gather(self, payload: bytes) -> list[bytes]:
            return [payload]

        def broadcast(self, payload: bytes) -> bytes:
            return payload

    monkeypatch.setattr("subprocess.Popen", start)
    plan = HardwareCheckPlan(("fabric",), 5.0, "nccl")
    answer = measure_over_nccl(Alone(), plan, {}, 0.0)  # type: ignore[arg-type] # what is needed of a world
    assert (answer.state, answer.text) == (
        FAILED,
        "its process can't be started: [Errno 11] Resource temporarily unavailable",
    )


def test_a_child_whose_end_takes_the_driver_long_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pipes are closed before what it holds of the GPU is given back."""
    monkeypatch.setattr("dynamo_mpi.checks.nccl_fabric._EXIT_SECONDS", 0.1)
    lingering = ("sh", "-c", "exec >&- 2>&-; exec sleep 30")
    monkeypatch.setattr("dynamo_mpi.common.subprocess.with_pdeathsig", lambda *_, **__: lingering)
    child = CheckProcess(0, 1, HardwareCheckPlan(("fabric",), 5.0, "nccl"), {"PATH": os.environ["PATH"]})
    try:
        with pytest.raises(EndedError, match="does not exit"):
            child.read_line(time.monotonic() + 10)
    finally:
        child.close()


def test_words_are_waited_for_whatever_the_number_of_the_file() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip("fewer files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    source, sink = os.pipe()
    try:
        high = fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, 1500)
        assert not has_input(high, time.monotonic())
        os.write(sink, b"x")
        assert has_input(high, time.monotonic() + 5)
        os.close(high)
    finally:
        os.close(source)
        os.close(sink)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Driver:
    """Notes what it is asked to do; all of it goes well."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*_: object) -> int:
            self.calls.append(name)
            return 0

        return call


class Mirror:
    """A GPU, its library and its driver, with peers that send what the test sets."""

    def __init__(self, sent_by_peer: int) -> None:
        self.sent_by_peer, self.stream, self.sent, self.got = sent_by_peer, c_void_p(), c_uint64(0), c_uint64(64)
        self.memory, self.host = bytearray(128), bytearray(64)
        self.cuda = self.nccl = self

    def write(self, address: c_uint64, data: bytes) -> None:
        self.memory[address.value : address.value + len(data)] = data

    def read(self, address: c_uint64, into: bytearray, size: int) -> None:
        into[:size] = self.memory[address.value : address.value + size]

    def wait(self, stream: c_void_p) -> None:
        pass

    def exchange(self, parts: Iterator[tuple[int, int, int, int]], comm: c_void_p, stream: c_void_p) -> None:
        for peer, sent, got, size in parts:
            assert size == 4
            mine = self.memory[sent : sent + 4]
            self.memory[got : got + 4] = mine if peer == 0 else self.sent_by_peer.to_bytes(4, "little")

    def minimum(self, sent: c_uint64, got: c_uint64, comm: c_void_p, stream: c_void_p) -> None:
        mine = int.from_bytes(self.memory[sent.value : sent.value + 4], "little")
        self.memory[got.value : got.value + 4] = min(mine, self.sent_by_peer).to_bytes(4, "little")


@pytest.mark.parametrize("operation", [EXCHANGE, ALL_REDUCE, ALL_TO_ALL])
@pytest.mark.parametrize(
    ("seconds", "peer", "times"),
    [(1e-4, 90, 5), (0.2, 1e9, 2), (0.9, 200_000, 2), (0.6, 600_000, 0), (1e5, 1 << 30, 0)],
)
def test_a_slow_way_is_measured_less_often_so_that_it_is_no_hang(
    operation: str, seconds: float, peer: float, times: int
) -> None:
    step, gpu = Step(0, operation, FAR, ((0, 1),), (8,)), Mirror(int(peer))
    agreed = _agree(gpu, step, (0, 1), 0, 1 << 26, c_void_p(), seconds)  # type: ignore[arg-type] # what is needed of a GPU
    assert agreed == times


def test_memory_is_as_it_was_made_before_a_stream_goes_on() -> None:
    """The driver's memset and copies from pageable memory return before they are done, and a stream of one's own doesn't wait for them."""
    cuda, driver = Cuda.__new__(Cuda), Driver()
    cuda._library = driver
    cuda.write(c_uint64(1), b"abcd")
    cuda.clear(c_uint64(1), 4)
    assert driver.calls == ["cuMemcpyHtoD_v2", "cuCtxSynchronize", "cuMemsetD8_v2", "cuCtxSynchronize"]


# what the host reports


def test_segments_are_read_by_their_names(tmp_path: Path) -> None:
    snmp = tmp_path / "snmp"
    snmp.write_text("Ip: Forwarding\nIp: 1\nTcp: ActiveOpens OutSegs RetransSegs\nTcp: 5 1200 7\n")
    assert segments(str(snmp)) == Segments(1200, 7)
    assert segments(str(snmp)).since(Segments(200, 2)) == Segments(1000, 5)
    assert segments(str(snmp.with_name("none"))) == Segments()
    assert segments().sent > 0


def test_cards_count_when_a_port_is_up(tmp_path: Path) -> None:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    assert not has_cards(str(tmp_path))
    (port / "state").write_text("1: DOWN\n")
    assert not has_cards(str(tmp_path))
    (port / "state").write_text("4: ACTIVE\n")
    assert has_cards(str(tmp_path))
