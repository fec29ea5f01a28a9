# SPDX-License-Identifier: Apache-2.0
"""Failures as node agents observe and exchange them: order, encoding, report; phases and signals before. Pure but for the clock."""

from __future__ import annotations

import contextlib
import json
import time

from dynamo_mpi.common.failure import ENDED_BY_MPI, DetectedBy, Failure, describe_consequences, root_cause
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any, NamedTuple
from dynamo_mpi.common.phases import phase_of_failure
from dynamo_mpi.supervisor.failure_reports import died_with_agent, host_lost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.common.xids import GpuError
    from dynamo_mpi.supervisor.agent_peers import LostAgent


MAX_TEXT = 4000
"""Largest number of characters of a failure's text that node agents exchange."""
_MAX_REPORT = 8000
_MAX_CONSEQUENCES = 8
_MAX_GPU_ERRORS = 8
# wait for the other agents' answers, or for their joining if none has joined yet
_SETTLE_SECONDS = 0.4
_NO_AGENTS_SETTLE_SECONDS = 0.3
# ranks of one node only: everything that is readable is read in the order in which it happened
_SINGLE_NODE_SETTLE_SECONDS = 0.02
# Slurm's PMIx plugin kills a step because of a death, agents too: 0.05 s later on an idle machine, and without a signal before
_IN_STEP_SETTLE_SECONDS = 0.03


class ObservedFailure(NamedTuple):
    """A failure and the node of its rank."""

    failure: Failure
    host: str


class Report(NamedTuple):
    """A report about one or several failures.

    Args:
        failure: the root cause.
        host: the node where it happened.
        text: the text for the log.
        consequences: the failures that followed from it.
        reporter: the rank under whose name the report is logged.
        reporter_host: the reporter's node.
        gpu_errors: what the driver has reported of the ranks' GPUs before, see `with_gpu_errors`.
    """

    failure: Failure
    host: str
    text: str
    consequences: tuple[ObservedFailure, ...]
    reporter: int
    reporter_host: str
    gpu_errors: tuple[GpuError, ...] = ()


def first_of_each_rank(observed: Sequence[ObservedFailure]) -> list[ObservedFailure]:
    """Return each rank's first failure, in the order in which they happened."""
    found: dict[int, ObservedFailure] = {}
    for each in sorted(observed, key=lambda one: one.failure.at):
        found.setdefault(each.failure.rank, each)
    return list(found.values())


def lacks_cause(observed: Sequence[ObservedFailure]) -> bool:
    """Return whether only consequences were observed: ranks that Open MPI has ended because of another's death."""
    return bool(observed) and all(ENDED_BY_MPI in each.failure.text for each in observed)


def settle_seconds(observed: Sequence[ObservedFailure], is_in_step: bool, has_network: bool, has_agents: bool) -> float:
    """Return how long an agent that decides waits for what the other agents know.

    Args:
        observed: what it knows.
        is_in_step: whether Slurm's PMIx plugin ends the ranks.
        has_network: whether there are other nodes.
        has_agents: whether their agents have joined.
    """
    if not has_agents:
        return _NO_AGENTS_SETTLE_SECONDS if has_network else _SINGLE_NODE_SETTLE_SECONDS
    return _IN_STEP_SETTLE_SECONDS if is_in_step and not lacks_cause(observed) else _SETTLE_SECONDS


def with_lost_agents(
    observed: Sequence[ObservedFailure], lost: Sequence[LostAgent], signalled: Sequence[int] = ()
) -> list[ObservedFailure]:
    """Add the deaths that no agent was left to observe, if only their consequences were observed.

    Args:
        observed: at least one failure, in the order in which they happened.
        lost: the agents that are lost and not replaced, but at the end in order, when agents leave before rank 0. The first rank of a node
            replaces its agent, so it is dead too.
        signalled: the ranks that a launcher has signalled, as it does before it kills them because of another's death.
    """
    others = [each for each in observed if each.failure.rank not in signalled]
    if others and not lacks_cause(others):
        return list(observed)
    deaths = []
    for number, host, at in lost:
        error = died_with_agent(host)
        failure = Failure(
            number, int(error.exit_code), str(error), DetectedBy.DISCONNECT, observed[0].failure.phase, at
        )
        deaths.append(ObservedFailure(failure, host))
    return first_of_each_rank([*deaths, *observed])


def lost_hub(host: str, phase: str, at: float) -> ObservedFailure:
    """Return all that is known of rank 0's node, if its agent was lost first."""
    error = host_lost(host)
    return ObservedFailure(Failure(0, int(error.exit_code), str(error), DetectedBy.HOST_UNREACHABLE, phase, at), host)


def compose_report(observed: Sequence[ObservedFailure], phase: str) -> Report:
    """Compose the report about failures, under the name of the rank that failed first.

    Args:
        observed: at least one failure, in the order in which they happened.
        phase: the world's phase; empty if it isn't known.
    """
    failures = [each.failure for each in observed]
    hosts = {each.failure.rank: each.host for each in observed}
    first = root_cause(failures)

    def name(ranks: Sequence[int]) -> str:
        return " and ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)

    parts = [
        f"error in {phase_of_failure(phase, first.phase)}: {first.text}",
        describe_consequences(first, failures, name),
    ]
    consequences = tuple(each for each in observed if each.failure is not first)
    host = hosts[first.rank]
    return Report(first, host, "\n".join(filter(None, parts)), consequences, first.rank, host)


def explain_signal(report: Report, observed: Sequence[ObservedFailure], phase: str) -> Report:
    """Return rank 0's report; if it knows of a signal alone, a report about the deaths that the agents have observed, and the signal.

    A launcher may signal rank 0 before rank 0 learns why, above all of a rank that dies before it has connected to rank 0.
    """
    if report.failure.cause is not DetectedBy.SIGNAL or not observed:
        return report
    known = (*observed, ObservedFailure(report.failure, report.host), *report.consequences)
    return compose_report(first_of_each_rank(known), phase)


def with_gpu_errors(report: Report, errors: Sequence[GpuError]) -> Report:
    """Add what the driver has reported of the ranks' GPUs before a failure, the latest ones; those that may be its cause first."""
    if not errors:
        return report
    failed = report.failure.at
    shown = tuple(sorted(errors, key=lambda error: not error.may_be_cause(failed)))
    lines = [f"    {error} of {error.host}, {max(0.0, failed - error.at):.1f} s before" for error in shown]
    return report._replace(text="\n".join([report.text, "  GPU errors by the driver:", *lines]), gpu_errors=shown)


def encode_observed(observed: ObservedFailure) -> str:
    """Encode a failure as one line for another process, maybe on another host: the time becomes an age, a long text is clipped."""
    clipped = observed.failure._replace(text=clip(observed.failure.text, MAX_TEXT))
    return json.dumps({**_failure_as_dict(clipped), "host": observed.host})


def decode_observed(text: str) -> ObservedFailure | None:
    """Decode the result of `encode_observed`; None if the text isn't valid."""
    try:
        content = json.loads(text)
        return ObservedFailure(_failure_from_dict(content), str(content["host"]))
    except (ValueError, KeyError, TypeError):
        return None


def clip(text: str, max_chars: int) -> str:
    """Return the text; of a longer one, its beginning and, mostly, its end, which says the most in a traceback."""
    return text if len(text) <= max_chars else f"{text[: max_chars // 4]}\n[…]\n{text[-(max_chars - max_chars // 4) :]}"


def encode_report(report: Report) -> str:
    """Encode a report as one line, clipped to what a socket takes in one send."""
    content = {
        "failure": _failure_as_dict(report.failure._replace(text=clip(report.failure.text, _MAX_REPORT))),
        "host": report.host,
        "text": clip(report.text, _MAX_REPORT),
        "later": [encode_observed(each) for each in report.consequences[:_MAX_CONSEQUENCES]],
        "speaker": report.reporter,
        "speaker_host": report.reporter_host,
    }
    return json.dumps(content)


def decode_report(text: str) -> Report | None:
    """Decode the result of `encode_report`; None if the text isn't valid."""
    try:
        content = json.loads(text)
        consequences = tuple(observed for each in content["later"] if (observed := decode_observed(each)) is not None)
        host, report_text = str(content["host"]), str(content["text"])
        return Report(
            _failure_from_dict(content["failure"]),
            host,
            report_text,
            consequences,
            int(content["speaker"]),
            str(content["speaker_host"]),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _failure_as_dict(failure: Failure) -> dict[str, Any]:
    age = max(0.0, time.monotonic() - failure.at) if failure.at else 0.0
    return {**failure._asdict(), "cause": int(failure.cause), "at": age}


def _failure_from_dict(content: dict[str, Any]) -> Failure:
    return Failure(
        int(content["rank"]),
        int(content["exit_code"]),
        str(content["text"]),
        DetectedBy(content["cause"]),
        str(content["phase"]),
        time.monotonic() - float(content["at"]),
        int(content["sequence"]),
    )


# a launcher that ends the ranks kills those that are left after some seconds
_SIGNALLED_SECONDS = 5.0


class History:
    """Records phases and signals; times are seconds of the monotonic clock.

    Args:
        size: ranks of the world.

    Attributes:
        phase: the world's phase, which is rank 0's; empty if it isn't known.
        gpu_errors: Xids of the ranks' GPUs, as the agents report them.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.phase = ""
        self._phases: list[tuple[float, str]] = []
        self._signalled_at: dict[int, float] = {}
        self.gpu_errors: list[GpuError] = []

    def note_phase(self, phase: str) -> None:
        """Record that a phase begins."""
        self.phase = phase
        self._phases.append((time.monotonic(), phase))

    def note_gpu_error(self, content: object) -> None:
        """Record an Xid, which `GpuError.as_document` has encoded just now."""
        # an agent of a worker without GPUs, and every rank, does without it
        from dynamo_mpi.common.xids import GpuError, needs_repair

        with contextlib.suppress(KeyError, TypeError, ValueError):
            new = GpuError.of(content, time.monotonic())
            # one fault brings many that follow from it: the first of each kind counts, and those that need a repair stay
            if all((new.xid, new.uuid, new.host) != (each.xid, each.uuid, each.host) for each in self.gpu_errors):
                ordered = sorted([*self.gpu_errors, new], key=lambda error: (needs_repair(error.xid), error.at))
                self.gpu_errors = ordered[-_MAX_GPU_ERRORS:]

    def phase_at(self, when: float) -> str:
        """Return the phase at a time. Later phases may be consequences: after a death, the launcher's signal to rank 0 starts a drain."""
        before = [phase for since, phase in self._phases if since <= when]
        return before[-1] if before else self.phase

    @property
    def signalled(self) -> list[int]:
        """The ranks that got a signal to end within the last seconds."""
        now = time.monotonic()
        return [rank for rank, at in self._signalled_at.items() if now - at < _SIGNALLED_SECONDS]

    def note_signal(self, rank: int) -> None:
        """Record that a rank got a signal to end."""
        self._signalled_at[rank] = time.monotonic()

    def was_ended_by_launcher(self, rank: int) -> bool:
        """Return whether the launcher was asked to end a rank that has exited: it signals all ranks before it kills them."""
        recent = self.signalled
        # a signal to rank 0 alone asks for a drain
        return rank in recent and (rank != 0 or self._size == 1 or len(recent) > 1)
