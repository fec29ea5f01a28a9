# SPDX-License-Identifier: Apache-2.0
"""How one decode rank pulls from one prefill rank in the KV probe, and takes the time. In the process of the decode rank's station."""

from __future__ import annotations

import base64
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.engines.reference.kv_wire import Deadline
from dynamo_mpi.errors import UsageError
from dynamo_mpi.probe.kv_answer import FAILED, LARGE_BYTES, LATE, MIDDLE_BYTES, OK, SMALL_BYTES, Pull
from dynamo_mpi.probe.kv_nixl import Located, NixlAgent, NixlError
from dynamo_mpi.probe.kv_pattern import pattern
from dynamo_mpi.probe.kv_terms import TCP, plain
from dynamo_mpi.probe.kv_ucx import UcxAgent, UcxError
from dynamo_mpi.probe.kv_way import Counters, warnings_of, ways_of_reads
from dynamo_mpi.probe.kv_wire import FETCH, Access, TalkError, talk_to
from dynamo_mpi.probe.nccl_fabric import has_cards
from dynamo_mpi.services.host_address import interface_addresses

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_mpi.probe.kv_wire import Talk

# the best of several: another process may have had the core
_REPEATS = {SMALL_BYTES: 9, MIDDLE_BYTES: 3, LARGE_BYTES: 4}
# of the time, what the large messages may take together
_LARGE_SHARE = 0.5
_LOG_BYTES = 1 << 20


class Source(NamedTuple):
    """A prefill rank to pull from.

    Args:
        rank: its number.
        address: of its host.
        port: of its station.
        run: number of the run.
        key: lets us in.
    """

    rank: int
    address: str
    port: int
    run: bytes
    key: bytes


def pull_from(source: Source, transport: str, seconds: float, agent_of: Callable[[str], NixlAgent | UcxAgent]) -> Pull:
    """Pull once; never raises for what a peer or a library does.

    Args:
        source: from whom.
        transport: ``tcp``, ``nixl`` or ``ucx``.
        seconds: for all of it.
        agent_of: returns this rank's agent of NIXL or UCX.
    """
    deadline = Deadline.after(seconds)
    pull = Pull(OK, transport=transport, cards=has_cards())
    try:
        agent = None if transport == TCP else agent_of(transport)
        with talk_to(source.address, source.port, Access(FETCH, source.run, source.key), deadline) as talk:
            fetcher = _OverTcp(talk) if agent is None else _ByReading(talk, agent, transport)
            pull = _take(pull, source, fetcher, deadline)
    except TimeoutError:
        pull = pull._replace(state=LATE, text=f"not done in {seconds:g} s")
    except (KeyError, TypeError, ValueError):
        pull = pull._replace(state=FAILED, text="it says something else than it should")
    except (OSError, TalkError, NixlError, UcxError, UsageError, MemoryError) as error:
        pull = pull._replace(state=FAILED, text=plain(" ".join(str(error).split()) or type(error).__name__))
    return pull if transport == TCP else _with_words_of_ucx(pull)


def _take(pull: Pull, source: Source, fetcher: _OverTcp | _ByReading, deadline: Deadline) -> Pull:
    began = time.monotonic()
    allowed = deadline.left() * _LARGE_SHARE
    for size, repeats in _REPEATS.items():
        # at the rate of the size before
        if pull.rate and size / pull.rate > allowed - (time.monotonic() - began):
            break
        wanted = pattern(source.run, source.rank, size)
        counters = Counters()
        times: list[float] = []
        for turn in range(repeats + 1):
            got, took = fetcher.fetch(size)
            # the first brings the way to life
            if turn == 0:
                pull = pull._replace(wrong=pull.wrong or got != wanted)
            times.append(took)
            if turn and time.monotonic() - began > allowed:
                break
        best = min(times)
        if size == SMALL_BYTES:
            pull = pull._replace(seconds=min(times[1:]))
        else:
            pull = pull._replace(size=size, rate=size / best, ways=fetcher.ways(counters, size * len(times)))
    return pull


def _with_words_of_ucx(pull: Pull) -> Pull:
    log = _log()
    ways = ways_of_reads(log) or pull.ways
    return pull._replace(ways=ways, warnings=warnings_of(log))


def _log() -> str:
    """Return what the libraries have written to stderr, which is a file in memory here."""
    try:
        return os.pread(2, _LOG_BYTES, 0).decode("utf-8", "replace")
    except OSError:
        return ""


class _OverTcp:
    """Asks the station for the bytes themselves."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk

    def fetch(self, size: int) -> tuple[bytes | bytearray, float]:
        target = bytearray(size)
        start = time.perf_counter()
        self._talk.say(send=size)
        self._talk.receive_into(target)
        return target, time.perf_counter() - start

    def ways(self, counters: Counters, size: int) -> tuple[str, ...]:
        address = self._talk.local_address
        name = next((name for name, found in interface_addresses().items() if address in map(str, found)), "")
        # to an address of its own, a host goes over loopback
        return (f"tcp/{counters.busiest(size) or name}".rstrip("/"),)


class _ByReading:
    """Asks the station where they are, and reads them."""

    def __init__(self, talk: Talk, agent: NixlAgent | UcxAgent, transport: str) -> None:
        import numpy as np

        self._talk, self._agent = talk, agent
        talk.say(locate=transport)
        told = talk.hear()
        self._address, self._description = int(told["address"]), base64.b64decode(told["agent"], validate=True)
        self._target: Any = np.zeros(LARGE_BYTES // 4, np.float32)

    def fetch(self, size: int) -> tuple[bytes, float]:
        target = self._target[: size // 4]
        # what came before begins alike
        target.fill(0)
        start = time.perf_counter()
        if isinstance(self._agent, NixlAgent):
            # keys and values, as the engine reads them: two halves
            half = size // 2
            located = Located(self._address, half, half, self._description)
            self._agent.read(located, target.reshape(2, 1, -1), lambda _: self._look())
        else:
            self._agent.read(self._address, self._description, target, self._look)
        took = time.perf_counter() - start
        return target.tobytes(), took

    def ways(self, counters: Counters, size: int) -> tuple[str, ...]:
        name = counters.busiest(size)
        return (name,) if name else ()

    def _look(self) -> None:
        """Go on at once: what is measured is the way, not a pause; the deadline ends it."""
        if self._talk.readable():
            self._talk.hear()
            raise TalkError("it says something out of turn")
