# SPDX-License-Identifier: Apache-2.0
"""Which worlds of ranks the stack is made of: one that does all, or one for prefill and one for decode. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dynamo_mpi.errors import UsageError

StackRole = Literal["agg", "disagg"]
WorldRole = Literal["agg", "prefill", "decode"]

# The installed model has 9 attention heads: 1 and 3 are its legal sizes below 9.
AGG_TP_SIZE = 3
PREFILL_TP_SIZE, DECODE_TP_SIZE = 3, 1
"""Unequal, so that KV is divided anew on its way; decode on one rank, where a small model's tokens come fastest."""


@dataclass(frozen=True)
class World:
    """One worker: its ranks under one launcher.

    Args:
        role: what it does.
        tp_size: its ranks, which is tensor parallelism over all of them.
    """

    role: WorldRole
    tp_size: int

    @property
    def name(self) -> str:
        """Return what the part is called."""
        return "worker" if self.role == "agg" else self.role


def worlds_of(role: StackRole, tp: int | None, prefill_tp: int | None, decode_tp: int | None) -> tuple[World, ...]:
    """Return the worlds that the flags ask for, in the order in which they are told to stop.

    Args:
        role: of the whole.
        tp: ranks of each world that isn't given its own number; None takes the default of its role.
        prefill_tp: ranks of the prefill world.
        decode_tp: ranks of the decode world.

    Raises:
        UsageError: a size is given for a world that there isn't.
    """
    if role == "disagg":
        return (
            World("prefill", prefill_tp or tp or PREFILL_TP_SIZE),
            World("decode", decode_tp or tp or DECODE_TP_SIZE),
        )
    for flag, size in (("--prefill-tp", prefill_tp), ("--decode-tp", decode_tp)):
        if size is not None:
            raise UsageError(
                f"{flag} {size} with --role agg", needed="one world, whose size is --tp", fix="add --role disagg"
            )
    return (World("agg", tp or AGG_TP_SIZE),)
