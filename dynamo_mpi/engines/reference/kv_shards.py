# SPDX-License-Identifier: Apache-2.0
"""Which rank holds what of a sequence's keys and values, and from which ones another rank gets what it needs. Pure.

A rank holds a rectangle: layers (its pipeline stage) x KV heads (its share of the tensor parallelism). Prefill and decode may be
split differently; where several ranks hold the same head, any of them will do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Holding:
    """What one rank holds, in the model's numbers.

    Args:
        layers: contiguous.
        heads: KV heads, contiguous.
    """

    layers: range
    heads: range


@dataclass(frozen=True)
class Piece:
    """What to get from one rank: ``layers`` x ``heads`` of the rank with number ``holder``."""

    holder: int
    layers: range
    heads: range


def pieces_of(need: Holding, holders: Sequence[Holding], preference: int = 0) -> tuple[Piece, ...]:
    """Return rectangles that cover ``need`` exactly once, each held by the rank that it names.

    Args:
        need: of the rank that asks.
        holders: what the other side's ranks hold, by rank.
        preference: number of the rank that asks: ranks that could take the same from several take it from different ones.

    Raises:
        ValueError: a part of it is held by nobody.
    """
    edges = {need.layers.start, need.layers.stop}
    for holder in holders:
        edges |= {edge for edge in (holder.layers.start, holder.layers.stop) if edge in need.layers}
    ordered = sorted(edges)
    pieces: list[Piece] = []
    for start, stop in itertools.pairwise(ordered):
        layers = range(start, stop)
        able = [index for index, holder in enumerate(holders) if covers(holder.layers, layers)]
        pieces += _cover_heads(layers, need.heads, holders, able, preference)
    return tuple(pieces)


def _cover_heads(
    layers: range, heads: range, holders: Sequence[Holding], able: Sequence[int], preference: int
) -> Iterator[Piece]:
    at = heads.start
    while at < heads.stop:
        with_it = [index for index in able if at in holders[index].heads]
        if not with_it:
            raise ValueError(f"no rank holds KV head {at} of layers {layers.start} to {layers.stop - 1}")
        reach = max(min(holders[index].heads.stop, heads.stop) for index in with_it)
        best = [index for index in with_it if min(holders[index].heads.stop, heads.stop) == reach]
        yield Piece(best[preference % len(best)], layers, range(at, reach))
        at = reach


def covers(outer: range, inner: range) -> bool:
    """Tell whether all of ``inner`` is in ``outer``."""
    return outer.start <= inner.start and inner.stop <= outer.stop
