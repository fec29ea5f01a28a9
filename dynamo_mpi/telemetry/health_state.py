# SPDX-License-Identifier: Apache-2.0
"""The state of a rank and its world in the node agent, and the answers to health requests. Pure.

The rank sends each value as a word and a text.
"""

from __future__ import annotations

from dynamo_mpi import __version__
from dynamo_mpi.common.light_typing import Any, NamedTuple
from dynamo_mpi.common.phases import PHASES
from dynamo_mpi.supervisor.rendezvous import Rendezvous
from dynamo_mpi.telemetry.metrics import Metric, Sample, render

SERVING = "serve"
_ENDS = "the world ends"
# what ends a phase
_WAITS_FOR = {
    "environment": "this rank to start MPI",
    "mpi_init": "all ranks of all nodes to start MPI",
    "preflight": "rank 0's verdict",
    "hardware_check": "the checks of the GPUs and of the links between the ranks",
    "stage": "all nodes to have a copy of the model, and the ranks their compile caches",
    "load": "all ranks to load the model",
    "warmup": "the first completion over all ranks",
    "register": "Dynamo's registration",
    "serve": "",
    "drain": "requests in flight to end",
    "exit": "all ranks to leave",
}
FACTS = ("role", "engine", "model", "namespace", "component", "endpoint", "trace")
"""Names of the facts about the worker."""


class HealthState(NamedTuple):
    """The state.

    Args:
        rank: its number.
        host: its node.
        pid: its process.
        born: when it started, in seconds since 1970.
        began: the same, by the monotonic clock.
        attempt: the number of this start of the worker.
        phase: the rank's phase.
        world: the world's phase, as announced by rank 0; empty before the preflight.
        since: when the world's phase began, in seconds since 1970.
        ending: why the world ends; empty if it doesn't.
        last_seen: when the rank last sent something, by the monotonic clock.
        heartbeat_timeout: see `Rendezvous`.
        runtime: port of the Dynamo runtime's own server; 0 if there is none, as on ranks other than 0.
        facts: values by name, see `FACTS`.
        progress: the ranks' progress, as text.
        metrics: more metrics, as text.
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
    last_seen: float = 0.0
    heartbeat_timeout: float | None = None
    runtime: int = 0
    facts: tuple[tuple[str, str], ...] = ()
    progress: str = ""
    metrics: str = ""

    @property
    def world_phase(self) -> str:
        """The world's phase; before the preflight only this rank's phase is known."""
        return self.world or self.phase

    def silence(self, now: float) -> float:
        """Return for how long the rank has been silent if that is too long, else 0."""
        timeout = Rendezvous(self.host, heartbeat_timeout=self.heartbeat_timeout).heartbeat_timeout_for(self.phase)
        return now - self.last_seen if timeout is not None and now - self.last_seen > timeout else 0.0


class Answer(NamedTuple):
    """The answer to a probe.

    Args:
        status: HTTP's.
        body: the JSON object.
    """

    status: int
    body: dict[str, Any]


def note(state: HealthState, line: str, now: float, wall: float) -> HealthState:
    """Return the state after one more line. A line that isn't understood only updates ``last_seen``.

    Args:
        state: the state before.
        line: the line from the rank.
        now: by the monotonic clock.
        wall: seconds since 1970.
    """
    state = state._replace(last_seen=now)
    word, _, text = line.partition(" ")
    if word in ("phase", "world"):
        return _enter(state, word, text, wall)
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


def _enter(state: HealthState, word: str, text: str, wall: float) -> HealthState:
    """Return the state in another phase; ``text`` is its name, and maybe since when."""
    phase, _, since = text.partition(" ")
    if phase not in PHASES:
        return state
    before = state.world_phase
    state = state._replace(phase=phase) if word == "phase" else state._replace(world=phase)
    if state.world_phase == before and state.since:
        return state
    try:
        began = float(since)
    except ValueError:
        began = wall
    return state._replace(since=began, progress="")


def escape(text: str) -> str:
    """Encode a text as one line."""
    return text.encode("unicode_escape").decode("ascii")


def unescape(text: str) -> str:
    """Undo `escape`; other text is returned unchanged."""
    try:
        return text.encode("ascii").decode("unicode_escape")
    except UnicodeError:
        return text


def live(state: HealthState, now: float) -> Answer:
    """Return the liveness answer; an orderly end is no reason to kill the process."""
    problem = state.ending
    if silent := state.silence(now):
        problem = problem or f"no heartbeat from rank {state.rank} for {silent:.0f} s: the process is stopped or hung"
    return _answer(state, problem, now)


def health(state: HealthState, now: float, runtime: tuple[int, dict[str, Any]] | None = None) -> Answer:
    """Return the readiness answer: whether the world serves.

    Args:
        state: the state.
        now: by the monotonic clock.
        runtime: status and body of the Dynamo runtime's own answer; status 0 if it gave none; None if there is no runtime to query.
    """
    answer = live(state, now)
    problem = answer.body.get("error", "")
    if not problem and state.world_phase != SERVING:
        problem = f"the world is in {state.world_phase}"
    if not problem and runtime is not None and runtime[0] != 200:
        problem = (
            f"the Dynamo runtime reports that it is not ready ({runtime[0]})"
            if runtime[0]
            else f"the Dynamo runtime does not answer at its port {state.runtime}"
        )
    answer = _answer(state, problem, now)
    if runtime is not None and isinstance(endpoints := runtime[1].get("endpoints"), dict):
        answer.body["endpoints"] = endpoints
    return answer


def _answer(state: HealthState, problem: str, now: float) -> Answer:
    seconds = max(0.0, now - state.began)
    body: dict[str, Any] = {
        # the format of Dynamo's own answer
        "status": "notready" if problem else "ready",
        "uptime": {"secs": int(seconds), "nanos": int(seconds % 1 * 1e9)},
        "endpoints": {},
        "phase": state.world_phase,
        "phase_since": state.since or state.born,
        "rank": state.rank,
        "rank_phase": state.phase,
        "rank_silent_seconds": round(max(0.0, now - state.last_seen), 1),
        "host": state.host,
        "pid": state.pid,
        "attempt": state.attempt,
    }
    body.update(state.facts)
    if waits_for := _WAITS_FOR[state.world_phase]:
        body["waits_for"] = f"{waits_for}: {state.progress}" if state.progress else waits_for
    if problem:
        body["error"] = problem
    return Answer(503 if problem else 200, body)


def metrics_of(state: HealthState, *, ready: bool) -> str:
    """Format the metrics that every node has, followed by those that its rank has sent.

    Args:
        state: the state.
        ready: whether `health` reports ready.
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
        Metric("dynamo_mpi_attempt", "gauge", "The number of this start of the worker.", (Sample(state.attempt),)),
    )
