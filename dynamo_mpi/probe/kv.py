# SPDX-License-Identifier: Apache-2.0
"""The KV probe: each decode rank pulls from the prefill ranks that it will pull from, over the transport that the engine will use.

Needs two workers. Every rank of the first leaves a small process that can be asked for a while (`kv_station`); the second's rank 0 has the
decode ranks pull, whichever side it is (`kv_lead`), and both sides judge what came out.
"""

from __future__ import annotations

import json
import threading
from statistics import median
from typing import TYPE_CHECKING, Any

from dynamo_mpi.probe.kv_answer import OK, Between
from dynamo_mpi.probe.kv_child import Ready, StationChild
from dynamo_mpi.probe.kv_rules import check_kv, describe_pair, show_rate, show_time
from dynamo_mpi.probe.kv_terms import PARTNER, TCP, KvTerms
from dynamo_mpi.probe.part import Outcome
from dynamo_mpi.probe.payload import is_spoilt
from dynamo_mpi.probe.plan import start_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dynamo_mpi.probe.part import Case, Part


class Kept:
    """This rank's station, once it can be asked, and whom to tell of what it hears."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Any] = []
        self._on_told: Callable[[Any], None] | None = None
        self._on_end: Callable[[], None] | None = None
        self._ended = False

    def told(self, content: Any) -> None:
        """Hand it on, or keep it until somebody listens."""
        with self._lock:
            if self._on_told is None:
                self._waiting.append(content)
                return
        self._on_told(content)

    def ended(self) -> None:
        """Say that it can't be asked any more."""
        with self._lock:
            self._ended = True
            on_end = self._on_end
        if on_end is not None:
            on_end()

    def listen(self, on_told: Callable[[Any], None], on_end: Callable[[], None]) -> None:
        """Begin to hear; at once what has come before."""
        with self._lock:
            self._on_told, self._on_end = on_told, on_end
            waiting, ended = self._waiting, self._ended
        for content in waiting:
            on_told(content)
        if ended:
            on_end()


kept = Kept()


def measure(part: Part) -> list[str]:
    """Start this rank's station."""
    try:
        child = StationChild(KvTerms.unpack(part.plan.kv), part.world.rank, part.environ, spoilt=is_spoilt())
        ready = child.ready(start_seconds(part.plan.seconds))
    except OSError as error:  # no more processes, say: that is no reason to end a worker
        return Ready(f"its process can't be started: {error}").pack()
    if not ready.trouble:
        child.keep(kept.told, kept.ended)
    return ready.pack()


def judge(answers: Sequence[Sequence[str]], case: Case) -> Outcome:
    """Apply the rules.

    Args:
        answers: of `kv_lead.lead_kv`: what is known of each partner, as JSON, each in a list of its own.
        case: the world.
    """
    return judge_kv([Between.read(json.loads(answer)) for (answer,) in answers], KvTerms.unpack(case.plan.kv))


def judge_kv(told: Sequence[Between], terms: KvTerms) -> Outcome:
    """Apply the rules over what is known of each partner."""
    findings = [finding for between in told for finding in check_kv(between)]
    figures = {"peers": [figures_of(between) for between in told]}
    partner = PARTNER[terms.role]
    line = "; ".join(map(line_of, told)) or f"kv: can be asked by a {partner} worker for {terms.seconds:g} s"
    return Outcome(tuple(findings), figures, line)


def figures_of(between: Between) -> dict[str, Any]:
    """Return what is worth keeping, in few bytes whatever the number of pairs: the slowest and the middle rate in GB/s, the middle and the
    longest latency in microseconds, and who is slowest, as decode and prefill rank."""
    well = [(pair, pull) for pair, pull in between.pulls if pull.state == OK and pull.rate]
    figures: dict[str, Any] = {
        "peer": between.peer,
        "over": _over(between),
        "ways": sorted({way for _, pull in between.pulls for way in pull.ways}),
        "pairs": len(between.pulls),
        "through": len(well),
    }
    if well:
        slowest, pull = min(well, key=lambda one: one[1].rate)
        rates, times = [one.rate for _, one in well], [one.seconds for _, one in well]
        figures["bytes"] = pull.size
        figures["gbps"] = [round(pull.rate / 1e9, 3), round(median(rates) / 1e9, 3)]
        figures["us"] = [round(1e6 * median(times), 1), round(1e6 * max(times), 1)]
        figures["slowest"] = list(slowest)
    return figures


def line_of(between: Between) -> str:
    """Say it in one line."""
    well = [(pair, pull) for pair, pull in between.pulls if pull.state == OK and pull.rate]
    if not well:
        if between.pulls:
            return f"kv: nothing came through between this worker and the {between.peer}"
        return f"kv: not probed: {between.problem or 'no time left'}"
    pair, pull = min(well, key=lambda one: one[1].rate)
    times = median(one.seconds for _, one in well)
    count = f"{len(well)} of {len(between.pulls)} pairs" if len(well) < len(between.pulls) else _pairs(len(well))
    ways = " ".join(sorted({way for _, one in well for way in one.ways if way != between.wanted}))
    over = _over(between) + (f" ({ways})" if ways else "")
    over += f" instead of {between.wanted}: {between.reason}" if between.reason else ""
    skipped = f"; {_pairs(between.skipped)} not probed for want of time" if between.skipped else ""
    slowest = f"{show_rate(pull.rate)} slowest, {describe_pair(between, pair)}"
    return f"kv: {count} over {over}: {slowest}; {show_time(times)}{skipped}"


def _over(between: Between) -> str:
    return next((pull.transport for _, pull in between.pulls), TCP)


def _pairs(count: int) -> str:
    return "1 pair" if count == 1 else f"{count} pairs"
