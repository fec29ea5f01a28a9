# SPDX-License-Identifier: Apache-2.0
"""Everybody who looks at a worker from outside of its world, as rank 0 keeps them informed: etcd and NATS, probes, metrics and supervisors,
the picture of its start, and its user at the terminal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dynamo_mpi.exit_codes import ExitCode
from dynamo_mpi.observe.trace import trace_of

if TYPE_CHECKING:
    from dynamo_mpi.control_plane.publicity import Publicity
    from dynamo_mpi.control_plane.record import WorldRecord
    from dynamo_mpi.errors import BootstrapError
    from dynamo_mpi.observe.display import Display
    from dynamo_mpi.observe.ticker import Ticker
    from dynamo_mpi.observe.timeline_writer import TimelineWriter
    from dynamo_mpi.preflight.verdict import Verdict
    from dynamo_mpi.settings import Settings
    from dynamo_mpi.supervision.guard import Guard
    from dynamo_mpi.supervision.owned_leases import OwnedLeases
    from dynamo_mpi.supervision.phases import Phases
    from dynamo_mpi.talk import Voice


class Onlookers:
    """One worker's. What they need is imported once there is something for them to see.

    Args:
        phases: rank 0's, which are the world's.
        voice: how rank 0 speaks.
        display: for probes, metrics and supervisors.
        leases: knows what the worker has in etcd.
    """

    def __init__(self, phases: Phases, voice: Voice, display: Display, leases: OwnedLeases) -> None:
        self._phases, self._voice, self._display, self._leases = phases, voice, display, leases
        self._publicity: Publicity | None = None
        self._timeline: TimelineWriter | None = None
        self._ticker: Ticker | None = None
        self._record: WorldRecord | None = None

    @property
    def system_url(self) -> str | None:
        """Where probes are answered; None where they aren't."""
        return self._display.system_url

    def know(self, settings: Settings) -> None:
        """Show what the worker is, and nothing of an earlier start."""
        self._display.know(settings)
        if settings.timeline is not None:
            from dynamo_mpi.observe.timeline_paths import forget_timeline

            forget_timeline(settings.timeline)

    def judged(self, verdict: Verdict) -> None:
        """Show what the preflight has found."""
        self._display.judged(verdict)

    def point_runtime(self, settings: Settings) -> None:
        """Give the Dynamo runtime a port beside ours.

        Raises:
            UsageError: there is none.
        """
        self._display.point_runtime(settings)

    def introduce(self, settings: Settings, record: WorldRecord) -> None:
        """Have the worker be known by this record, from when it appears on.

        Raises:
            UsageError: the credentials for NATS can't be used.
        """
        from dynamo_mpi.control_plane.publicity import Publicity

        self._record = record
        self._publicity = Publicity(settings, record, self._phases, self._voice, self._leases)
        trace = trace_of(os.environ)
        self._publicity.presence.tell_trace(None if trace is None else trace.parent)
        self._publicity.presence.tell_system(self.system_url)

    def appear(self) -> None:
        """Publish the record, and compare it with the peers that came first. See `Presence.appear`."""
        if self._publicity is not None:
            self._publicity.appear()

    def watch(self, settings: Settings, guard: Guard) -> None:
        """Show how the ranks are, from the verdict on, and what ends them."""
        from dynamo_mpi.observe.ticker import ticker_of

        self._display.watch(guard)
        self._ticker = ticker = ticker_of(guard.roll, self._phases, self._voice, settings)
        if self._publicity is not None:
            self._publicity.begin_with(guard)
            ticker.on_progress(self._publicity.tell_progress)
        if settings.timeline is not None and self._record is not None:
            from dynamo_mpi.observe.timeline_writer import TimelineWriter

            self._timeline = TimelineWriter(settings.timeline, self._record, guard, self._voice)
            guard.before_the_end(self._timeline.finish)
        guard.at_once(ticker.close)
        ticker.start()

    def tell_in_flight(self, requests: int) -> None:
        """Show how many requests are in flight. Never waits."""
        self._display.in_flight = requests
        if self._publicity is not None:
            self._publicity.presence.tell_in_flight(requests)

    def tell_probe(self, figures: dict[str, Any]) -> None:
        """Show what the probes have measured."""
        if self._publicity is not None:
            self._publicity.presence.tell_probe(figures)

    def tell_instance(self, instance: int) -> None:
        """Show Dynamo's instance, which has been registered by now."""
        if self._publicity is not None:
            self._publicity.presence.tell_instance(instance)

    def ready(self) -> None:
        """Show that requests are answered."""
        self._display.ready()
        if self._timeline is not None:
            self._timeline.ready()
        if self._publicity is not None:
            self._publicity.ready()

    def refuse(self, error: BootstrapError) -> None:
        """Tell why a world that has appeared goes no further."""
        if self._publicity is not None:
            self._publicity.refuse(error)

    def stopped(self, text: str, code: ExitCode) -> None:
        """Show why the world ends before anybody guards it."""
        if code is not ExitCode.OK:
            self._display.refused(text)

    def withdraw(self) -> None:
        """Take the record away. May be called from a signal's handler."""
        if self._publicity is not None:
            self._publicity.presence.withdraw()

    def dismissed(self, code: int) -> None:
        """Take leave, before the other ranks are told to."""
        if self._publicity is not None:
            self._publicity.end(code)

    def finish(self) -> None:
        """Draw the picture of a life that has ended in order; the other ranks wait for it."""
        if self._timeline is not None:
            self._timeline.finish()

    def ended(self, code: int) -> None:
        """Show that this was the end."""
        self._display.ended(code)

    def close(self) -> None:
        """Show nothing any more."""
        if self._ticker is not None:
            self._ticker.close()
        self.withdraw()
