# SPDX-License-Identifier: Apache-2.0
"""What is known of a rank and its world, and what a probe is told of it. Pure.

A rank tells it in lines of a word and a text; nothing goes the other way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from dynamo_mpi import __version__
from dynamo_mpi.common.phases import PHASES
from dynamo_mpi.supervisor.rendezvous import Rendezvous
from dynamo_mpi.telemetry.metrics import Metric, Sample, render

SERVING = "serve"
_ENDS = "the world ends"
# what a phase lasts until
_WAITS_FOR = {
    "environment": "this rank to start MPI",
    "mpi_init": "all ranks of all nodes to start MPI",
    "preflight": "rank 0's verdict",
    "hardware_check": "the GPUs and the ways between the ranks to be asked",
    "load": "all ranks to load the model",
    "warmup": "the first completion over all ranks",
    "register": "Dynamo's registration",
    "serve": "",
    "drain": "requests in flight to end",
    "exit": "all ranks to leave",
}
FACTS = ("role", "engine", "model", "namespace", "component", "endpoint", "trace")
"""What is told of the worker once it is known."""


class HealthState(NamedTuple):
    """What is known.

    Args:
        rank: its number.
        host: its node.
        pid: its process.
        born: when it began, in seconds since 1970.
        began: the same, by the monotonic clock.
        attempt: which start of this worker it is.
        phase: what the rank does.
        world: what rank 0 has said that the world does; empty before the verdict.
        since: when the world's phase began, in seconds since 1970.
        ending: why the world ends; empty as long as it doesn't.
        heard: when the rank last said something, by the monotonic clock.
        heartbeat_timeout: see `Rendezvous`.
        runtime: port of the Dynamo runtime's own answers; 0 where there is none, as on any rank but 0.
        facts: of `FACTS`.
        progress: how far the ranks are, in words.
        metrics: more of them, as text.
    """

    rank: int
    host: str
    pid: int
    born: float
    began: float
    attempt: int = 1
    phase: str = PHASES[0]
    world: str = ""
    since: float = 0.0
    ending: str = ""
    heard: float = 0.0
    heartbeat_timeout: float | None = None
    runtime: int = 0
    facts: tuple[tuple[str, str], ...] = ()
    progress: str = ""
    metrics: str = ""

    @property
    def world_phase(self) -> str:
        """What the world does: before the verdict, all that is known of it is this rank."""
        return self.world or self.phase

    def silence(self, now: float) -> float:
        """Return for how long the rank has been silent if that is too long, else 0."""
        patience = Rendezvous(self.host, heartbeat_timeout=self.heartbeat_timeout).heartbeat_timeout_for(self.phase)
        return now - self.heard if patience is not None and now - self.heard > patience else 0.0


class Answer(NamedTuple):
    """What a probe gets.

    Args:
        status: HTTP's.
        body: for JSON.
    """

    status: int
    body: dict[str, Any]


def note(state: HealthState, line: str, now: float, wall: float) -> HealthState:
    """Return what is known after one more line. One that isn't understood changes nothing but when the rank was heard.

    Args:
        state: what was known.
        line: what the rank has said.
        now: by the monotonic clock.
        wall: seconds since 1970.
    """
    state = state._replace(heard=now)
    word, _, text = line.partition(" ")
    if word in ("phase", "world") and text in PHASES:
        before = state.world_phase
        state = state._replace(phase=text) if word == "phase" else state._replace(world=text)
        return state if state.world_phase == before and state.since else state._replace(since=wall, progress="")
    if word == "rank" and text.isdecimal():
        return state._replace(rank=int(text))
    if word == "runtime" and text.isdecimal():
        return state._replace(runtime=int(text))
    if word == "ending":
        known = state.ending if state.ending != _ENDS else ""
        return state._replace(ending=known or unescape(text) or _ENDS)
    if word == "progress":
        return state._replace(progress=unescape(text))
    if word == "metrics":
        return state._replace(metrics=unescape(text))
    if word in FACTS:
        return state._replace(facts=tuple({**dict(state.facts), word: unescape(text)}.items()))
    return state


def escape(text: str) -> str:
    """Put a text on one line."""
    return text.encode("unicode_escape").decode("ascii")


def unescape(text: str) -> str:
    """Undo `escape`; what isn't its work stays as it is."""
    try:
        return text.encode("ascii").decode("unicode_escape")
    except UnicodeError:
        return text


def live(state: HealthState, now: float) -> Answer:
    """Say whether the process should go on living: an orderly end is no reason to kill it."""
    trouble = state.ending
    if silent := state.silence(now):
        trouble = trouble or f"rank {state.rank} has said nothing for {silent:.0f} s: it is stopped or stuck"
    return _answer(state, trouble, now)


def health(state: HealthState, now: float, runtime: tuple[int, dict[str, Any]] | None = None) -> Answer:
    """Say whether the world answers requests.

    Args:
        state: what is known.
        now: by the monotonic clock.
        runtime: status and body of the Dynamo runtime's own answer; status 0 where it gave none; None where there is no runtime to ask.
    """
    answer = live(state, now)
    trouble = answer.body.get("error", "")
    if not trouble and state.world_phase != SERVING:
        trouble = f"the world is in {state.world_phase}"
    if not trouble and runtime is not None and runtime[0] != 200:
        trouble = (
            f"the Dynamo runtime says that it is not ready ({runtime[0]})"
            if runtime[0]
            else f"the Dynamo runtime does not answer at its port {state.runtime}"
        )
    answer = _answer(state, trouble, now)
    if runtime is not None and isinstance(endpoints := runtime[1].get("endpoints"), dict):
        answer.body["endpoints"] = endpoints
    return answer


def _answer(state: HealthState, trouble: str, now: float) -> Answer:
    seconds = max(0.0, now - state.began)
    body: dict[str, Any] = {
        # as Dynamo's own answer has it
        "status": "notready" if trouble else "ready",
        "uptime": {"secs": int(seconds), "nanos": int(seconds % 1 * 1e9)},
        "endpoints": {},
        "phase": state.world_phase,
        "phase_since": state.since or state.born,
        "rank": state.rank,
        "rank_phase": state.phase,
        "rank_silent_seconds": round(max(0.0, now - state.heard), 1),
        "host": state.host,
        "pid": state.pid,
        "attempt": state.attempt,
    }
    body.update(state.facts)
    if waits_for := _WAITS_FOR[state.world_phase]:
        body["waits_for"] = f"{waits_for}: {state.progress}" if state.progress else waits_for
    if trouble:
        body["error"] = trouble
    return Answer(503 if trouble else 200, body)


def metrics_of(state: HealthState, *, ready: bool) -> str:
    """Write down what every node can tell of its world, and behind it what its rank has told.

    Args:
        state: what is known.
        ready: what `health` says.
    """
    return render(world_metrics(state, ready=ready)) + state.metrics


def world_metrics(state: HealthState, *, ready: bool) -> tuple[Metric, ...]:
    """Return the metrics that every node has."""
    facts = dict(state.facts)
    info = {name: facts.get(name, "") for name in ("engine", "role", "model")}
    info |= {"dynamo_namespace": facts.get("namespace", ""), "dynamo_component": facts.get("component", "")}
    phases = tuple(Sample(float(name == state.world_phase), {"phase": name}) for name in PHASES)
    return (
        Metric("dynamo_mpi_build_info", "gauge", "What runs here.", (Sample(1, {"version": __version__, **info}),)),
        Metric("dynamo_mpi_ready", "gauge", "Whether the world answers requests.", (Sample(float(ready)),)),
        Metric("dynamo_mpi_phase", "gauge", "Which phase the world is in: 1 for that one.", phases),
        Metric("dynamo_mpi_phase_start_time_seconds", "gauge", "When that phase began.", (Sample(state.since),)),
        Metric("dynamo_mpi_start_time_seconds", "gauge", "When this rank began.", (Sample(state.born),)),
        Metric("dynamo_mpi_attempt", "gauge", "Which start of this worker it is.", (Sample(state.attempt),)),
    )
