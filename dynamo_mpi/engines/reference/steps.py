# SPDX-License-Identifier: Apache-2.0
"""The steps and KV commands that all ranks execute: what one step computes, their encoding, and how rank 0 sends them.

MPI's own waits spin: a rank in a blocking broadcast uses a whole core, which the other ranks need. Followers start a non-blocking broadcast
instead and poll it: without a pause while steps follow each other, with growing sleeps while there are none.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mpi4py import MPI

Int64Array = NDArray[np.int64]

_ENTRY_HEADER = 4


@dataclass(frozen=True)
class SequencePart:
    """The tokens of one sequence that enter the model in a step.

    Args:
        slot: the sequence's row of the KV cache.
        start: position of the first token; the cache contains all earlier ones.
        token_ids: at least one.
        wants_logits: whether a token must be chosen after the last of these.
    """

    slot: int
    start: int
    token_ids: tuple[int, ...]
    wants_logits: bool


@dataclass(frozen=True)
class StepPlan:
    """One step: at least one part, each of another slot."""

    parts: tuple[SequencePart, ...]

    @property
    def parts_with_logits(self) -> tuple[SequencePart, ...]:
        """The parts after which a token is chosen, in the order of the logits' rows."""
        return tuple(part for part in self.parts if part.wants_logits)

    @property
    def token_count(self) -> int:
        return sum(len(part.token_ids) for part in self.parts)


def encode(plan: StepPlan) -> Int64Array:
    """Return the plan as int64: per part slot, start, wants_logits, number of tokens, tokens."""
    words: list[int] = []
    for part in plan.parts:
        words += (part.slot, part.start, int(part.wants_logits), len(part.token_ids))
        words += part.token_ids
    return np.array(words, np.int64)


def decode(words: Int64Array) -> StepPlan:
    """Decode the result of ``encode``.

    Raises:
        ValueError: ``words`` are not a plan.
    """
    values, parts, position = words.tolist(), [], 0
    while position < len(values):
        header = values[position : position + _ENTRY_HEADER]
        if len(header) < _ENTRY_HEADER:
            raise ValueError("a step plan ends in the middle of an entry")
        slot, start, wants_logits, count = header
        position += _ENTRY_HEADER
        if count < 1 or position + count > len(values):
            raise ValueError(f"a step plan entry announces {count} tokens")
        parts.append(SequencePart(slot, start, tuple(values[position : position + count]), bool(wants_logits)))
        position += count
    return StepPlan(tuple(parts))


_STEP, _STOP, _COMMAND = 1, 2, 3
_WORD = 8
_HEADER_WORDS = 2
_INLINE_WORDS = 254
"""Words that are sent with the header: enough for a step of 50 sequences, and within MPI's eager limits."""

_SPIN_SECONDS = 0.002
_FIRST_SLEEP_SECONDS = 0.00005
_LONGEST_SLEEP_SECONDS = 0.004
_SLEEP_SHARE = 0.05
"""A sleep lasts this fraction of the time waited so far."""


@dataclass(frozen=True)
class Keep:
    """Prefill: store a copy of the first ``tokens`` positions of ``slot``, which clients that know ``secret`` may fetch."""

    slot: int
    tokens: int
    transfer_id: bytes
    secret: bytes


@dataclass(frozen=True)
class Drop:
    """Prefill: remove the KV that was just stored."""

    transfer_id: bytes


@dataclass(frozen=True)
class Pull:
    """Decode: begin to fetch this rank's part of a descriptor (JSON values) in the background, for ``slot``."""

    number: int
    slot: int
    descriptor: dict[str, Any]


@dataclass(frozen=True)
class Poll:
    """Decode: agree on the status of these pulls; those that are done on all ranks are written to their slots."""

    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Abandon:
    """Decode: abandon this pull, because no request needs it any more."""

    number: int


Command = Keep | Drop | Pull | Poll | Abandon
_COMMANDS: dict[str, type[Command]] = {kind.__name__: kind for kind in (Keep, Drop, Pull, Poll, Abandon)}
_BYTES = ("transfer_id", "secret")


def encode_command(command: Command) -> Int64Array:
    """Return the command as int64: JSON, padded to whole words."""
    fields = {name: value.hex() if name in _BYTES else value for name, value in vars(command).items()}
    text = json.dumps([type(command).__name__, fields]).encode()
    return np.frombuffer(text + b" " * (-len(text) % _WORD), np.int64)


def decode_command(words: Int64Array) -> Command:
    """Decode the result of ``encode_command``.

    Raises:
        ValueError: ``words`` are not a command.
    """
    try:
        name, fields = json.loads(words.tobytes())
        for key in fields.keys() & _BYTES:
            fields[key] = bytes.fromhex(fields[key])
        if "numbers" in fields:
            fields["numbers"] = tuple(fields["numbers"])
        return _COMMANDS[name](**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"rank 0 has sent an invalid command: {error}") from None


def sleep_seconds(waited: float) -> float:
    """Return how long a follower sleeps before it polls again, after ``waited`` seconds without a step."""
    if waited < _SPIN_SECONDS:
        return 0.0
    return min(max(_FIRST_SLEEP_SECONDS, waited * _SLEEP_SHARE), _LONGEST_SLEEP_SECONDS)


class StepChannel:
    """Broadcasts from rank 0 over a communicator whose collectives all ranks call in the same order.

    Args:
        communicator: all ranks of the engine.
    """

    def __init__(self, communicator: MPI.Intracomm) -> None:
        self._communicator = communicator
        self._message: Int64Array = np.zeros(_HEADER_WORDS + _INLINE_WORDS, np.int64)

    def send_step(self, plan: StepPlan) -> None:
        """Rank 0: let all ranks run ``plan``."""
        self._send(_STEP, encode(plan))

    def send_command(self, command: Command) -> None:
        """Rank 0: let all ranks run ``command``."""
        self._send(_COMMAND, encode_command(command))

    def send_stop(self) -> None:
        """Rank 0: release all ranks."""
        self._send(_STOP, np.empty(0, np.int64))

    def receive(self) -> StepPlan | Command | None:
        """Other ranks: wait for the next plan or command; None when rank 0 has stopped."""
        request = self._communicator.Ibcast(self._message, root=0)
        began = time.monotonic()
        while not request.Test():
            time.sleep(sleep_seconds(time.monotonic() - began))
        kind, size = self._message[:_HEADER_WORDS].tolist()
        if kind == _STOP:
            return None
        words = self._message[_HEADER_WORDS : _HEADER_WORDS + size]
        if size > _INLINE_WORDS:
            words = np.empty(size, np.int64)
            self._communicator.Bcast(words, root=0)
        return decode_command(words) if kind == _COMMAND else decode(words)

    def _send(self, kind: int, words: Int64Array) -> None:
        self._message[:_HEADER_WORDS] = kind, words.size
        fits = words.size <= _INLINE_WORDS
        if fits:
            self._message[_HEADER_WORDS : _HEADER_WORDS + words.size] = words
        self._communicator.Ibcast(self._message, root=0).Wait()
        if not fits:
            self._communicator.Bcast(words, root=0)
