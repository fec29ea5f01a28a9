# SPDX-License-Identifier: Apache-2.0
"""A world makes itself known, and makes sure that it fits those that were there before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.errors import DynamoMpiError, LayoutError, UsageError
from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.discovery.etcd import CredentialsError, lease_seconds
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient, missing_client
from dynamo_mpi.discovery.peer_compat import incompatibility, warnings
from dynamo_mpi.discovery.record_keeper import RecordKeeper
from dynamo_mpi.discovery.records import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.common.phases import PhaseProgress
    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.discovery.records import StoredRecord, WorkerRecord

_PAIRED = ("prefill", "decode")


class RecordPublisher(WorkerHook):
    """This world's record in etcd, while there is one.

    Args:
        log: rank 0's.
        record: what to say of this world.
        on_lease: called with the id of each lease that the record gets.
        on_peers: called with the peers, and with what is told of them, when they change.
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

    def publish(self, settings: Settings, environ: Mapping[str, str]) -> None:
        """Publish the record, and compare it with the peers that came first.

        Where nothing has to be compared, or ``--no-peer-check`` was given, a record that can't be written is only a warning.

        Args:
            settings: the worker's.
            environ: where etcd and our credentials stand.

        Raises:
            LayoutError: a peer that came first doesn't fit.
            DiscoveryError: etcd does not answer.
            AuthorizationError: it refuses us.
            UsageError: what is set for it can't be used.
        """
        if trouble := missing_client():
            self._log.warning(f"no world record, and no look at peers: {trouble}")
            return
        try:
            seconds = lease_seconds(environ)
            etcd = GrpcEtcdClient.from_env(environ, settings.probe_timeout)
            self._keeper = RecordKeeper(etcd, self._record, seconds, self._log, self._on_lease, self._on_peers)
            earlier = self._keeper.publish()
            if etcd.auth_is_disabled:
                raise _needless()
        except (CredentialsError, UsageError):
            # Dynamo's runtime would fare no better, and try for two minutes after the load
            self.unpublish()
            raise
        except DynamoMpiError as error:
            if settings.role in _PAIRED and not settings.no_peer_check:
                raise
            self.unpublish()
            self._keeper = None
            self._log.warning(f"no world record: {error}")
            return
        self._judge(self._record, earlier, seconds, refuse=not settings.no_peer_check)
        self._keeper.start()

    def on_phase(self, phase: str) -> None:
        """Have the record say which phase it is."""
        self._phase = phase
        if self._keeper is not None:
            self._keeper.set_phase(phase)

    def on_registered(self, lease: int) -> None:
        """Have the record name Dynamo's instance."""
        if self._keeper is not None:
            self._keeper.set_instance(f"{lease:x}")

    def on_requests_in_flight(self, count: int) -> None:
        """Have the record say how many requests are in flight, in a second or so."""
        self._update(in_flight=count)

    def on_progress(self, progress: PhaseProgress) -> None:
        """Have the record say how far the ranks have come in the phase; the next phase begins without."""
        if progress.phase != self._phase:
            return  # it would stand beside the next phase, for good where that is the last that has any
        done = None if self._record.engine == "trtllm" else progress.done
        slowest = progress.slowest_rank, progress.slowest_host
        self._update(progress=Progress(done, progress.ranks, *slowest, round(progress.seconds, 1), progress.read))

    def on_hardware_checked(self, figures: dict[str, Any]) -> None:
        """Have the record say what the checks have measured."""
        self._update(probe=figures)

    def on_failure_detected(self) -> None:
        """Take the record away."""
        self.unpublish()

    def on_shutdown(self, code: int) -> None:
        """Take the record away, before the ranks leave."""
        self.unpublish()

    def on_exit(self, code: int) -> None:
        """Take the record away, if it is still there."""
        self.unpublish()

    def unpublish(self) -> None:
        """Take the record away, in a second at the most. Does not raise, and may be called from a signal's handler."""
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


def _needless() -> UsageError:
    return UsageError(
        "ETCD_AUTH_USERNAME is set, and this etcd asks nobody who they are: Dynamo's runtime can't connect to it with a password",
        needed="no password, or an etcd with users",
        fix="unset ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD, or etcdctl auth enable",
    )
