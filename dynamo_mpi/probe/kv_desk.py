# SPDX-License-Identifier: Apache-2.0
"""Where the KV probe meets rank 0's life: it asks partners before the load, and afterwards hears what those find that come later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynamo_mpi.parallelism.contract import contract_of
from dynamo_mpi.parallelism.finding import Severity, render
from dynamo_mpi.probe import kv
from dynamo_mpi.probe.kv_answer import Between
from dynamo_mpi.probe.kv_lead import lead_kv
from dynamo_mpi.probe.kv_terms import KvTerms, transport_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.control_plane.presence import Presence
    from dynamo_mpi.control_plane.records import WorkerRecord
    from dynamo_mpi.launchers.placement import Placed
    from dynamo_mpi.parallelism.subject import Subject
    from dynamo_mpi.probe.plan import ProbePlan
    from dynamo_mpi.settings import Settings
    from dynamo_mpi.talk import RankLogger


class KvDesk:
    """Rank 0's.

    Args:
        plan: what is probed.
        ranks: where each rank is.
        transport: that this world's configuration names.
        presence: its record; None without one.
        log: rank 0's.
    """

    def __init__(
        self, plan: ProbePlan, ranks: Sequence[Placed], transport: str, presence: Presence | None, log: RankLogger
    ) -> None:
        self._terms, self._ranks, self._transport = KvTerms.unpack(plan.kv), ranks, transport
        self._presence, self._log = presence, log

    def ask(self, answers: Sequence[Sequence[str]], end: float) -> list[list[str]]:
        """Ask the partners that are there; see `lead_kv`."""
        return lead_kv(answers, self._ranks, self._terms, self._transport, self, end)

    def offer_kv(self, offer: dict[str, Any]) -> tuple[WorkerRecord, Sequence[WorkerRecord]] | None:
        """Publish the offer."""
        return None if self._presence is None else self._presence.offer_kv(offer)

    def open(self) -> None:
        """From here on, say what partners find that come later."""
        kv.kept.listen(self._told, self._ended)

    def _told(self, content: Any) -> None:
        try:
            between = Between.read(content)
        except ValueError:
            return  # of another version, or of somebody who knows the token and lies
        sides = dict(zip(("prefill", "decode"), between.nodes, strict=True))
        if between.role != self._terms.role or len(sides[between.role]) != len(self._ranks):
            return
        outcome = kv.judge_kv([between], self._terms)
        found = render([finding for finding in outcome.findings if finding.severity is not Severity.INFO])
        line = f"probe: {outcome.line}, as the {between.peer} has found"
        self._log.info(f"{line}\n{found}" if found else line)
        if self._presence is not None:
            self._presence.tell_kv(outcome.figures["peers"][0])

    def _ended(self) -> None:
        if self._presence is not None:
            self._presence.offer_kv(None)


def desk_of(
    settings: Settings,
    subject: Subject,
    plan: ProbePlan,
    ranks: Sequence[Placed],
    presence: Presence | None,
    log: RankLogger,
    environ: Mapping[str, str],
) -> KvDesk | None:
    """Return rank 0's desk; None where KV isn't probed.

    Args:
        settings: the worker's.
        subject: what its preflight judged.
        plan: what is probed.
        ranks: where each rank is.
        presence: its record; None without one.
        log: rank 0's.
        environ: may decide about the transport.
    """
    if not plan.kv:
        return None
    transport = transport_of(settings.engine, settings.kv_transport, contract_of(subject), environ)
    return KvDesk(plan, ranks, transport, presence, log)
