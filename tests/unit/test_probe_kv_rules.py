# SPDX-License-Identifier: Apache-2.0
"""The KV probe's judgement: who pulls from whom, what is said of it, and what a peer that lies can't say."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_mpi.parallelism.contract import Contract
from dynamo_mpi.parallelism.finding import Finding, Severity
from dynamo_mpi.parallelism.layout import Layout
from dynamo_mpi.probe.kv import judge_kv
from dynamo_mpi.probe.kv_answer import FAILED, LARGE_BYTES, LATE, MIDDLE_BYTES, OK, Between, Pull
from dynamo_mpi.probe.kv_child import StationChild
from dynamo_mpi.probe.kv_fetch import _ByReading
from dynamo_mpi.probe.kv_pairs import Pair, pairs_of
from dynamo_mpi.probe.kv_pattern import pattern
from dynamo_mpi.probe.kv_rules import check_kv
from dynamo_mpi.probe.kv_terms import KvTerms, Offer, Station, transport_of
from dynamo_mpi.probe.kv_way import warnings_of, ways_of_reads
from dynamo_mpi.probe.nccl_fabric import ProbeChild
from dynamo_mpi.probe.plan import NODE, ProbePlan, chosen_probes, plan_probes
from dynamo_mpi.settings import load_settings
from tests.unit.worlds import CONTRACT

GB = 1e9
VERBS = ("rc_mlx5/mlx5_0:1",)
# as UCX 1.23 writes it, and as it does without its tables
TABLE = """\
[1795662624.067] [n1:1:0] ucp_worker.c:1997 UCX  INFO    2f66 self cfg#0 rma_am(tcp/lo)  am(tcp/lo cma/memory)  ka(tcp/lo)
[1795662624.067] [n1:1:0] ucp_worker.c:1997 UCX  INFO    2f66 inter-node cfg#1 rma(rc_mlx5/mlx5_1:1)  am(rc_mlx5/mlx5_1:1)
[1795662624.068] [n1:1:0]   | 2f66 inter-node cfg#1                                             |
[1795662624.068] [n1:1:0]   | remote memory read by ucp_get*(multi) into host memory from host |
[1795662624.068] [n1:1:0]   +--------+-------------+-------------------------------------------+
[1795662624.068] [n1:1:0]   | Range  | Description |                  Config                   |
[1795662624.068] [n1:1:0]   +--------+-------------+-------------------------------------------+
[1795662624.068] [n1:1:0]   | 0..512 | short       | rc_mlx5/mlx5_7:1                          |
[1795662624.068] [n1:1:0]   | 513..inf | zero-copy | 52% on rc_mlx5/mlx5_0:1 and 48% on tcp/eth0 |
[1795662624.068] [n1:1:0]   | 2f66 inter-node cfg#1                                             |
[1795662624.068] [n1:1:0]   | active message by ucp_am_send* from host memory |
[1795662624.068] [n1:1:0]   | 0..inf | short              | tcp/lo        |
"""
LANES = "[1.0] [n1:1:0] ucp_worker.c:1888 UCX  INFO    ep_cfg intra-node cfg#1 rma(tcp/eth0)  am(tcp/lo)"
WARNED = """\
[1.0] [n1:2:0] ucp_context.c:1508 UCX  WARN  network device 'mlx5_7:1' is not available, please use one or more of: 'eth0'(tcp), 'lo'(tcp)
[1.0] [n1:2:0] ucp_context.c:1508 UCX  WARN  transport 'rc' is not available, please use one or more of: cma, tcp
[1.0] [n1:2:0] mpool.c:1 UCX  WARN  object 0x1 was not returned to mpool
"""


def contract(**changes: Any) -> Contract:
    """Return one of TensorRT-LLM's, of 32 layers and 8 KV heads, without any parallelism unless asked for."""
    return replace(CONTRACT, **{"tp_size": 1, **changes})


@pytest.mark.parametrize(
    ("prefill", "decode", "wanted"),
    [
        ({"tp_size": 3, "kv_heads": 3}, {"kv_heads": 3}, [(0, 0), (0, 1), (0, 2)]),
        ({"kv_heads": 3}, {"tp_size": 3, "kv_heads": 3}, [(0, 0), (1, 0), (2, 0)]),
        ({"tp_size": 2}, {"tp_size": 2}, [(0, 0), (1, 1)]),
        # each stage of decode needs a half of the heads of its own layers
        ({"tp_size": 2}, {"pp_size": 2}, [(0, 0), (0, 1), (1, 1), (1, 0)]),
        ({"pp_size": 2}, {"tp_size": 2}, [(0, 0), (0, 1), (1, 1), (1, 0)]),
        # two ranks hold the same head, and are asked in turn
        ({"tp_size": 4, "kv_heads": 2}, {"tp_size": 2, "kv_heads": 2}, [(0, 0), (1, 3)]),
        (
            {"tp_size": 2, "latent_attention": True},
            {"tp_size": 4, "latent_attention": True},
            [(0, 0), (1, 1), (2, 0), (3, 1)],
        ),
        (
            {"tp_size": 2, "enable_attention_dp": True},
            {"tp_size": 2, "enable_attention_dp": True},
            [(0, 0), (1, 1)],
        ),
        ({"tp_size": 2}, {"tp_size": 2, "enable_attention_dp": True}, [(0, 0), (0, 1), (1, 1), (1, 0)]),
    ],
)
def test_who_pulls_from_whom(prefill: dict[str, Any], decode: dict[str, Any], wanted: list[tuple[int, int]]) -> None:
    assert list(pairs_of(contract(**prefill), contract(**decode))) == wanted


def test_layers_that_nobody_holds_are_no_pair() -> None:
    with pytest.raises(ValueError, match="no rank holds"):
        pairs_of(contract(num_layers=30), contract(num_layers=32))


@pytest.mark.parametrize(
    ("backend", "environ", "wanted"),
    [
        ("NIXL", {}, "nixl"),
        ("UCX", {"TRTLLM_USE_NIXL_KVCACHE": "1"}, "ucx"),
        ("DEFAULT", {}, "nixl"),
        ("DEFAULT", {"TRTLLM_USE_UCX_KVCACHE": "1"}, "ucx"),
        (None, {"TRTLLM_USE_MPI_KVCACHE": "1"}, "mpi"),
    ],
)
def test_what_carries_the_kv(backend: str | None, environ: dict[str, str], wanted: str) -> None:
    assert transport_of("trtllm", "tcp", contract(backend=backend), environ) == wanted
    assert transport_of("reference", "tcp", contract(backend=backend), environ) == "tcp"


def test_what_ucx_says_of_reads() -> None:
    assert ways_of_reads(TABLE) == ("rc_mlx5/mlx5_0:1", "tcp/eth0")
    assert ways_of_reads(LANES) == ("tcp/eth0",)
    # of 1.13
    assert ways_of_reads("ucp_worker.c:1763 UCX  INFO    ep_cfg[0]: rma_am(tcp/lo) ka(tcp/lo)") == ("tcp/lo",)
    assert ways_of_reads(TABLE.splitlines()[0]) == (), "with itself"
    assert warnings_of(WARNED) == (
        "network device 'mlx5_7:1' is not available, please use one or more of: 'eth0'(tcp), 'lo'(tcp)",
        "transport 'rc' is not available, please use one or more of: cma, tcp",
    )
    assert warnings_of(TABLE) == ()
    # of 1.13; a station sees no GPU, whatever the engine will see
    warned = (
        "[1.0] [n1:2:0] ucp_context.c:1014 UCX  WARN  transport%s not available, please use one or more of: cma, tcp"
    )
    assert warnings_of(warned % "s 'rc','ud' are") != ()
    assert warnings_of(warned % "s 'rc','cuda_copy' are") != ()
    assert warnings_of(warned % "s 'cuda_copy','cuda_ipc','gdr_copy' are") == ()
    assert warnings_of(warned % " 'cuda' is") == ()


def between(pulls: dict[tuple[int, int], Pull], **changes: Any) -> Between:
    """Return what a decode worker on d0, d1 … has found of a prefill worker on p0, p1 …, a rank on each."""
    nodes = tuple(f"p{rank}" for rank in range(4)), tuple(f"d{rank}" for rank in range(4))
    addresses = tuple(f"10.0.0.{rank}" for rank in range(4))
    of_pairs = tuple((Pair(*pair), pull) for pair, pull in pulls.items())
    return Between("prefill worker on p0", "decode", "nixl", nodes, addresses, of_pairs)._replace(**changes)


def pull(**changes: Any) -> Pull:
    return Pull(OK, "", "nixl", VERBS, True, False, (), 2e-5, LARGE_BYTES, 20 * GB)._replace(**changes)


def found(told: Between) -> dict[str, Finding]:
    return {finding.rule: finding for finding in check_kv(told)}


def test_a_pair_that_is_well_has_no_findings_and_one_line() -> None:
    told = between({(0, 0): pull(), (1, 1): pull(rate=11.2 * GB), (2, 2): pull(rate=30 * GB)})
    outcome = judge_kv([told], KvTerms("decode", 300, "00"))
    assert outcome.findings == ()
    assert outcome.line == (
        "kv: 3 pairs over nixl (rc_mlx5/mlx5_0:1): 11.2 GB/s slowest, "
        "decode rank 1 on d1 <- prefill rank 1 on p1 (10.0.0.1, rc_mlx5/mlx5_0:1); 20 µs"
    )
    (figures,) = outcome.figures["peers"]
    assert figures["gbps"] == [11.2, 20.0]
    assert (figures["slowest"], figures["pairs"], figures["through"]) == ([1, 1], 3, 3)


def test_wrong_bytes_are_an_error_whoever_is_strict() -> None:
    told = found(between({(0, 0): pull(), (0, 1): pull(wrong=True)}))
    assert told["T1"].severity is Severity.WARNING
    assert told["T1"].found == "decode rank 0 on d0 <- prefill rank 1 on p1 (10.0.0.1, rc_mlx5/mlx5_0:1)"


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ([(0, 1), (1, 1)], ": prefill rank 1 on p1"),
        ([(1, 0), (1, 1)], ": decode rank 1 on d1"),
        ([(0, 0), (1, 1)], ""),
        ([(0, 0), (0, 1), (1, 0), (1, 1)], ""),
    ],
)
@pytest.mark.parametrize("how", [FAILED, LATE])
def test_pairs_that_do_not_come_through_and_what_they_have_in_common(
    how: str, bad: list[tuple[int, int]], named: str
) -> None:
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1)]
    told = found(between({pair: pull(state=how, text="no", rate=0) if pair in bad else pull() for pair in pairs}))
    assert told.keys() == {"T2"}
    assert told["T2"].message.endswith(f"{len(bad)} pairs of ranks of 4{named}")


@pytest.mark.parametrize(
    ("slow", "others", "is_slow"),
    [
        (pull(rate=6 * GB), pull(), True),
        (pull(rate=7 * GB), pull(), False),
        # a slow one has no time for the largest message
        (pull(rate=1e7, size=MIDDLE_BYTES), pull(), True),
        (pull(rate=0.3 * GB, ways=("tcp/eth0",), cards=False), pull(rate=GB, ways=("tcp/eth0",), cards=False), False),
        (pull(rate=0.1 * GB, ways=("tcp/eth0",), cards=False), pull(rate=GB, ways=("tcp/eth0",), cards=False), True),
        (pull(seconds=0.02), pull(), True),
        (pull(seconds=0.004), pull(), False),
    ],
)
def test_the_pair_that_is_slower_than_its_like(slow: Pull, others: Pull, is_slow: bool) -> None:
    told = found(between({(0, 0): others, (1, 1): others, (2, 2): slow, (3, 3): others}))
    assert ("T3" in told) is is_slow
    if is_slow:
        assert told["T3"].severity is Severity.WARNING
        assert "decode rank 2 on d2 <- prefill rank 2 on p2" in told["T3"].found
        assert "rank 0" not in told["T3"].found


def test_within_a_node_pairs_may_differ_by_more() -> None:
    told = between({(0, 0): pull(), (1, 1): pull(), (2, 2): pull(rate=3 * GB), (3, 3): pull()})
    assert "T3" in found(told)
    one_node = told._replace(nodes=(("n",) * 4, ("n",) * 4))
    assert "T3" not in found(one_node)
    assert "T3" in found(one_node._replace(pulls=(*told.pulls[:3], (Pair(3, 3), pull(rate=2 * GB)))))


def test_bytes_that_never_come_are_not_those_that_came_before() -> None:
    np = pytest.importorskip("numpy")

    class Talk:
        def say(self, **_: object) -> None:
            pass

        def hear(self) -> dict[str, Any]:
            return {"address": 1, "agent": ""}

    class Agent:
        reads = 0

        def read(self, _address: int, _description: bytes, target: Any, _look: object) -> None:
            self.reads += 1
            if self.reads == 1:
                target[:] = np.frombuffer(pattern(b"r", 0, 4 * target.size), np.float32)

    fetcher = _ByReading(Talk(), Agent(), "ucx")  # type: ignore[arg-type] # what is needed of both
    assert fetcher.fetch(4096)[0] == pattern(b"r", 0, 4096)
    assert fetcher.fetch(8192)[0] == bytes(8192)


def test_two_pairs_are_not_compared() -> None:
    assert found(between({(0, 0): pull(), (1, 1): pull(rate=1e6)})) == {}


@pytest.mark.parametrize(
    ("changes", "falls_back"),
    [
        ({"ways": ("tcp/eth0",)}, True),
        ({"ways": VERBS}, False),
        # without a card there is nothing else
        ({"ways": ("tcp/eth0",), "cards": False}, False),
        ({"ways": ("rc_mlx5/mlx5_0:1", "tcp/eth0")}, False),
        # UCX has said nothing
        ({"ways": ()}, False),
        # the probe's own fall-back, of which T6 tells
        ({"transport": "tcp", "ways": ("tcp/eth0",)}, False),
    ],
)
def test_a_silent_fall_back_to_sockets(changes: dict[str, Any], falls_back: bool) -> None:
    told = between({(0, 0): pull(**changes)})
    assert ("T4" in found(told)) is falls_back
    assert "T4" not in found(told._replace(wanted="tcp")), "asked for"
    one_node = told._replace(nodes=(("d0",) * 4, ("d0",) * 4))
    assert "T4" not in found(one_node), "within a node"


def test_what_variables_name_and_is_not_there_is_said_once() -> None:
    gone = "network device 'mlx5_7:1' is not available"
    told = found(
        between({(0, 0): pull(warnings=(gone,)), (0, 1): pull(warnings=(gone,)), (1, 1): pull(warnings=(gone,))})
    )
    assert told["T5"].found == f"d0, d1: {gone}"


def test_what_was_not_probed_is_said_and_stops_nobody() -> None:
    told = [
        *check_kv(between({(0, 0): pull(transport="tcp", ways=("tcp/eth0",))}, reason="there is no NIXL", skipped=2)),
        *check_kv(between({}, problem="it can't be asked")),
    ]
    assert [(one.rule, one.severity) for one in told] == [(rule, Severity.INFO) for rule in ("T6", "T7", "T7")]
    line = judge_kv([between({}, problem="it can't be asked")], KvTerms("decode", 300, "00")).line
    assert line == "kv: not probed: it can't be asked"


def test_what_is_told_survives_its_way() -> None:
    told = between({(0, 0): pull(), (1, 1): pull(state=LATE, text="x", wrong=True)}, skipped=1, reason="r")
    assert Between.read(json.loads(json.dumps(told.as_json()))) == told
    offer = Offer("ab" * 32, "nixl", ("nixl",), (Station("n1", "10.0.0.1", 4711), Station("n2", "fd00::1", 1)))
    assert Offer.read(json.loads(json.dumps(offer.as_json()))) == offer
    terms = KvTerms("prefill", 12.5, "ab", "10.1.0.0/16")
    assert KvTerms.unpack(terms.pack()) == terms


def packed(*pair: int, **changes: Any) -> dict[str, Any]:
    """Return what an account has of one pull."""
    return {"pulls": [[list(pair), {**pull()._asdict(), **changes}]]}


@pytest.mark.parametrize(
    "change",
    [
        {"pulls": [[[9, 0], {}]]},
        packed(0, -1),
        packed(9, 0),
        packed(0, 0, 0),
        packed(0, 0, rate=float("nan")),
        packed(0, 0, state="fine"),
        packed(0, 0, ways=[7]),
        {"pulls": 7},
        {"nodes": [["p0"]]},
        {"addresses": []},
        {"peer": None},
        {"skipped": "many"},
    ],
)
def test_an_account_that_can_not_be_is_refused(change: dict[str, Any]) -> None:
    content = json.loads(json.dumps(between({(0, 0): pull()}).as_json()))
    with pytest.raises(ValueError, match=r"account|names ranks|figure|state|literal|unpack"):
        Between.read({**content, **change})
    with pytest.raises(ValueError, match="account"):
        Between.read([content])


@pytest.mark.parametrize(
    "change",
    [
        {"token": "ab"},
        {"token": "zz" * 32},
        {"token": 7},
        {"stations": [["n", "a", 70000]]},
        {"stations": [["n", "a"]]},
        {"stations": {}},
    ],
)
def test_an_offer_that_can_not_be_is_refused(change: dict[str, Any]) -> None:
    offer = Offer("ab" * 32, "nixl", ("nixl",), (Station("n1", "10.0.0.1", 4711),))
    with pytest.raises(ValueError, match=r"types|sizes|hexadecimal|port|station"):
        Offer.read({**offer.as_json(), **change})


def test_a_peers_words_can_not_write_into_a_terminal() -> None:
    told = between({(0, 0): pull(state=FAILED, text="\x1b[2J" + "x" * 9999)}).as_json()
    text = Between.read(told).pulls[0][1].text
    assert "\x1b" not in text
    assert len(text) <= 300


def test_the_token_is_in_no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    token = "ab" * 32
    plan = ProbePlan(("fabric", "kv"), 30, "nccl", ((NODE, ((0, 1),)),), KvTerms("prefill", 300, token).pack())
    assert ProbePlan.unpack(plan.pack()) == plan
    started: list[str] = []

    def start(words: Sequence[str], **_: object) -> SimpleNamespace:
        started.extend(words)
        ended = {"wait": lambda seconds: 0, "poll": lambda: 0}
        return SimpleNamespace(stdin=io.BytesIO(), stdout=io.BytesIO(), pid=0, returncode=0, **ended)

    monkeypatch.setattr("subprocess.Popen", start)
    ProbeChild(0, 2, plan, {}).close()
    StationChild(KvTerms("prefill", 300, token), 0, {})
    assert "dynamo_mpi.probe.nccl_child" in started
    assert "dynamo_mpi.probe.kv_station" in started
    assert not [word for word in started if token in word]


@pytest.mark.parametrize(
    ("engine", "role", "asked", "wanted"),
    [
        ("reference", "prefill", "kv", ("kv",)),
        ("reference", "agg", "kv", ()),
        ("reference", "decode", "auto", ()),
        ("trtllm", "decode", "auto", ("gpu", "fabric", "kv")),
        ("trtllm", "agg", "auto", ("gpu", "fabric")),
        ("trtllm", "prefill", "gpu", ("gpu",)),
        ("trtllm", "prefill", "none", ()),
    ],
)
def test_where_kv_is_probed(engine: str, role: str, asked: str, wanted: tuple[str, ...]) -> None:
    words = ["--engine", engine, "--role", role, "--probe", asked, "--model", "/m"]
    settings = load_settings(words, {})
    assert chosen_probes(settings, 8) == wanted
    plan = plan_probes(settings, Layout(8), {"n1": range(8)})
    assert bool(plan and plan.kv) is ("kv" in wanted)
