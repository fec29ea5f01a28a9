# SPDX-License-Identifier: Apache-2.0
"""What a decode rank has to say of one pull, and what is known of all pulls between two worlds, as plain data. Pure."""

from __future__ import annotations

from typing import Any, NamedTuple

from dynamo_mpi.probe.kv_pairs import Pair
from dynamo_mpi.probe.kv_terms import plain

OK, FAILED, LATE = "ok", "failed", "late"
SMALL_BYTES, MIDDLE_BYTES, LARGE_BYTES = 1 << 12, 1 << 20, 1 << 25
"""Sizes of what is pulled: for the latency, for an estimate, for the rate. Multiples of eight."""
_MOST_PULLS = 1 << 16
_MOST_TEXTS = 16


class Pull(NamedTuple):
    """One pull.

    Args:
        state: `OK`, `FAILED` or `LATE`.
        text: why; empty when all is well.
        transport: what it went over: ``tcp`` or ``nixl``.
        ways: transports and devices that were used, as UCX writes them: ``rc_mlx5/mlx5_0:1``.
        cards: whether the decode rank's host has an InfiniBand or RoCE card whose port is up.
        wrong: whether other bytes came than were sent.
        warnings: UCX's own.
        seconds: for `SMALL_BYTES`, the best of several.
        size: of the largest message that was taken in the time.
        rate: bytes a second of it, the best of several.
    """

    state: str
    text: str = ""
    transport: str = ""
    ways: tuple[str, ...] = ()
    cards: bool = False
    wrong: bool = False
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    size: int = 0
    rate: float = 0.0


class Between(NamedTuple):
    """What is known of two worlds.

    Args:
        peer: the other one, in words.
        role: of the one that judges: ``prefill`` or ``decode``.
        wanted: the transport that its configuration names.
        nodes: of the prefill ranks, and of the decode ranks.
        addresses: of the prefill ranks.
        pulls: what was tried.
        skipped: pairs for which there was no time.
        reason: why nothing was tried over ``wanted``; empty where it was.
        problem: why nothing was tried at all; empty where it was.
    """

    peer: str
    role: str
    wanted: str
    nodes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    addresses: tuple[str, ...] = ()
    pulls: tuple[tuple[Pair, Pull], ...] = ()
    skipped: int = 0
    reason: str = ""
    problem: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            **self._asdict(),
            "nodes": [list(one) for one in self.nodes],
            "pulls": [[list(pair), pull._asdict()] for pair, pull in self.pulls],
        }

    @classmethod
    def read(cls, content: Any) -> Between:
        """Read what `as_json` made, perhaps of somebody who lies.

        Raises:
            ValueError: it is something else.
        """
        try:
            prefill, decode = (tuple(map(_text, side)) for side in content["nodes"])
            addresses = tuple(map(_text, content["addresses"]))
            pulls = tuple((Pair(*map(int, pair)), read_pull(pull)) for pair, pull in content["pulls"][:_MOST_PULLS])
            texts = {name: _text(content[name]) for name in ("peer", "role", "wanted", "reason", "problem")}
            skipped = int(content["skipped"])
        except (TypeError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(f"no account of a probe: {error}") from None
        known = len(addresses) == len(prefill)
        if not known or any(not (0 <= p.decode < len(decode) and 0 <= p.prefill < len(prefill)) for p, _ in pulls):
            raise ValueError("an account of a probe names ranks that there aren't")
        return cls(nodes=(prefill, decode), addresses=addresses, pulls=pulls, skipped=skipped, **texts)


def read_pull(content: Any) -> Pull:
    """Read what a decode rank says, which may lie.

    Raises:
        ValueError: it is something else.
    """
    try:
        state = content["state"]
        if state not in (OK, FAILED, LATE):
            raise ValueError(f"there is no state {state!r:.20}")
        seconds, rate = float(content["seconds"]), float(content["rate"])
        if not (0 <= seconds < float("inf") and 0 <= rate < float("inf")):
            raise ValueError("a figure that can't be")
        return Pull(
            state,
            _text(content["text"]),
            _text(content["transport"]),
            tuple(map(_text, content["ways"][:_MOST_TEXTS])),
            content["cards"] is True,
            content["wrong"] is True,
            tuple(map(_text, content["warnings"][:_MOST_TEXTS])),
            seconds,
            int(content["size"]),
            rate,
        )
    except (TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"no account of a pull: {error}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.20} is no text")
    return plain(value)
