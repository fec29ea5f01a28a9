# SPDX-License-Identifier: Apache-2.0
"""Rank 0: decides in the preflight, leads the engine, and is the one that Dynamo sees."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from dynamo_mpi.control_plane.departure import Departure
from dynamo_mpi.control_plane.etcd_auth import EtcdAuth
from dynamo_mpi.control_plane.probe import probe_control_plane
from dynamo_mpi.control_plane.runtime_limits import require_etcd
from dynamo_mpi.engines.choice import engine_spec, require_startable
from dynamo_mpi.errors import BootstrapError
from dynamo_mpi.exit_codes import ExitCode, of_signal
from dynamo_mpi.follower import GO, PARTING_SECONDS, STOP
from dynamo_mpi.observe.levels import Level
from dynamo_mpi.observe.speech import speech
from dynamo_mpi.onlookers import Onlookers
from dynamo_mpi.preflight.inquiry import Card, fill_card
from dynamo_mpi.preflight.model_folder import at_its_folder
from dynamo_mpi.preflight.reach import let_runtime_be_reached, meeting_place
from dynamo_mpi.preflight.roster import hosts, ranks_by_host
from dynamo_mpi.preflight.servable import require_servable
from dynamo_mpi.preflight.verdict import judge, read_plan
from dynamo_mpi.probe.plan import ProbePlan, left_out, plan_probes
from dynamo_mpi.serving.ready import announce, forget
from dynamo_mpi.serving.service import point_runtime_at
from dynamo_mpi.settings import load_settings
from dynamo_mpi.supervision.failure import HurriedError
from dynamo_mpi.supervision.owned_leases import OwnedLeases
from dynamo_mpi.supervision.word import suppressed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.engines.spec import EngineSpec
    from dynamo_mpi.launchers.launch import Launch
    from dynamo_mpi.observe.display import Display
    from dynamo_mpi.preflight.networks import Choice
    from dynamo_mpi.preflight.verdict import Plan, Verdict
    from dynamo_mpi.settings import Settings
    from dynamo_mpi.supervision.agent_client import NodeAgentClient
    from dynamo_mpi.supervision.guard import Guard
    from dynamo_mpi.supervision.phases import Phases
    from dynamo_mpi.supervision.stop_signals import StopSignals
    from dynamo_mpi.talk import Voice
    from dynamo_mpi.world import World


class Leader:
    """Rank 0's life, phase by phase.

    Args:
        world: all ranks.
        launch: how this rank was started.
        phases: where durations go.
        voice: how rank 0 speaks.
        mpi_library: what the MPI library calls itself.
        client: this rank's connection to its node agent.
        display: shows the world to those who watch it.
    """

    def __init__(
        self,
        world: World,
        launch: Launch,
        phases: Phases,
        voice: Voice,
        mpi_library: str,
        client: NodeAgentClient,
        display: Display,
    ) -> None:
        self._world = world
        self._launch = launch
        self._phases = phases
        self._voice = voice
        self._mpi_library = mpi_library
        self._verdict_seconds = 0.0
        self._guard: Guard | None = None
        self._client = client
        self._leases = OwnedLeases(client)
        self._onlookers = Onlookers(phases, voice, display, self._leases)
        self._signals: StopSignals | None = None

    def run(self, argv: Sequence[str]) -> int:
        """Live it.

        Returns:
            The exit code, which every other rank has been told.
        """
        self._phases.listen(lambda name: self._voice.say(f"phase {name}", Level.DEBUG))
        try:
            code = self._live(argv)
            self._onlookers.ended(code)
            return code
        except Exception as error:  # of any kind: the other ranks are somewhere inside the engine
            if self._guard is None:
                raise
            self._guard.end(error)
        finally:
            self._onlookers.close()

    def _live(self, argv: Sequence[str]) -> int:
        with self._phases.enter("preflight"):
            try:
                settings = load_settings(argv, os.environ)
                speech.log_to(str(settings.log_dir or ""), _label(settings), self._world.rank)
                forget(settings.ready_file)
                self._onlookers.know(settings)
                require_startable(settings)
                settings = at_its_folder(settings, os.environ)
                plan = read_plan(settings, argv)
            except BootstrapError as error:
                return self._stop(f"error: {error}", error.exit_code)
            cards = self._ask(plan, argv)
            verdict = judge(plan, cards)
            self._verdict_seconds = self._phases.age
            self._onlookers.judged(verdict)
            place: Choice | None = None
            if verdict.exit_code is ExitCode.OK:
                try:
                    place = meeting_place(cards, settings.liveness_network)
                except BootstrapError as error:
                    return self._stop(f"error: {error}", error.exit_code)
            if verdict.exit_code is not ExitCode.OK or settings.preflight_only:
                return self._stop(verdict.report, verdict.exit_code)
            self._voice.say(verdict.report)
            if place is not None:
                self._voice.say(place.line)
                settings = replace(settings, kv_network=settings.kv_network or place.network or None)
            try:
                endpoints = probe_control_plane(os.environ, settings.request_plane, settings.probe_timeout)
                for line in require_etcd(endpoints, EtcdAuth.of(os.environ)):
                    self._voice.say(line)
                point_runtime_at(endpoints)
                let_runtime_be_reached(place, endpoints, os.environ)
                self._onlookers.point_runtime(settings)
                require_servable(settings.model, plan.inquiry.files[0].content)
                signals = self._appear(settings, verdict, cards)
                guard = self._guard_with(settings, cards, place.address if place else "")
            except BootstrapError as error:
                self._onlookers.refuse(error)
                return self._stop(f"error: {error}", error.exit_code)
            for line in left_out(settings, self._world.size):
                self._voice.say(line)
            probes = plan_probes(settings, verdict.subject.layout, ranks_by_host(cards))
            spec = engine_spec(settings, plan)._replace(probe=probes.pack() if probes else "")
            self._world.broadcast(GO + guard.meeting.pack(spec.pack()))
        if spec.probe and (refused := self._probe(settings, verdict, spec, cards, guard)):
            guard.close()
            self._onlookers.finish()
            return refused
        if settings.engine == "trtllm":
            code = self._lead_trtllm(settings, plan, cards, guard)
        else:
            from dynamo_mpi.engine_leader import EngineLeader

            leader = EngineLeader(
                self._world,
                self._launch,
                settings,
                guard,
                self._phases,
                self._voice,
                self._dismiss,
                self._departure(settings),
                signals,
                self._onlookers.tell_in_flight,
            )
            code = leader.run(spec, cards, plan.shape.bos_token_id or 0, partial(self._announce, settings))
        guard.close()
        self._onlookers.finish()
        return code

    def _probe(
        self, settings: Settings, verdict: Verdict, spec: EngineSpec, cards: Sequence[Card], guard: Guard
    ) -> ExitCode:
        """Ask the hardware, with all ranks, and tell them whether to go on."""
        from dynamo_mpi.probe.part import Case
        from dynamo_mpi.probe.phase import lead_probes

        with self._phases.enter("probe"):
            case = Case(ProbePlan.unpack(spec.probe), cards, verdict.subject.cluster.gpu, verdict.weights)
            report = lead_probes(self._world, case, guard, os.environ, strict=settings.probe_strict)
            self._phases.own_part_done()
            if (error := report.error) is not None:
                guard.report(error)
                self._dismiss(error.exit_code)
                return error.exit_code
            self._voice.say(report.text)
            self._onlookers.tell_probe(report.figures)
            self._world.broadcast(GO)
        return ExitCode.OK

    def _guard_with(self, settings: Settings, cards: Sequence[Card], address: str) -> Guard:
        """Begin to watch over the ranks, which learn where from it: at ``address``, or at the host's own."""
        from dynamo_mpi.supervision.failure_files import forget_failures
        from dynamo_mpi.supervision.guard import Guard, Terms

        label = _label(settings)
        if trouble := forget_failures(settings.failure_dir, label):
            self._voice.say(f"warning: {trouble}")
        terms = Terms(
            settings.liveness_network,
            settings.heartbeat_timeout,
            str(settings.failure_dir or ""),
            label,
            self._client.connected,
            str(settings.log_dir or ""),
            address,
        )
        self._guard = guard = Guard(self._world, cards, self._phases, self._voice, terms, self._client)
        guard.before_the_end(partial(forget, settings.ready_file))
        self._onlookers.watch(settings, guard)
        return guard

    def _appear(self, settings: Settings, verdict: Verdict, cards: Sequence[Card]) -> StopSignals:
        """Publish the world record, and compare it with the peers that came first."""
        # after the verdict: a layout that can't be is refused without it
        from dynamo_mpi.control_plane.presence import record_of
        from dynamo_mpi.supervision.signal_thread import signals_of
        from dynamo_mpi.supervision.stop_signals import StopSignals

        self._onlookers.introduce(settings, record_of(settings, verdict.subject, cards, self._phases))
        # from here on the main thread may sit in the engine
        self._client.uninstall_signal_handlers()
        self._signals = signals = StopSignals(self._hurry, signals_of(self._launch.launcher), self._note_signal)
        self._onlookers.appear()
        return signals

    def _note_signal(self, number: int) -> None:
        self._client.send(f"signalled {number}")

    def _departure(self, settings: Settings) -> Departure:
        return Departure(settings.endpoint, os.environ, self._own_instance)

    def _own_instance(self, lease: int) -> None:
        self._leases.add("instance", lease)
        self._onlookers.tell_instance(lease)

    def _hurry(self, number: int) -> None:
        if self._guard is not None:
            self._guard.end(HurriedError(number), of_signal(number))
        # nothing that fails here may keep the world from its end
        suppressed(partial(self._client.send, "reported"))
        suppressed(self._onlookers.withdraw)
        self._world.abort(of_signal(number))

    def _ask(self, plan: Plan, argv: Sequence[str]) -> list[Card]:
        self._world.broadcast(GO + plan.inquiry.pack())
        answers = self._world.gather(fill_card(plan.inquiry, self._launch, argv, self._mpi_library).pack())
        return [Card.unpack(answer) for answer in answers]

    def _stop(self, text: str, code: ExitCode) -> ExitCode:
        self._voice.say(text, None if code is ExitCode.OK else Level.ERROR)
        self._onlookers.stopped(text, code)
        self._dismiss(code)
        return code

    def _dismiss(self, code: ExitCode) -> None:
        """Tell the others to leave. Before it comes all that rank 0 has to do, since the first to leave may take it along."""
        if self._signals is not None:
            self._signals.close()
        self._onlookers.dismissed(code)
        message = STOP + bytes([code])
        if self._guard is None:
            self._world.broadcast(message)
            return
        # a rank that doesn't come can be named only as long as all are watched
        with self._guard.deadline(PARTING_SECONDS, "not all ranks have come to their end", code=int(code) or None):
            self._world.broadcast(message)
            self._world.barrier(2 * PARTING_SECONDS)

    def _lead_trtllm(self, settings: Settings, plan: Plan, cards: Sequence[Card], guard: Guard) -> int:
        from dynamo_mpi.engines.trtllm.lead import TrtllmLeader
        from dynamo_mpi.supervision.signal_thread import signals_of

        gpus_per_node = plan.config.gpus_per_node or len(cards) // len(hosts(cards))
        leader = TrtllmLeader(
            self._world,
            settings,
            gpus_per_node,
            plan.shape.bos_token_id or 0,
            guard,
            self._phases,
            self._voice,
            self._departure(settings),
            signals_of(self._launch.launcher),
        )
        try:
            code = leader.run(partial(self._announce, settings))
        finally:
            forget(settings.ready_file)
        self._dismiss(code)
        self._voice.say(
            f"exit: {'done' if code is ExitCode.OK else f'code {int(code)}'} after {self._phases.age:.1f} s"
        )
        return code

    def _announce(self, settings: Settings) -> None:
        announce(
            settings,
            self._phases,
            self._voice,
            ranks=self._world.size,
            verdict_seconds=self._verdict_seconds,
            system=self._onlookers.system_url,
        )
        self._onlookers.ready()


def _label(settings: Settings) -> str:
    """Return how files of this worker's ranks are called."""
    return settings.endpoint.removeprefix("dyn://").split(".")[1]


def lead(
    world: World,
    launch: Launch,
    argv: Sequence[str],
    phases: Phases,
    voice: Voice,
    mpi_library: str,
    client: NodeAgentClient,
    display: Display,
) -> int:
    """Live rank 0's life, and return the exit code. See `Leader`."""
    return Leader(world, launch, phases, voice, mpi_library, client, display).run(argv)
