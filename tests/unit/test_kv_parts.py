# SPDX-License-Identifier: Apache-2.0
"""Small parts of the KV hand-off: orders on the wire, this host's addresses, what a role makes of a request."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.common import host_address as host_address_module
from dynamo_mpi.common.errors import EngineError, UsageError
from dynamo_mpi.common.host_address import host_address, interface_addresses
from dynamo_mpi.common.networks import Interface
from dynamo_mpi.engines.protocol import GenerationRequest, TokenChunk
from dynamo_mpi.engines.reference.collectives import SingleRankConsensus
from dynamo_mpi.engines.reference.steps import (
    Abandon,
    Command,
    Drop,
    Keep,
    Poll,
    Pull,
    decode_command,
    encode_command,
)
from dynamo_mpi.engines.requests import for_role, to_generation_request, to_response
from dynamo_mpi.runtime.serving import health_payload
from tests.unit.kv_hosts import needs_ipv6

NUMBERS = st.integers(0, 2**40)
IDS = st.binary(min_size=16, max_size=16)
COMMANDS: st.SearchStrategy[Command] = st.one_of(
    st.builds(Keep, NUMBERS, NUMBERS, IDS, st.binary(min_size=32, max_size=32)),
    st.builds(Drop, IDS),
    st.builds(Pull, NUMBERS, NUMBERS, st.dictionaries(st.text(), st.integers() | st.text() | st.lists(NUMBERS))),
    st.builds(Poll, st.lists(NUMBERS, max_size=9).map(tuple)),
    st.builds(Abandon, NUMBERS),
)
REQUEST = GenerationRequest("r", (1, 2), max_tokens=9, min_tokens=3)
RAW: dict[str, Any] = {"token_ids": [1, 2], "stop_conditions": {"max_tokens": 9, "min_tokens": 3}}


@given(COMMANDS)
def test_a_command_survives_the_wire(command: Command) -> None:
    assert decode_command(encode_command(command)) == command


@pytest.mark.parametrize(
    "words", [b"x" * 8, b'["Keep"]', b'["Stop", {}]', b'["Drop", {"id":0}]', b'["Poll", {"numbers": 1}]', b"[1, 2]  "]
)
def test_other_words_are_no_command(words: bytes) -> None:
    with pytest.raises(ValueError, match="invalid command"):
        decode_command(np.frombuffer(words.ljust(-(-len(words) // 8) * 8), np.int64))


def test_one_rank_agrees_with_itself() -> None:
    assert SingleRankConsensus().lowest([2, 0, 1]) == [2, 0, 1]
    assert SingleRankConsensus().texts("why") == ["why"]


def test_an_address_by_interface_network_or_itself() -> None:
    assert interface_addresses()["lo"][0] == IPv4Address("127.0.0.1")
    assert {host_address(choice, "--network") for choice in ("lo", "127.0.0.0/8", "127.0.0.1")} == {"127.0.0.1"}
    assert host_address(None, "--network").count(".") == 3


@needs_ipv6
@pytest.mark.parametrize("choice", ["::1", "::1/128", "0:0:0:0:0:0:0:1"])
def test_an_ipv6_address(choice: str) -> None:
    assert host_address(choice, "--network") == "::1"


@pytest.mark.parametrize(
    "choice", ["ib77", "203.0.113.0/24", "203.0.113.7", "2001:db8::7", "2001:db8::/32", "::7", "fast lane", "%", "/"]
)
def test_an_address_that_this_host_lacks(choice: str) -> None:
    with pytest.raises(UsageError, match=r"no address by .*; it has .*lo 127\.0\.0\.1"):
        host_address(choice, "--network")


# one with a usable IPv6 address, and one with a link-local one alone
IPV6 = (
    Interface("lo", ("127.0.0.1/8", "::1/128"), kind="loopback"),
    Interface("ib0", ("fd00::2/64",)),
    Interface("ib1", ("fe80::fc:ff:fe00:1/64",)),
)


@pytest.fixture
def ipv6_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_address_module, "read_interfaces", lambda: IPV6)


@pytest.mark.usefixtures("ipv6_interfaces")
def test_an_interface_with_ipv6_alone() -> None:
    assert {host_address(choice, "--network") for choice in ("ib0", "fd00::/64", "fd00::2")} == {"fd00::2"}
    with pytest.raises(UsageError, match="no address by fd00::3"):
        host_address("fd00::3", "--network")


@pytest.mark.usefixtures("ipv6_interfaces")
@pytest.mark.parametrize("choice", ["ib1", "fe80::/10", "fe80::fc:ff:fe00:1", "fe80::fc:ff:fe00:1%ib1"])
def test_a_link_local_address_is_refused(choice: str) -> None:
    with pytest.raises(UsageError, match=r"only fe80::fc:ff:fe00:1, a link-local address"):
        host_address(choice, "--network")


def test_prefill_makes_one_token_and_offers_its_kv() -> None:
    generation = for_role(to_generation_request("r", RAW), RAW, "prefill")

    assert (generation.max_tokens, generation.min_tokens, generation.keep_kv) == (1, 1, True)


def test_decode_goes_on_from_what_prefill_has_offered() -> None:
    raw = {**RAW, "prefill_result": {"disaggregated_params": {"kind": "x"}, "prompt_tokens_details": None}}

    generation = for_role(to_generation_request("r", raw), raw, "decode")

    assert (generation.max_tokens, generation.min_tokens, generation.kv_transfer_params) == (9, 3, {"kind": "x"})


@pytest.mark.parametrize("result", [None, [], {}, {"disaggregated_params": None}, {"disaggregated_params": "x"}])
def test_decode_serves_nothing_that_prefill_has_not_seen(result: object) -> None:
    with pytest.raises(EngineError, match="without a prefill worker's result"):
        for_role(REQUEST, {**RAW, "prefill_result": result}, "decode")


@pytest.mark.parametrize("role", ["agg", "prefill", "decode"])
def test_health_checks_are_served_whole_by_every_role(role: str) -> None:
    payload = health_payload(7)
    generation = to_generation_request("h", payload)

    assert for_role(generation, payload, role) == generation


def test_an_offer_reaches_dynamo_as_disaggregated_params() -> None:
    response = to_response(TokenChunk((5,), "length", kv_transfer_params={"kind": "x"}), 2, 1)

    assert response["disaggregated_params"] == {"kind": "x"}
    assert "disaggregated_params" not in to_response(TokenChunk((5,), "length"), 2, 1)
