# SPDX-License-Identifier: Apache-2.0
"""Rank 0's part of the KV probe: publishes where its ranks can be asked, and has decode ranks pull between this world and its partners.

Whoever comes to it second finds the other's offer in its world record, and asks. Every pull is asked for by a connection to the decode
rank's station; decode ranks go on side by side, and no prefill rank serves two of them at once. All of it ends by the deadline.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dynamo_mpi.engines.reference.kv_wire import Deadline
from dynamo_mpi.errors import BootstrapError
from dynamo_mpi.launchers.placement import describe_ranks
from dynamo_mpi.probe.kv_answer import FAILED, LATE, Between, Pull, read_pull
from dynamo_mpi.probe.kv_child import Ready
from dynamo_mpi.probe.kv_pairs import Pair, pairs_of
from dynamo_mpi.probe.kv_terms import LOAD_SECONDS, NIXL, TCP, UCX, Offer, Station, plain
from dynamo_mpi.probe.kv_wire import FETCH, ORDER, RUN_BYTES, TalkError, access_of, talk_to

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from dynamo_mpi.control_plane.records import WorkerRecord
    from dynamo_mpi.launchers.placement import Placed
    from dynamo_mpi.probe.kv_terms import KvTerms
    from dynamo_mpi.probe.kv_wire import Access

_PULL_SECONDS = 6.0
# in less, a pull that is well may not come to its end
_LEAST_SECONDS = 1.0
# that a station may take beyond its pull's deadline, to say so
_GRACE_SECONDS = 2.0
_OPEN_SECONDS = 4.0
_REPORT_SECONDS = 3.0
_MOST_THREADS = 64
# of a message's 1 MiB
_MOST_REPORTED = 2048
_OTHER = {NIXL: UCX, UCX: NIXL}
_PACKAGES = {NIXL: "NIXL's Python package", UCX: "UCX's library (libucp.so.0)"}
_NOT_YET = ("environment", "world", "preflight", "probe")


class Registry(Protocol):
    """What the probe needs of the control plane."""

    def offer_kv(self, offer: dict[str, Any]) -> tuple[WorkerRecord, Sequence[WorkerRecord]] | None:
        """Publish the offer, and return this world's record and its partners', as they stand after that; None without etcd."""
        ...


class Side(NamedTuple):
    """One of two worlds.

    Args:
        record: what it says of itself.
        offer: where its ranks can be asked.
    """

    record: WorkerRecord
    offer: Offer


def lead_kv(
    answers: Sequence[Sequence[str]],
    ranks: Sequence[Placed],
    terms: KvTerms,
    transport: str,
    registry: Registry,
    end: float,
) -> list[list[str]]:
    """Publish, and probe with every partner that has come to its own probe already.

    Args:
        answers: the ranks', of `kv.measure`.
        ranks: where each is.
        terms: of the probe.
        transport: that this world's configuration names.
        registry: the control plane.
        end: when it has to have ended, by `time.monotonic`.

    Returns:
        For `kv.judge`: what is known of each partner.
    """
    ready = [Ready.unpack(list(answer)) for answer in answers]
    failed = [rank for rank, one in enumerate(ready) if one.trouble]
    if failed:
        told = f"{describe_ranks(failed, ranks)} can't take part: {ready[failed[0]].trouble}"
        return [_packed(Between("partner", terms.role, transport, problem=told))]
    stations = tuple(Station(place.host, one.address, one.port) for place, one in zip(ranks, ready, strict=True))
    able = tuple(name for name in (NIXL, UCX) if all(name in one.able for one in ready))
    offer = Offer(terms.token, transport, able, stations)
    known = registry.offer_kv(offer.as_json())
    if known is None:
        return [_packed(Between("partner", terms.role, transport, problem="it has no world record in etcd"))]
    own, peers = known
    betweens = [_probe(Side(own, offer), peer, end) for peer in peers]
    return [_packed(between) for between in betweens if between is not None]


def _packed(between: Between) -> list[str]:
    return [json.dumps(between.as_json())]


def _probe(own: Side, peer: WorkerRecord, end: float) -> Between | None:
    """Probe with one partner; None where it has not come so far, and will ask us."""
    role, wanted = own.record.role, own.offer.transport
    if peer.probe_kv is None:
        if peer.phase in _NOT_YET:
            return None
        reason = "it can't be asked: it runs without --probe kv, or has done so for longer than --probe-kv-seconds"
        return Between(peer.place, role, wanted, problem=reason)
    try:
        theirs = Side(peer, Offer.read(peer.probe_kv))
        prefill, decode = (own, theirs) if role == "prefill" else (theirs, own)
        pairs = _pairs(prefill, decode)
    except (
        ValueError,
        ArithmeticError,
        LookupError,
        BootstrapError,
    ) as error:  # whatever it says is no reason to end a worker
        return Between(peer.place, role, wanted, problem=f"what its record says can't be used: {plain(str(error))}")
    # the prefill side's, as with the reference engine; for TensorRT-LLM both name the same one (I6)
    wanted = prefill.offer.transport
    transport, reason = _choose(wanted, prefill.offer, decode.offer)
    conduct = _Conduct(prefill, decode, transport, end)
    if transport != TCP:
        conduct.prepare(pairs)
    pulls, skipped = conduct.pull(pairs)
    between = Between(
        peer.place,
        role,
        wanted,
        (tuple(one.node for one in prefill.offer.stations), tuple(one.node for one in decode.offer.stations)),
        tuple(one.address for one in prefill.offer.stations),
        pulls,
        skipped,
        reason,
    )
    if pulls:
        told = between._replace(peer=own.record.place, role=peer.role, pulls=pulls[:_MOST_REPORTED])
        _report(told, theirs.offer, Deadline(min(time.monotonic(), end) + _REPORT_SECONDS))
    return between


def _pairs(prefill: Side, decode: Side) -> tuple[Pair, ...]:
    if prefill.record.contract is None or decode.record.contract is None:
        raise ValueError("there is no contract")
    for contract, offer in ((prefill.record.contract, prefill.offer), (decode.record.contract, decode.offer)):
        if not 0 < contract.tp_size * contract.pp_size * contract.cp_size <= len(offer.stations):
            raise ValueError("it has fewer ranks than its layout")
    return pairs_of(prefill.record.contract, decode.record.contract)


def _choose(wanted: str, prefill: Offer, decode: Offer) -> tuple[str, str]:
    """Return what to probe over, and why that isn't what was wanted."""
    if wanted == TCP:
        return TCP, ""
    if wanted not in _OTHER:
        return TCP, f"there is no probe for {wanted}"
    for name in (wanted, _OTHER[wanted]):
        without = [side for side, offer in (("prefill", prefill), ("decode", decode)) if name not in offer.able]
        if not without:
            # either goes by UCX: the same variables, the same devices
            return name, "" if name == wanted else f"{_PACKAGES[wanted]} is missing on one side or both"
    return TCP, f"{_PACKAGES[NIXL]} and {_PACKAGES[UCX]} are missing on one side or both"


def _report(between: Between, offer: Offer, deadline: Deadline) -> None:
    """Tell the partner's rank 0 what was found, if it still listens."""
    station = offer.stations[0]
    access = access_of(offer.token, ORDER, secrets.token_bytes(RUN_BYTES))
    try:
        with talk_to(station.address, station.port, access, deadline) as talk:
            talk.say(told=between.as_json())
            talk.hear()
    except (OSError, TalkError):
        return  # what hinders it has shown in the pulls


class _Conduct:
    """Has the decode ranks of one world pull from the prefill ranks of another."""

    def __init__(self, prefill: Side, decode: Side, transport: str, end: float) -> None:
        self._prefill, self._decode = prefill.offer, decode.offer
        self._transport, self._end = transport, end
        self._run = secrets.token_bytes(RUN_BYTES)
        self._order = access_of(self._decode.token, ORDER, self._run)
        self._key = access_of(self._prefill.token, FETCH, self._run).key.hex()
        self._locks = [threading.Lock() for _ in self._prefill.stations]

    def prepare(self, pairs: Sequence[Pair]) -> None:
        """Have all ranks load what it goes over, at the same time: a NIXL that imports torch takes longer than a pull may."""
        served = access_of(self._prefill.token, ORDER, self._run)
        asked = {self._prefill.stations[pair.prefill]: served for pair in pairs}
        asked.update({self._decode.stations[pair.decode]: self._order for pair in pairs})
        with ThreadPoolExecutor(min(_MOST_THREADS, len(asked)), "kv-probe") as pool:
            list(pool.map(self._prepare, asked.items()))

    def _prepare(self, one: tuple[Station, Access]) -> None:
        station, access = one
        # half of the time is for the pulls, whatever becomes of this
        latest = (time.monotonic() + self._end) / 2
        try:
            opened = Deadline(min(latest, time.monotonic() + _OPEN_SECONDS))
            with talk_to(station.address, station.port, access, opened) as talk:
                talk.deadline = Deadline(min(latest, time.monotonic() + LOAD_SECONDS))
                talk.say(prepare=self._transport)
                talk.hear()
        except (OSError, TalkError):
            return  # what hinders it shows in the pulls

    def pull(self, pairs: Sequence[Pair]) -> tuple[tuple[tuple[Pair, Pull], ...], int]:
        """Return what came of each pair, and how many there was no time for."""
        by_decode: dict[int, list[Pair]] = {}
        for pair in pairs:
            by_decode.setdefault(pair.decode, []).append(pair)
        with ThreadPoolExecutor(min(_MOST_THREADS, len(by_decode)), "kv-probe") as pool:
            parts = list(pool.map(self._pull_all, by_decode.values()))
        pulls = tuple(one for part in parts for one in part)
        return pulls, len(pairs) - len(pulls)

    def _pull_all(self, pairs: Sequence[Pair]) -> list[tuple[Pair, Pull]]:
        """Have one decode rank pull from its prefill ranks, one after the other."""
        station = self._decode.stations[pairs[0].decode]
        done: list[tuple[Pair, Pull]] = []
        if self._seconds < _LEAST_SECONDS:
            return done  # other partners have taken it
        try:
            opened = Deadline(min(self._end, time.monotonic() + _OPEN_SECONDS))
            with talk_to(station.address, station.port, self._order, opened) as talk:
                for pair in pairs:
                    lock = self._locks[pair.prefill]
                    if not lock.acquire(timeout=max(0.0, self._end - time.monotonic())):
                        return done
                    try:
                        seconds = self._seconds
                        if seconds < _LEAST_SECONDS:
                            return done
                        talk.deadline = Deadline.after(seconds + _GRACE_SECONDS)
                        talk.say(**self._words(pair, seconds))
                        done.append((pair, read_pull(_part(talk.hear()))))
                    finally:
                        lock.release()
        except (OSError, TalkError, ValueError) as error:
            state = LATE if isinstance(error, TimeoutError) else FAILED
            why = "no answer in time" if state == LATE else plain(str(error) or type(error).__name__)
            told = f"decode rank {pairs[0].decode} on {station.node} ({station.address}): {why}"
            gone = Pull(state, told, self._transport)
            done += [(pair, gone) for pair in pairs[len(done) :]]
        return done

    @property
    def _seconds(self) -> float:
        """How long a pull that begins now may take."""
        return min(_PULL_SECONDS, self._end - time.monotonic() - _GRACE_SECONDS)

    def _words(self, pair: Pair, seconds: float) -> dict[str, Any]:
        source = self._prefill.stations[pair.prefill]
        return {
            "rank": pair.prefill,
            "address": source.address,
            "port": source.port,
            "key": self._key,
            "transport": self._transport,
            "seconds": seconds,
        }


def _part(answer: Mapping[str, Any]) -> Any:
    return answer.get("pull")
