# SPDX-License-Identifier: Apache-2.0
"""Lists of strings as bytes, and the messages between ranks that are made of them."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi import __version__
from dynamo_mpi.checks.rank_report import ComparedFile, RankReport, ReportRequest
from dynamo_mpi.common.codec import decode_strings, encode_strings
from dynamo_mpi.engines.spec import EngineSpec
from dynamo_mpi.runtime.follower import build_engine_shard

# whatever an argv or a file name can hold: Python makes lone surrogates of bytes that are no UTF-8
TEXT = st.one_of(st.text(), st.binary().map(os.fsdecode))
TEXTS = st.lists(TEXT).map(tuple)


@given(TEXTS)
def test_what_is_packed_comes_back(values: tuple[str, ...]) -> None:
    assert decode_strings(encode_strings(values)) == list(values)


@given(TEXTS, TEXTS)
def test_packed_lists_can_be_joined(first: tuple[str, ...], second: tuple[str, ...]) -> None:
    assert encode_strings(first) + encode_strings(second) == encode_strings(first + second)


@given(st.lists(TEXT, min_size=1), st.data())
def test_a_truncated_message_is_noticed_or_ends_between_two_values(values: list[str], data: st.DataObject) -> None:
    packed = encode_strings(values)
    cut = data.draw(st.integers(0, len(packed) - 1))
    ends = [len(encode_strings(values[:n])) for n in range(len(values))]
    if cut in ends:
        assert decode_strings(packed[:cut]) == values[: len(decode_strings(packed[:cut]))]
    else:
        with pytest.raises(ValueError, match="truncated"):
            decode_strings(packed[:cut])


@given(st.binary(max_size=64))
def test_foreign_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        values = decode_strings(data)
    except ValueError:
        return
    assert encode_strings(values) == data


@given(
    st.builds(
        ReportRequest,
        argv=TEXTS,
        model_dir=TEXT,
        weights=TEXTS,
        files=st.lists(st.builds(ComparedFile, TEXT, TEXT, TEXT)).map(tuple),
        hosts=st.booleans(),
        gpus=st.booleans(),
        version=st.just(__version__),
    )
)
def test_an_inquiry_arrives_as_it_was(report_request: ReportRequest) -> None:
    assert ReportRequest.unpack(report_request.pack()) == report_request


@given(st.builds(RankReport, TEXT, TEXT, st.just(__version__), TEXTS, TEXTS, TEXTS))
def test_a_card_arrives_as_it_was(card: RankReport) -> None:
    assert RankReport.unpack(card.pack()) == card


COUNT = st.integers(1, 1024)
SIZE = st.none() | st.integers(1, 2**40)


SECONDS = st.floats(0, 1e6)


@given(
    st.builds(EngineSpec, TEXT, TEXT, COUNT, COUNT, COUNT, SIZE, SIZE, SIZE, SIZE, TEXT, TEXT, SECONDS, SECONDS, TEXT)
)
def test_an_engine_spec_arrives_as_it_was(spec: EngineSpec) -> None:
    assert EngineSpec.unpack(spec.pack()) == spec


def test_an_unknown_engine_is_named() -> None:
    spec = EngineSpec("abacus", "/m", 1, 1, 1)
    _, error = build_engine_shard(spec, None, 1)  # type: ignore[arg-type]  # refused before it is looked at
    assert str(error) == "no engine is called 'abacus'"


def test_what_an_ascii_locale_reads_comes_out_as_it_went_in() -> None:
    """A UTF-8 file name is two surrogates there; as a character, no such rank could open the file."""
    name = "/tmp/mödel".encode().decode("ascii", "surrogateescape")
    (received,) = decode_strings(encode_strings([name]))
    assert received.encode("ascii", "surrogateescape") == "/tmp/mödel".encode()
