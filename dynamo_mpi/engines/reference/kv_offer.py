# SPDX-License-Identifier: Apache-2.0
"""The offer that a prefill worker makes to a decode worker: whose KV it is, where it lies, and how it is laid out. Pure.

It travels as JSON in Dynamo's ``disaggregated_params``, through the frontend. Whoever has it can fetch the KV of this one request, once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Any

from dynamo_mpi.engines.reference.kv_shards import Holding
from dynamo_mpi.engines.reference.kv_wire import SECRET_BYTES, TRANSFER_ID_BYTES

KIND = "dynamo_mpi-reference-kv"
VERSION = 1
DTYPE = "float32"
TRANSPORT = "tcp"

_MOST_RANKS = 4096
_MOST = 2**31


class OfferError(ValueError):
    """An offer that can't be taken up; the text says why."""


@dataclass(frozen=True)
class CacheLayout:
    """What two engines have to have in common before one can go on from the other's KV.

    Args:
        model: fingerprint of the weights.
        layers: of the model.
        kv_heads: of the model.
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
class Holder:
    """One prefill rank: where its KV server listens, and what the rank holds."""

    host: str
    port: int
    holding: Holding


@dataclass(frozen=True)
class Offer:
    """KV of one prompt.

    Args:
        transfer_id: names it at the KV servers.
        secret: proves that one may have it.
        layout: of the prefill engine.
        tp_size: of the prefill engine.
        pp_size: of the prefill engine.
        prompt_tokens: positions whose KV is there.
        prompt_digest: see `digest_of`.
        first_token: that prefill has chosen after the prompt.
        holders: by prefill rank.
    """

    transfer_id: bytes
    secret: bytes
    layout: CacheLayout
    tp_size: int
    pp_size: int
    prompt_tokens: int
    prompt_digest: str
    first_token: int
    holders: tuple[Holder, ...]

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
                    "host": holder.host,
                    "port": holder.port,
                    "layers": [holder.holding.layers.start, holder.holding.layers.stop],
                    "kv_heads": [holder.holding.heads.start, holder.holding.heads.stop],
                }
                for holder in self.holders
            ],
        }


def digest_of(prompt: Sequence[int]) -> str:
    """Return what tells one prompt from another."""
    return hashlib.sha256(b"".join(token.to_bytes(8, "little") for token in prompt)).hexdigest()


def parse_offer(document: object) -> Offer:
    """Read an offer.

    Raises:
        OfferError: it isn't one, or of another version.
    """
    if not isinstance(document, Mapping) or document.get("kind") != KIND:
        raise OfferError("the KV of this request comes from another kind of prefill worker")
    if type(document.get("version")) is not int or document["version"] != VERSION:
        raise OfferError(f"the KV offer has version {document.get('version')!r}, this decode worker reads {VERSION}")
    if (transport := document.get("transport")) != TRANSPORT:
        raise OfferError(
            f"the prefill worker hands KV over by {str(transport)[:40]!r}, this decode worker fetches it by {TRANSPORT}"
        )
    ranks = document.get("ranks")
    if not isinstance(ranks, list) or not 1 <= len(ranks) <= _MOST_RANKS:
        raise OfferError("the KV offer names no ranks")
    return Offer(
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
        holders=tuple(_holder(rank) for rank in ranks),
    )


def check_offer(offer: Offer, layout: CacheLayout, prompt: Sequence[int], vocab_size: int) -> None:
    """Return if an engine with ``layout`` can continue ``prompt`` from ``offer``.

    Raises:
        OfferError: it would go on from something else than this prompt's KV in this model.
    """
    for name, ours in vars(layout).items():
        theirs = getattr(offer.layout, name)
        if theirs != ours:
            raise OfferError(f"prefill and decode don't match: {name} is {theirs} there and {ours} here")
    if offer.prompt_tokens != len(prompt) or offer.prompt_digest != digest_of(prompt):
        raise OfferError(f"the KV offer is for another prompt, of {offer.prompt_tokens} tokens; this has {len(prompt)}")
    if offer.first_token >= vocab_size:
        raise OfferError(f"the KV offer's first token is {offer.first_token}; this model's ids end at {vocab_size - 1}")
    if len(offer.holders) != offer.tp_size * offer.pp_size:
        raise OfferError(f"the KV offer names {len(offer.holders)} ranks for tp {offer.tp_size} x pp {offer.pp_size}")


def _holder(rank: object) -> Holder:
    if not isinstance(rank, Mapping):
        raise OfferError("the KV offer has a rank without fields")
    port = _number(rank, "port", 1)
    if port > 65535:
        raise OfferError(f"the KV offer has port {port}")
    host = _text(rank, "host")
    try:
        address = ip_address(host)  # no names: looking one up has no deadline
    except ValueError:
        raise OfferError(f"the KV offer has a rank at {host!r}, which is no IP address") from None
    if isinstance(address, IPv6Address) and address.is_link_local:
        raise OfferError(
            f"the KV offer has a rank at {host}, a link-local address, which means nothing on another host"
        )
    return Holder(host, port, Holding(_range(rank, "layers"), _range(rank, "kv_heads")))


def _range(fields: Mapping[str, Any], name: str) -> range:
    edges = fields.get(name)
    if not isinstance(edges, list) or len(edges) != 2:
        raise OfferError(f"the KV offer's {name} is no range")
    start, stop = (_number({name: edge}, name, 0) for edge in edges)
    if start >= stop:
        raise OfferError(f"the KV offer's {name} goes from {start} to {stop}")
    return range(start, stop)


def _number(fields: Mapping[str, Any], name: str, least: int) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < _MOST:
        raise OfferError(f"the KV offer's {name} is {str(value)[:40]!r}")
    return value


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 255 or not value.isprintable():
        raise OfferError(f"the KV offer's {name} is no text")
    return value


def _hex(fields: Mapping[str, Any], name: str, size: int) -> bytes:
    try:
        value = bytes.fromhex(_text(fields, name))
    except ValueError:
        value = b""
    if len(value) != size:
        raise OfferError(f"the KV offer's {name} isn't {size} bytes in hexadecimal")
    return value
