# SPDX-License-Identifier: Apache-2.0
"""Publishes this worker's record, and checks that the worker fits earlier peers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.errors import DynamoMpiError, LayoutError, UsageError
from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.discovery.etcd import CredentialsError, lease_seconds
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient, missing_client
from dynamo_mpi.discovery.model_cards import cards_of, describe_unlike, read_cards, unlike
from dynamo_mpi.discovery.peer_compat import incompatibility, warnings
from dynamo_mpi.discovery.record_keeper import RecordKeeper
from dynamo_mpi.discovery.records import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.common.phases import PhaseProgress
    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.discovery.model_cards import ModelCard, PlannedCard
    from dynamo_mpi.discovery.records import StoredRecord, WorkerRecord

_PAIRED = ("prefill", "decode")


class RecordPublisher(WorkerHook):
    """This worker's record in etcd.

    Args:
        log: rank 0's log.
        record: the record to publish.
        on_lease: called with the id of each lease that the record gets.
        on_peers: called with the peers, and a line for each change, when they change.
    """

    def __init__(
        self,
        log: RankLogger,
        record: WorkerRecord,
        on_lease: Callable[[int], object],
        on_peers: Callable[[Sequence[StoredRecord], Sequence[str]], object] = lambda _, __: None,
    ) -> None:
        self._log, self._on_lease, self._on_peers = log, on_lease, on_peers
        self._keeper: RecordKeeper | None = None
        self._phase = "preflight"
        self._record = record
        self._etcd: GrpcEtcdClient | None = None
        self._has_card = False

    def publish(self, settings: Settings, environ: Mapping[str, str], card: PlannedCard | None = None) -> None:
        """Publish the record, and compare it with earlier peers, and this worker's model card with those of other workers.

        If nothing must be compared, or with ``--no-peer-check``, a record that can't be written is only a warning.

        Args:
            settings: the worker's.
            environ: has etcd's endpoints and our credentials.
            card: the card that this worker will have; None if it has none.

        Raises:
            LayoutError: an earlier peer doesn't fit, or a card of this model differs.
            DiscoveryError: etcd does not answer.
            AuthorizationError: it rejects our credentials.
            UsageError: the settings for etcd can't be used.
        """
        if reason := missing_client():
            self._log.warning(f"no worker record, and peers aren't checked: {reason}")
            return
        try:
            seconds = lease_seconds(environ)
            etcd = GrpcEtcdClient.from_env(environ, settings.probe_timeout)
            self._keeper = RecordKeeper(etcd, self._record, seconds, self._log, self._on_lease, self._on_peers)
            earlier = self._keeper.publish()
            if etcd.auth_is_disabled:
                raise _needless()
            self._etcd, self._has_card = etcd, card is not None
        except (CredentialsError, UsageError):
            # Dynamo's runtime would fail too, after two minutes of attempts, after the load
            self.unpublish()
            raise
        except DynamoMpiError as error:
            if settings.role in _PAIRED and not settings.no_peer_check:
                raise
            self.unpublish()
            self._keeper = None
            self._log.warning(f"no worker record: {error}")
            return
        self._judge(self._record, earlier, seconds, refuse=not settings.no_peer_check)
        if card is not None:
            self._compare_planned(card, seconds, settings)
        self._keeper.start()

    def on_phase(self, phase: str) -> None:
        """Set the record's phase."""
        self._phase = phase
        if self._keeper is not None:
            self._keeper.set_phase(phase)

    def on_registered(self, lease: int) -> None:
        """Set Dynamo's instance in the record."""
        if self._keeper is not None:
            self._keeper.set_instance(f"{lease:x}")
        self._compare_registered(f"/{lease:x}")

    def on_requests_in_flight(self, count: int) -> None:
        """Set the number of requests in flight, within about a second."""
        self._update(in_flight=count)

    def on_progress(self, progress: PhaseProgress) -> None:
        """Set the ranks' progress in the phase; the next phase starts without one."""
        if progress.phase != self._phase:
            return  # it would appear beside the next phase, and remain if that reports no progress
        done = None if self._record.engine == "trtllm" else progress.done
        slowest = progress.slowest_rank, progress.slowest_host
        self._update(progress=Progress(done, progress.ranks, *slowest, round(progress.seconds, 1), progress.read))

    def on_hardware_checked(self, figures: dict[str, Any]) -> None:
        """Set the measurements of the hardware checks."""
        self._update(probe=figures)

    def on_staged(self, figures: dict[str, Any]) -> None:
        """Set what staging the model took."""
        self._update(stage=figures)

    def on_caches(self, figures: dict[str, Any]) -> None:
        """Set how the compile caches were seeded, and what was written back."""
        self._update(caches=figures)

    def on_failure_detected(self) -> None:
        """Delete the record."""
        self.unpublish()

    def on_shutdown(self, code: int) -> None:
        """Delete the record, before the ranks exit."""
        self.unpublish()

    def on_exit(self, code: int) -> None:
        """Delete the record, if it still exists."""
        self.unpublish()

    def unpublish(self) -> None:
        """Delete the record, in at most a second. Does not raise, and may be called from a signal handler."""
        if self._keeper is not None:
            self._keeper.unpublish()

    def _update(self, **fields: Any) -> None:
        if self._keeper is not None:
            self._keeper.update(**fields)

    def _judge(self, record: WorkerRecord, earlier: Sequence[StoredRecord], seconds: int, *, refuse: bool) -> None:
        text = incompatibility(record, earlier, seconds)
        if text and refuse:
            raise LayoutError(text)
        for line in warnings(record, earlier):
            self._log.info(f"preflight: {line}")

    def _cards(self) -> list[ModelCard]:
        entries = [] if self._etcd is None else self._etcd.get_prefix(cards_of(self._record.namespace))
        return [card for _, card in read_cards(entries)]

    def _compare_planned(self, card: PlannedCard, seconds: int, settings: Settings) -> None:
        try:
            cards = self._cards()
        except DynamoMpiError as error:
            if settings.role in _PAIRED and not settings.no_peer_check:
                raise
            self._log.warning(f"the model card isn't compared with those of other workers: {error}")
            return
        if differing := card.unlike(cards):
            self._judge_card(differing, seconds, allow=settings.allow_unlike_card)

    def _judge_card(self, found: Sequence[tuple[ModelCard, list[str]]], seconds: int, *, allow: bool) -> None:
        text = describe_unlike(self._record.model, found)
        if not allow:
            raise LayoutError(
                text,
                expected="equal cards: a frontend takes one worker's for all workers of a name, also for prompts and limits",
                fix="start it with the same model files and limits, or under another --served-model-name; for a rolling change, "
                f"--allow-unlike-card (the card of a killed worker expires after {seconds} s)",
            )
        self._log.warning(
            f"{text}\n    a frontend sends this worker requests made for the others, or none, until they have gone"
        )

    def _compare_registered(self, instance: str) -> None:
        """Warn if the card that this worker now has differs from another's: two may have started at the same moment."""
        if not self._has_card:
            return
        try:
            cards = self._cards()
        except DynamoMpiError:
            return  # the registration is watched elsewhere
        own = next((card for card in cards if card.worker.endswith(instance)), None)
        if own is not None and (found := unlike(own, cards)):
            self._log.warning(describe_unlike(self._record.model, found))


def _needless() -> UsageError:
    return UsageError(
        "ETCD_AUTH_USERNAME is set, but this etcd has no users: Dynamo's runtime can't connect to it with a password",
        expected="no password, or an etcd with users",
        fix="unset ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD, or etcdctl auth enable",
    )
