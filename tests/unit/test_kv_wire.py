# SPDX-License-Identifier: Apache-2.0
"""KV frames: what is sent arrives, and nothing else is taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.engines.reference.kv_wire import (
    HEADER_BYTES,
    MAGIC,
    MOST_BODY,
    Fetch,
    Hello,
    Message,
    Refused,
    Release,
    Released,
    Shard,
    SignedMessage,
    WireError,
    body_size,
    decode,
    encode,
    is_signed,
    sign,
)

U32 = st.integers(0, 2**32 - 1)
RANGES = st.tuples(U32, U32).filter(lambda edges: edges[0] != edges[1]).map(lambda edges: range(*sorted(edges)))
IDS = st.binary(min_size=16, max_size=16)
MACS = st.binary(min_size=32, max_size=32)
SIGNED = st.one_of(
    st.builds(Fetch, IDS, RANGES, RANGES, MACS),
    st.builds(Shard, RANGES, RANGES, U32, U32, st.integers(0, 255), st.integers(0, 2**64 - 1), U32, MACS),
    st.builds(Release, IDS, MACS),
)
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    SIGNED,
    st.builds(Hello, IDS),
    st.just(Released()),
    st.builds(Refused, st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200)),
)


@given(MESSAGES)
def test_a_frame_survives_the_wire(message: Message) -> None:
    frame = encode(message)

    assert decode(frame) == message
    assert HEADER_BYTES + body_size(frame[:HEADER_BYTES]) == len(frame)


@given(MESSAGES, st.data())
def test_a_frame_that_is_cut_off_is_refused(message: Message, data: st.DataObject) -> None:
    frame = encode(message)

    with pytest.raises(WireError):
        decode(frame[: data.draw(st.integers(0, len(frame) - 1))])


@given(MESSAGES, st.binary(min_size=1, max_size=40))
def test_bytes_left_over_are_refused(message: Message, more: bytes) -> None:
    with pytest.raises(WireError):
        decode(encode(message) + more)


@given(st.binary(max_size=700))
def test_garbage_is_refused_and_never_anything_else(garbage: bytes) -> None:
    for frame in (garbage, MAGIC + garbage):
        with pytest.raises(WireError):
            decode(frame)


@given(st.integers(1, 6), st.binary(max_size=MOST_BODY))
def test_any_body_is_read_or_refused(kind: int, body: bytes) -> None:
    frame = MAGIC + bytes([kind, 0, 0, 0]) + len(body).to_bytes(4, "big") + body
    try:
        message = decode(frame)
    except WireError:
        return
    assert isinstance(message, Refused) or encode(message) == frame


def test_an_oversized_frame_is_refused_by_its_header() -> None:
    header = MAGIC + bytes([6, 0, 0, 0]) + (MOST_BODY + 1).to_bytes(4, "big")
    with pytest.raises(WireError, match=f"more than {MOST_BODY}"):
        body_size(header)


def test_reasons_of_a_liar_bring_no_control_characters_into_the_log() -> None:
    assert decode(encode(Refused("a\x1b[2Jb\nc"))) == Refused("a?[2Jb?c")


@given(SIGNED, MACS, MACS, IDS, IDS)
def test_a_signature_holds_for_its_secret_its_connection_and_its_words(
    message: SignedMessage, secret: bytes, other: bytes, nonce: bytes, later: bytes
) -> None:
    signed = sign(message, secret, nonce)

    assert is_signed(signed, secret, nonce)
    assert is_signed(signed, other, nonce) == (other == secret)
    assert is_signed(signed, secret, later) == (later == nonce)
    assert not is_signed(Fetch(bytes(16), range(7), range(9), signed.mac), secret, nonce)
