# SPDX-License-Identifier: Apache-2.0
"""All that one worker says of itself outside its world: its record and its last failure in etcd, and its events over NATS."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from dynamo_mpi.control_plane.events import events_of
from dynamo_mpi.control_plane.failure_records import FailureRecordStore, WorkerIdentity
from dynamo_mpi.control_plane.presence import Presence
from dynamo_mpi.control_plane.records import Progress
from dynamo_mpi.supervision.failure import Failure

if TYPE_CHECKING:
    from dynamo_mpi.control_plane.records import WorkerRecord
    from dynamo_mpi.errors import BootstrapError
    from dynamo_mpi.settings import Settings
    from dynamo_mpi.supervision import roll
    from dynamo_mpi.supervision.guard import Guard
    from dynamo_mpi.supervision.owned_leases import OwnedLeases
    from dynamo_mpi.supervision.phases import Phases
    from dynamo_mpi.talk import Voice


class Publicity:
    """One worker's.

    Args:
        settings: the worker's.
        record: what it is.
        phases: what it does.
        voice: how rank 0 speaks.
        leases: knows the record's lease.

    Raises:
        UsageError: the credentials for NATS can't be used.
    """

    def __init__(
        self, settings: Settings, record: WorkerRecord, phases: Phases, voice: Voice, leases: OwnedLeases
    ) -> None:
        self._settings, self._record, self._phases = settings, record, phases
        self._voice, self._leases = voice, leases
        origin = WorkerIdentity.of(record)
        leases.set_worker(asdict(origin))
        self._failure_records = FailureRecordStore(origin, os.environ, lambda: leases.record)
        self._events = events_of(record, phases.current, os.environ, settings.request_plane, voice.say)
        self.presence = Presence(voice, partial(leases.add, "record"), self._events.peers)

    def appear(self) -> None:
        """Publish the world record, and compare it with the peers that came first. See `Presence.appear`."""
        self.presence.appear(self._settings, self._record, os.environ)
        self._phases.listen(self.presence.tell)
        self._phases.listen(self._events.phase)

    def begin_with(self, guard: Guard) -> None:
        """Have what ends the world be told, and the worker withdrawn then."""
        guard.at_once(self.presence.withdraw)
        guard.send_word_to(self._failure_records.write)
        guard.send_word_to(self._events.failed)
        guard.before_the_end(self._events.exit)

    def refuse(self, error: BootstrapError) -> None:
        """Tell why a world that has appeared goes no further; a second at the most for each of etcd and NATS."""
        if self._leases.record:
            text = str(error)
            failure = Failure(0, int(error.exit_code), text, phase=self._phases.current, at=time.monotonic())
            for tell in (self._failure_records.write_soon, self._events.failed):
                tell(failure, self._voice.host, f"error: {text}")

    def tell_progress(self, progress: roll.Progress) -> None:
        """Have the record say how far the ranks are. Never waits."""
        if progress.phase != self._phases.current:
            return  # it would stand beside the next phase, for good where that is the last that has any
        done = None if self._record.engine == "trtllm" else progress.done
        slowest = progress.slowest_rank, progress.slowest_host
        told = Progress(done, progress.ranks, *slowest, round(progress.seconds, 1), progress.read)
        self.presence.tell_progress(told)

    def ready(self) -> None:
        """Tell that requests are answered: what earlier starts have died of is of the past now."""
        self._events.ready()
        self._failure_records.clear_previous()

    def end(self, code: int) -> None:
        """Withdraw, and tell with which exit code; a second at the most, and half of one for NATS."""
        self.presence.withdraw()
        self._events.exit(code)
