# SPDX-License-Identifier: Apache-2.0
"""Who is whose peer, and what the second worker sees."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_mpi.discovery.peer_compat import check_peer, describe_changes, incompatibility, peers_of, warnings
from dynamo_mpi.discovery.records import WorkerRecord
from dynamo_mpi.layout.contract import check_contracts
from dynamo_mpi.layout.finding import errors
from tests.unit.worlds import posted, world


def test_peers_are_the_other_roles_worlds_of_the_same_model_and_namespace() -> None:
    others = [world("decode"), world("decode", namespace="other"), world("decode", model="N"), world(), world("agg")]
    everybody = [posted(record, 9 - came) for came, record in enumerate([*others, world("decode", pid=1)])]
    assert [peer.record.pid for peer in peers_of(world(), everybody)] == [1, 4711]
    assert [peer.record.role for peer in peers_of(world("decode"), everybody)] == ["prefill"]
    for role in ("agg", "encode"):
        assert peers_of(world(role), everybody) == []


@pytest.mark.parametrize(
    ("prefill", "decode", "rule"),
    [
        ({"kv_dtype": "fp8"}, {"kv_dtype": "bfloat16"}, "I1"),
        ({"tokens_per_block": 32}, {"tokens_per_block": 64}, "I1"),
        ({"backend": "UCX"}, {"backend": "NIXL"}, "I6"),
        ({"runtime": "CPP"}, {"runtime": "PYTHON"}, "I7"),
        ({"cp_size": 2}, {"cp_size": 2}, "I4"),
        ({"num_layers": 32}, {"num_layers": 40}, "I1"),
    ],
)
def test_a_second_worker_sees_both_values_in_either_order(
    prefill: dict[str, Any], decode: dict[str, Any], rule: str
) -> None:
    sides = world("prefill", prefill), world("decode", decode)
    for own, other in (sides, sides[::-1]):
        text = incompatibility(own, [posted(other, 5)], 30)
        assert f"error {rule}:" in text
        (name,) = prefill
        assert f"prefill {'cp_size ' * (name == 'cp_size')}{prefill[name]}, decode " in text
        assert f"{decode[name]}\n" in text
        assert f"{other.role} worker on {other.role}1, {other.role}2 (job 12.0)" in text
        for word in ("expected:", "fix:", "after 30 s", "--no-peer-check"):
            assert word in text


def test_the_rules_are_those_of_a_pair() -> None:
    prefill, decode = world("prefill", {"kv_dtype": "x", "max_seq_len": 9}), world("decode", {"max_seq_len": 8})
    assert prefill.contract is not None
    assert decode.contract is not None
    expected = check_contracts(prefill.contract, decode.contract)
    assert {finding.rule for finding in expected} == {"I1", "I8"}
    assert check_peer(prefill, decode) == check_peer(decode, prefill) == expected


def test_two_engines_make_no_pair() -> None:
    text = incompatibility(world("decode", engine="reference"), [posted(world(), 1)], 30)
    assert "error P5:" in text
    assert "prefill trtllm, decode reference" in text


def test_a_peer_that_fits_refuses_nothing_and_what_is_only_advice_is_said() -> None:
    long, short = world("prefill", {"max_seq_len": 9000}), world("decode", {"max_seq_len": 8000})
    assert incompatibility(short, [posted(long, 1)], 30) == ""
    (message,) = warnings(short, [posted(long, 1)])
    assert message.startswith("fits the prefill worker on prefill1, prefill2 (job 12.0)")
    assert "warning I8" in message
    assert "prefill 9000, decode 8000" in message
    assert warnings(short, [posted(world(), 1)])[0].endswith("phase preflight")


def test_every_peer_that_does_not_fit_is_named() -> None:
    wrong = [posted(world("decode", {"kv_dtype": f"k{number}"}, job=str(number)), number) for number in (1, 2)]
    text = incompatibility(world(), [*wrong, posted(world("decode", job="3"), 3)], 30)
    assert "(job 1.0)" in text
    assert "(job 2.0)" in text
    assert "(job 3.0)" not in text


def test_a_worker_is_named_by_its_job_or_its_process_and_a_few_of_its_hosts() -> None:
    assert world(hosts=("n1",)).place == "prefill worker on n1 (job 12.0)"
    assert world(hosts=("n1",), job=None).place == "prefill worker on n1 (pid 4711)"
    assert world(step=None, hosts=tuple(f"n{i}" for i in range(9))).place == "prefill worker on n0, n1, …, n8 (job 12)"


BAD = {"kv_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ([], [], []),
        ([], [world("decode")], ["has appeared"]),
        ([], [world("decode", BAD)], ["has appeared, and does not fit: I1", "prefill fp8, decode bfloat16"]),
        ([world("decode")], [], ["has disappeared"]),
        ([world("decode")], [world("decode", phase="serve")], []),
        ([world("decode")], [world("decode", {"tp_size": 4})], ["has changed"]),
        ([world("decode")], [world("decode", BAD)], ["has changed, and does not fit: I1"]),
        ([world("decode")], [world("decode", hosts=("n9",))], ["on n9 (job 12.0) has changed"]),
        ([world("decode")], [world("decode", engine="reference")], ["does not fit: P5"]),
    ],
)
def test_one_line_says_what_has_become_of_a_peer(
    before: list[WorkerRecord], now: list[WorkerRecord], words: list[str]
) -> None:
    lines = describe_changes(world(), [posted(peer, 7) for peer in before], [posted(peer, 7) for peer in now])
    assert len(lines) == bool(words)
    for word in words:
        assert word in lines[0]
        assert "decode worker on " in lines[0]
        assert "\n" not in lines[0]


def test_a_peer_that_came_back_is_another_one() -> None:
    lines = describe_changes(world(), [posted(world("decode", job="1"), 1)], [posted(world("decode", job="2"), 2)])
    assert [("(job 2.0) has appeared" in line, "(job 1.0) has disappeared" in line) for line in lines] == [
        (True, False),
        (False, True),
    ]


def test_fitting_workers_have_no_errors() -> None:
    assert errors(check_peer(world(), world("decode"))) == []
