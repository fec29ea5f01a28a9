# SPDX-License-Identifier: Apache-2.0
"""Rules over all ranks' reports."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.checks.rank_report import RankReport
from dynamo_mpi.checks.rank_rules import check_ranks
from dynamo_mpi.mpi.placement import describe_ranks, hosts

COMMAND = "command line: is `a`, on rank 0 `b`"
CONFIG = "engine config: /e.yaml differs, first at line 1: `a: 1`, on rank 0 `a: 2`"


def card(host: str = "n1", *problems: str, version: str = "1.0") -> RankReport:
    return RankReport(host, "", version, problems)


def rules_of(*cards: RankReport) -> list[str]:
    return [finding.rule for finding in check_ranks(cards)]


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        ("a", ""),
        ("aaa", ""),
        ("abc", ""),
        ("aabb", ""),
        ("bbaa", ""),
        ("abab", "block"),
        ("abba", "block"),
        ("aabccb", "block"),
        ("aab", "unequal"),
        ("abb", "unequal"),
        ("aba", "unequal"),
    ],
)
def test_the_engine_needs_equally_many_consecutive_ranks_per_node(placement: str, words: str) -> None:
    findings = check_ranks([card(host) for host in placement])
    assert [finding.rule for finding in findings] == (["A11"] if words else [])
    if words:
        assert words in findings[0].message
        assert findings[0].fix.startswith("srun ")


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9))
def test_placement_is_refused_exactly_where_rank_divided_by_ranks_per_node_is_not_the_node(
    placement: list[str],
) -> None:
    nodes = list(dict.fromkeys(placement))
    per_node, odd = divmod(len(placement), len(nodes))
    fits = not odd and all(nodes.index(host) == rank // per_node for rank, host in enumerate(placement))
    assert (rules_of(*map(card, placement)) == []) == fits


def test_where_the_ranks_are_is_said() -> None:
    (finding,) = check_ranks([card(host) for host in "aabaa"])
    assert finding.found == "a: 0-1, 3-4; b: 2"


def test_ranks_with_the_same_problem_share_a_finding() -> None:
    cards = [card("n1"), card("n1", CONFIG), card("n2", CONFIG), card("n2", CONFIG)]
    (finding,) = check_ranks(cards)
    assert finding.rule == "P2"
    assert "rank" in finding.message
    assert "1 on n1" in finding.message
    assert "2-3 on n2" in finding.message
    assert "/e.yaml differs" in finding.found
    assert "4 ranks" in finding.expected


@pytest.mark.parametrize(
    ("label", "rule"), [("command line", "P1"), ("engine config", "P2"), ("model config", "P3"), ("model", "P3")]
)
def test_every_kind_of_problem_has_its_rule_and_cure(label: str, rule: str) -> None:
    (finding,) = check_ranks([card(), card("n1", f"{label}: /x: odd")])
    assert (finding.rule, finding.found) == (rule, "/x: odd")
    assert f"the {label} is not the same everywhere: rank 1 on n1" in finding.message
    assert finding.fix


def test_every_problem_of_a_rank_is_reported() -> None:
    assert rules_of(card(), card("n1", COMMAND, CONFIG)) == ["P1", "P2"]


def test_versions_must_agree() -> None:
    (finding,) = check_ranks([card(), card("n1", version="2.0"), card()])
    assert finding.rule == "P4"
    assert "rank 1 on n1" in finding.message
    assert finding.found == "2.0; rank 0 has 1.0"


def test_a_problem_of_another_versions_making_is_no_riddle() -> None:
    """A rank of another version may have problems that this one doesn't know; P4 must be read all the same."""
    cards = [card(), card("n1", "weather: it rains", version="2.0")]
    assert "P4" in rules_of(*cards)


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3 on n1"),
        ([0, 1, 2, 3], "ranks 0-3 on n1"),
        ([0, 2, 3], "ranks 0, 2-3 on n1"),
        ([3, 4, 7], "ranks 3 on n1 and 4, 7 on n2"),
    ],
)
def test_ranks_are_named_with_their_hosts(ranks: list[int], text: str) -> None:
    assert describe_ranks(ranks, [card("n1")] * 4 + [card("n2")] * 4) == text


def test_hosts_stand_in_the_order_of_their_first_rank() -> None:
    assert hosts([card("b"), card("a"), card("b")]) == ("b", "a")
