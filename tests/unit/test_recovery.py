# SPDX-License-Identifier: Apache-2.0
"""What follows a worker's failure: the rules, case by case."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.deploy.recovery import (
    LONGEST_PAUSE_SECONDS,
    SETTLED_SECONDS,
    Action,
    Degrade,
    FailureEvent,
    MoveToSpare,
    NodeHealth,
    RestartInPlace,
    Situation,
    Stop,
    decide,
    restarts_in_window,
)

HOUR = 3600.0
DIED = FailureEvent(
    "decode-0", 0.0, 137, "serve", "disconnect: was killed by signal #", "n3", served=600.0, error="was killed"
)
LOST = (NodeHealth("n3", "Slurm says down"), NodeHealth("n4"))
WELL = (NodeHealth("n3"), NodeHealth("n4"))


def at(*times: float, **changes: object) -> tuple[FailureEvent, ...]:
    return tuple(replace(DIED, time=time, **changes) for time in times)  # type: ignore[arg-type] # of any field


def case(events: tuple[FailureEvent, ...] = (DIED,), **changes: object) -> Situation:
    first = Situation(("n3", "n4"), events, 3, WELL, ("n9",), "n1")
    return replace(first, **changes)  # type: ignore[arg-type] # of any field


CASES: dict[str, tuple[Situation, Action]] = {
    "the first failure on healthy nodes": (case(), RestartInPlace(0.0)),
    "nothing is known of the nodes": (case(health=()), RestartInPlace(0.0)),
    "without spares the host that is blamed twice is kept": (
        case(at(0, 100), spares=()),
        RestartInPlace(0.0),
    ),
    "a second failure soon after the first waits": (
        case(at(0, 10, served=1.0), spares=()),
        RestartInPlace(1.0),
    ),
    "a worker that has served for a while begins anew": (
        case((*at(0, 10, served=1.0), *at(90, served=SETTLED_SECONDS)), spares=()),
        RestartInPlace(0.0),
    ),
    "another worker's failures don't count": (
        case((*at(0, 10, worker="decode-1", host="n7"), *at(20))),
        RestartInPlace(0.0),
    ),
    "a node that is lost": (case(health=LOST), MoveToSpare((("n3", "n9"),), 0.0, {"n3": "Slurm says down"})),
    "a node that is lost though another one was blamed": (
        case(at(0, host="n4"), health=LOST),
        MoveToSpare((("n3", "n9"),), 0.0, {"n3": "Slurm says down"}),
    ),
    "a node that is lost where nothing else may be restarted": (
        case(health=LOST, max_restarts=0),
        MoveToSpare((("n3", "n9"),), 0.0, {"n3": "Slurm says down"}),
    ),
    "two lost nodes and one spare": (
        case(health=(NodeHealth("n3", "a"), NodeHealth("n4", "b")), others=("decode-1",)),
        Degrade("no spare node is left for n3, n4 of decode-0 (a)", {"n3": "a", "n4": "b"}),
    ),
    "no spare, and no other worker of the role": (
        case(health=LOST, spares=()),
        Stop(75, "no spare node is left for n3 of decode-0 (Slurm says down)", {"n3": "Slurm says down"}),
    ),
    "a lost node, and a spare whose files differ": (
        case(health=LOST, spares=(), last_choices=("n8",)),
        MoveToSpare((("n3", "n8"),), 0.0, {"n3": "Slurm says down"}),
    ),
    "… where another worker of the role serves": (
        case(health=LOST, spares=(), last_choices=("n8",), others=("decode-1",), unfit="; not fit"),
        Degrade("no spare node is left for n3 of decode-0 (Slurm says down); not fit", {"n3": "Slurm says down"}),
    ),
    "… and another one": (
        case(health=LOST, last_choices=("n8",)),
        MoveToSpare((("n3", "n9"),), 0.0, {"n3": "Slurm says down"}),
    ),
    "a healthy host that is blamed a second time, and a spare whose files differ": (
        case(at(0, 1000), spares=(), last_choices=("n8",)),
        RestartInPlace(0.0),
    ),
    "a mistake on a spare whose files differ": (
        case(at(0, code=65, is_mistake=True), doubts={"n4": "P2: e.yaml differs"}),
        Stop(75, "decode-0 can't start on n4: P2: e.yaml differs", {"n4": "P2: e.yaml differs"}),
    ),
    "a spare that is unhealthy itself is no problem of the worker": (
        case(health=(*WELL, NodeHealth("n9", "bad"))),
        RestartInPlace(0.0),
    ),
    "the head node with a sick GPU: its services run on": (
        case(health=(NodeHealth("n3", "GPU 3 has 2.0 GiB in use"), NodeHealth("n4")), head="n3"),
        MoveToSpare((("n3", "n9"),), 0.0, {"n3": "GPU 3 has 2.0 GiB in use"}),
    ),
    "… without a spare": (
        case(
            health=(NodeHealth("n3", "sick"), NodeHealth("n4")),
            head="n3",
            spares=(),
            others=("decode-1",),
            max_restarts=0,
        ),
        Degrade("no spare node is left for n3 of decode-0 (sick)", {"n3": "sick"}),
    ),
    "… without a spare, and no other worker of the role": (
        case(health=(NodeHealth("n3", "sick"), NodeHealth("n4")), head="n3", spares=()),
        Stop(75, "no spare node is left for n3 of decode-0 (sick)", {"n3": "sick"}),
    ),
    "the head node is lost": (
        case(health=(NodeHealth("n3", "Slurm says down", is_lost=True), NodeHealth("n4")), head="n3", spares=("n9",)),
        Stop(75, "the head node n3 is lost: Slurm says down", {"n3": "Slurm says down"}),
    ),
    "a healthy host that is blamed a second time": (
        case(at(0, 1000)),
        MoveToSpare(
            (("n3", "n9"),),
            0.0,
            {"n3": "2 failures within an hour began there; the last one: was killed"},
            is_forced=False,
        ),
    ),
    "… by another worker's failure": (
        case((*at(0, worker="decode-1"), *at(1000))),
        MoveToSpare(
            (("n3", "n9"),),
            0.0,
            {"n3": "2 failures within an hour began there; the last one: was killed"},
            is_forced=False,
        ),
    ),
    "… more than an hour later": (case(at(0, HOUR + 1)), RestartInPlace(0.0)),
    "… the head node can't be left out": (case(at(0, 1000), head="n3"), RestartInPlace(0.0)),
    "a node that an administrator drains": (
        case(health=(NodeHealth("n3"), NodeHealth("n4", drained="Slurm says drain"))),
        MoveToSpare((("n4", "n9"),), 0.0, {"n4": "Slurm says drain"}, is_forced=False),
    ),
    "… drained, without a spare": (
        case(health=(NodeHealth("n3"), NodeHealth("n4", drained="Slurm says drain")), spares=()),
        RestartInPlace(0.0),
    ),
    "a mistake": (case(at(0, code=64, is_mistake=True), health=LOST), Stop(64)),
    "more than the limit in an hour": (case(at(0, 600, 1200, 1800)), Stop(137)),
    "as many over more than an hour": (case(at(0, 600, 1200, HOUR + 1), spares=()), RestartInPlace(0.0)),
    "no restarts at all": (case(max_restarts=0), Stop(137)),
    "the same end three times": (
        case(at(0, 10, 20, code=70, phase="load", served=0.0)),
        Stop(70, "decode-0 ended 3 times in load with the same cause"),
    ),
    "… a temporary one, which a requeue would repeat": (
        case(at(0, 10, 20, code=75, phase="load", served=0.0)),
        Stop(70, "decode-0 ended 3 times in load with the same cause"),
    ),
    "three ends that differ": (
        case((*at(0, 10, phase="load", served=0.0), *at(20, phase="warmup", served=0.0)), spares=()),
        RestartInPlace(2.0),
    ),
    "the same end three times, but it has served": (case(at(0, 100, 200), spares=()), RestartInPlace(0.0)),
    "lost nodes are no crash loop, nor do they count": (
        case((*at(0, 10, 20, 30, phase="load", served=0.0, is_moved=True), *at(40, served=0.0)), health=LOST),
        MoveToSpare((("n3", "n9"),), 0.0, {"n3": "Slurm says down"}),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_decision(name: str) -> None:
    situation, expected = CASES[name]
    assert decide(situation) == expected


def test_the_pause_doubles_up_to_a_minute() -> None:
    pauses = []
    for count in range(1, 10):
        events = tuple(replace(DIED, time=float(t), served=0.0, cause=f"{t}", host="") for t in range(count))
        action = decide(case(events, max_restarts=99))
        assert isinstance(action, RestartInPlace)
        pauses.append(action.seconds)
    assert pauses == [0, 1, 2, 4, 8, 16, 32, LONGEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS]


_EVENTS = st.builds(
    FailureEvent,
    worker=st.sampled_from(["decode-0", "decode-1"]),
    time=st.floats(0, 4 * HOUR),
    code=st.sampled_from([70, 75, 137]),
    phase=st.sampled_from(["load", "serve"]),
    cause=st.sampled_from(["a", "b"]),
    host=st.sampled_from(["n1", "n3", "n4", ""]),
    served=st.sampled_from([0.0, 600.0]),
    is_moved=st.booleans(),
)


@given(
    st.lists(_EVENTS, min_size=1, max_size=12),
    st.lists(st.sampled_from(["n3", "n4"]), unique=True),
    st.lists(st.sampled_from(["n8", "n9"]), unique=True),
    st.integers(0, 3),
)
def test_whatever_happens_no_lost_node_is_used_and_only_spares_replace(
    events: list[FailureEvent], lost: list[str], spares: list[str], most: int
) -> None:
    ordered = tuple(sorted(events, key=lambda event: event.time))
    health = tuple(NodeHealth(node, "lost" if node in lost else "") for node in ("n3", "n4"))
    action = decide(Situation(("n3", "n4"), ordered, most, health, tuple(spares), "n1"))
    if isinstance(action, RestartInPlace):
        assert not lost
        assert restarts_in_window(ordered, ordered[-1].worker) <= most
    if isinstance(action, MoveToSpare):
        assert set(lost) <= {node for node, _ in action.moves}
        assert len({spare for _, spare in action.moves} & set(spares)) == len(action.moves)
        assert {node for node, _ in action.moves} == action.reasons.keys()
    if isinstance(action, Stop) and lost:
        assert (action.code, len(lost) > len(spares)) == (75, True)
