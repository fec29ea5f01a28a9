# SPDX-License-Identifier: Apache-2.0
"""Describes the KV that a prefill worker offers a decode worker: which ranks hold it, and which rank fetches what. Pure.

A rank holds a rectangle of the model's KV: layers (its pipeline stage) x KV heads (its tensor-parallel shard). Prefill and decode may be
split differently; if several ranks hold the same head, any of them can be used.

The descriptor is sent as JSON in Dynamo's ``disaggregated_params``, through the frontend. It allows fetching the KV of this one request,
once.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Any

from dynamo_mpi.engines.reference.kv_wire import SECRET_BYTES, TRANSFER_ID_BYTES

KIND = "dynamo_mpi-reference-kv"
VERSION = 1
DTYPE = "float32"
TRANSPORT = "tcp"

_MOST_RANKS = 4096
_MOST = 2**31


class DescriptorError(ValueError):
    """A descriptor that this engine can't use; the text is the reason."""


@dataclass(frozen=True)
class CacheLayout:
    """The KV layout, which must be equal on two engines if one continues from the other's KV.

    Args:
        model: fingerprint of the weights.
        layers: the model's number of layers.
        kv_heads: the model's number of KV heads.
        head_dim: numbers per head.
        block_size: tokens of a KV block.
        dtype: number format.
    """

    model: str
    layers: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: str = DTYPE


@dataclass(frozen=True)
class RankShard:
    """One prefill rank: its KV server's address, and its shard."""

    host: str
    port: int
    shard: KvShard


@dataclass(frozen=True)
class KvDescriptor:
    """KV of one prompt.

    Args:
        transfer_id: identifies it at the KV servers.
        secret: the secret that a client must know.
        layout: the prefill engine's layout.
        tp_size: the prefill engine's tensor-parallel size.
        pp_size: the prefill engine's pipeline-parallel size.
        prompt_tokens: number of positions with KV.
        prompt_digest: see `digest_of`.
        first_token: the token that prefill has generated.
        ranks: each prefill rank's server and shard.
    """

    transfer_id: bytes
    secret: bytes
    layout: CacheLayout
    tp_size: int
    pp_size: int
    prompt_tokens: int
    prompt_digest: str
    first_token: int
    ranks: tuple[RankShard, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "kind": KIND,
            "version": VERSION,
            "transport": TRANSPORT,
            "transfer_id": self.transfer_id.hex(),
            "secret": self.secret.hex(),
            **vars(self.layout),
            "tp_size": self.tp_size,
            "pp_size": self.pp_size,
            "prompt_tokens": self.prompt_tokens,
            "prompt_digest": self.prompt_digest,
            "first_token": self.first_token,
            "ranks": [
                {
                    "host": rank.host,
                    "port": rank.port,
                    "layers": [rank.shard.layers.start, rank.shard.layers.stop],
                    "kv_heads": [rank.shard.heads.start, rank.shard.heads.stop],
                }
                for rank in self.ranks
            ],
        }


def digest_of(prompt: Sequence[int]) -> str:
    """Return a digest that identifies a prompt."""
    return hashlib.sha256(b"".join(token.to_bytes(8, "little") for token in prompt)).hexdigest()


def parse_descriptor(document: object) -> KvDescriptor:
    """Parse a descriptor from JSON values.

    Raises:
        DescriptorError: it is invalid, or has another version.
    """
    if not isinstance(document, Mapping) or document.get("kind") != KIND:
        raise DescriptorError("the KV of this request comes from another kind of prefill worker")
    if type(document.get("version")) is not int or document["version"] != VERSION:
        raise DescriptorError(
            f"the KV offer has version {document.get('version')!r}, this decode worker reads {VERSION}"
        )
    if (transport := document.get("transport")) != TRANSPORT:
        raise DescriptorError(
            f"the prefill worker hands KV over by {str(transport)[:40]!r}, this decode worker fetches it by {TRANSPORT}"
        )
    ranks = document.get("ranks")
    if not isinstance(ranks, list) or not 1 <= len(ranks) <= _MOST_RANKS:
        raise DescriptorError("the KV offer names no ranks")
    return KvDescriptor(
        transfer_id=_hex(document, "transfer_id", TRANSFER_ID_BYTES),
        secret=_hex(document, "secret", SECRET_BYTES),
        layout=CacheLayout(
            model=_text(document, "model"),
            layers=_number(document, "layers", 1),
            kv_heads=_number(document, "kv_heads", 1),
            head_dim=_number(document, "head_dim", 1),
            block_size=_number(document, "block_size", 1),
            dtype=_text(document, "dtype"),
        ),
        tp_size=_number(document, "tp_size", 1),
        pp_size=_number(document, "pp_size", 1),
        prompt_tokens=_number(document, "prompt_tokens", 1),
        prompt_digest=_text(document, "prompt_digest"),
        first_token=_number(document, "first_token", 0),
        ranks=tuple(_rank_shard(rank) for rank in ranks),
    )


def check_descriptor(descriptor: KvDescriptor, layout: CacheLayout, prompt: Sequence[int], vocab_size: int) -> None:
    """Check that an engine with ``layout`` can continue ``prompt`` from ``descriptor``.

    Raises:
        DescriptorError: the KV is not that of this prompt in this model.
    """
    for name, ours in vars(layout).items():
        theirs = getattr(descriptor.layout, name)
        if theirs != ours:
            raise DescriptorError(f"prefill and decode don't match: {name} is {theirs} there and {ours} here")
    if descriptor.prompt_tokens != len(prompt) or descriptor.prompt_digest != digest_of(prompt):
        raise DescriptorError(
            f"the KV offer is for another prompt, of {descriptor.prompt_tokens} tokens; this has {len(prompt)}"
        )
    if descriptor.first_token >= vocab_size:
        raise DescriptorError(
            f"the KV offer's first token is {descriptor.first_token}; this model's ids end at {vocab_size - 1}"
        )
    if len(descriptor.ranks) != descriptor.tp_size * descriptor.pp_size:
        raise DescriptorError(
            f"the KV offer names {len(descriptor.ranks)} ranks for tp {descriptor.tp_size} x pp {descriptor.pp_size}"
        )


def _rank_shard(rank: object) -> RankShard:
    if not isinstance(rank, Mapping):
        raise DescriptorError("the KV offer has a rank without fields")
    port = _number(rank, "port", 1)
    if port > 65535:
        raise DescriptorError(f"the KV offer has port {port}")
    host = _text(rank, "host")
    try:
        address = ip_address(host)  # no names: name resolution has no timeout
    except ValueError:
        raise DescriptorError(f"the KV offer has a rank at {host!r}, which is no IP address") from None
    if isinstance(address, IPv6Address) and address.is_link_local:
        raise DescriptorError(
            f"the KV offer has a rank at {host}, a link-local address, which means nothing on another host"
        )
    return RankShard(host, port, KvShard(_range(rank, "layers"), _range(rank, "kv_heads")))


def _range(fields: Mapping[str, Any], name: str) -> range:
    edges = fields.get(name)
    if not isinstance(edges, list) or len(edges) != 2:
        raise DescriptorError(f"the KV offer's {name} is no range")
    start, stop = (_number({name: edge}, name, 0) for edge in edges)
    if start >= stop:
        raise DescriptorError(f"the KV offer's {name} goes from {start} to {stop}")
    return range(start, stop)


def _number(fields: Mapping[str, Any], name: str, least: int) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < _MOST:
        raise DescriptorError(f"the KV offer's {name} is {str(value)[:40]!r}")
    return value


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 255 or not value.isprintable():
        raise DescriptorError(f"the KV offer's {name} is no text")
    return value


def _hex(fields: Mapping[str, Any], name: str, size: int) -> bytes:
    try:
        value = bytes.fromhex(_text(fields, name))
    except ValueError:
        value = b""
    if len(value) != size:
        raise DescriptorError(f"the KV offer's {name} isn't {size} bytes in hexadecimal")
    return value


@dataclass(frozen=True)
class KvShard:
    """One rank's shard of the KV, in the model's numbers.

    Args:
        layers: contiguous layers.
        heads: contiguous KV heads.
    """

    layers: range
    heads: range


@dataclass(frozen=True)
class ShardSlice:
    """The part to fetch from one rank: ``layers`` x ``heads`` of ``rank``."""

    rank: int
    layers: range
    heads: range


def slices_of(need: KvShard, holders: Sequence[KvShard], preference: int = 0) -> tuple[ShardSlice, ...]:
    """Return rectangles that cover ``need`` exactly once, each with a rank that holds it.

    Args:
        need: the shard that the fetching rank needs.
        holders: the shards of the other engine's ranks, by rank.
        preference: the fetching rank's number: ranks that have a choice fetch from different ranks.

    Raises:
        ValueError: no rank holds some part of it.
    """
    edges = {need.layers.start, need.layers.stop}
    for holder in holders:
        edges |= {edge for edge in (holder.layers.start, holder.layers.stop) if edge in need.layers}
    ordered = sorted(edges)
    slices: list[ShardSlice] = []
    for start, stop in itertools.pairwise(ordered):
        layers = range(start, stop)
        able = [index for index, holder in enumerate(holders) if covers(holder.layers, layers)]
        slices += _cover_heads(layers, need.heads, holders, able, preference)
    return tuple(slices)


def _cover_heads(
    layers: range, heads: range, holders: Sequence[KvShard], able: Sequence[int], preference: int
) -> Iterator[ShardSlice]:
    at = heads.start
    while at < heads.stop:
        with_it = [index for index in able if at in holders[index].heads]
        if not with_it:
            raise ValueError(f"no rank holds KV head {at} of layers {layers.start} to {layers.stop - 1}")
        reach = max(min(holders[index].heads.stop, heads.stop) for index in with_it)
        best = [index for index in with_it if min(holders[index].heads.stop, heads.stop) == reach]
        yield ShardSlice(best[preference % len(best)], layers, range(at, reach))
        at = reach


def covers(outer: range, inner: range) -> bool:
    """Return whether all of ``inner`` is in ``outer``."""
    return outer.start <= inner.start and inner.stop <= outer.stop
