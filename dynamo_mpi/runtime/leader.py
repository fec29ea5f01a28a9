# SPDX-License-Identifier: Apache-2.0
"""The lifecycle of rank 0: decides in preflight, leads the engine, and is the rank that registers with Dynamo."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from dynamo_mpi.checks.frontend_compat import check_frontend_can_load
from dynamo_mpi.checks.hardware_check_plan import HardwareCheckPlan, obsolete, plan_hardware_checks, skipped_checks
from dynamo_mpi.checks.preflight import evaluate, load_inputs
from dynamo_mpi.checks.rank_report import RankReport, collect_rank_report
from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.exit_codes import ExitCode, of_signal
from dynamo_mpi.common.failure import Failure, TerminatedBySignal, describe_error
from dynamo_mpi.common.hooks import WorldFailure
from dynamo_mpi.common.log_writer import log_writer
from dynamo_mpi.common.threads import run_suppressed
from dynamo_mpi.config.model_dir import resolve_model_dir
from dynamo_mpi.config.worker import load_settings
from dynamo_mpi.discovery.connectivity import check_connectivity
from dynamo_mpi.discovery.etcd import EtcdAuth
from dynamo_mpi.discovery.registration_monitor import InstanceLease
from dynamo_mpi.discovery.runtime_compat import check_runtime_can_use
from dynamo_mpi.mpi.placement import hosts, ranks_by_host
from dynamo_mpi.runtime.engine_choice import check_engine_installed, engine_spec
from dynamo_mpi.runtime.follower import GO, PARTING_SECONDS, STOP
from dynamo_mpi.runtime.reach import let_runtime_be_reached, meeting_place
from dynamo_mpi.runtime.serving import export_runtime_env
from dynamo_mpi.runtime.worker_context import WorkerContext
from dynamo_mpi.runtime.worker_hooks import LeaderHooks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.checks.preflight import PreflightInputs, PreflightResult
    from dynamo_mpi.common.networks import Choice
    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.discovery.record_publisher import RecordPublisher
    from dynamo_mpi.engines.spec import EngineSpec
    from dynamo_mpi.supervisor.context import RankContext
    from dynamo_mpi.supervisor.shutdown_signals import ShutdownSignals
    from dynamo_mpi.supervisor.supervisor import WorldSupervisor
    from dynamo_mpi.telemetry.health_client import HealthClient
    from dynamo_mpi.telemetry.sd_notify import SystemdNotifier

_HOOK_SECONDS = 1.0


class LeaderRank:
    """Rank 0's life, phase by phase.

    Args:
        context: rank 0's.
        hooks: follow the worker's life.
    """

    def __init__(self, context: RankContext, hooks: LeaderHooks) -> None:
        self._context = context
        self._world, self._phases, self._log = context.world, context.phases, context.log
        self._hooks = hooks
        self._preflight_seconds = 0.0
        self._presence: RecordPublisher | None = None
        self._guard: WorldSupervisor | None = None
        self._signals: ShutdownSignals | None = None

    def run(self) -> int:
        """Run all of it.

        Returns:
            The exit code, which every other rank has been told.
        """
        self._phases.on_phase(lambda name: self._log.debug(f"phase {name}"))
        try:
            code = self._run()
            self._hooks.on_exit(code)
            return code
        except Exception as error:  # of any kind: the other ranks are somewhere inside the engine
            if self._guard is None:
                self._hooks.on_exit(describe_error(error)[1])
                raise
            self._guard.abort(error)

    def _run(self) -> int:
        argv = self._context.argv
        with self._phases.enter("preflight"):
            try:
                settings = load_settings(argv, os.environ)
                log_writer.open_file(str(settings.log_dir or ""), _label(settings), self._world.rank)
                self._hooks.add_observers(settings)
                check_engine_installed(settings)
                settings = resolve_model_dir(settings, os.environ)
                plan = load_inputs(settings, argv)
            except DynamoMpiError as error:
                return self._stop(f"error: {error}", error.exit_code)
            cards = self._ask(plan, argv)
            verdict = evaluate(plan, cards)
            self._preflight_seconds = self._phases.age
            if self._hooks.status is not None:
                self._hooks.status.severities = tuple(finding.severity for finding in verdict.findings)
            place: Choice | None = None
            if verdict.exit_code is ExitCode.OK:
                try:
                    place = meeting_place(cards, settings.liveness_network)
                except DynamoMpiError as error:
                    return self._stop(f"error: {error}", error.exit_code)
            if verdict.exit_code is not ExitCode.OK or settings.preflight_only:
                return self._stop(verdict.report, verdict.exit_code)
            self._log.info(verdict.report)
            if place is not None:
                self._log.info(place.line)
                settings = replace(settings, kv_network=settings.kv_network or place.network or None)
            try:
                endpoints = check_connectivity(os.environ, settings.request_plane, settings.probe_timeout)
                for line in check_runtime_can_use(endpoints, EtcdAuth.from_env(os.environ)):
                    self._log.warning(line)
                export_runtime_env(endpoints)
                let_runtime_be_reached(place, endpoints, os.environ)
                self._hooks.assign_runtime_port(settings)
                check_frontend_can_load(settings.model, plan.inquiry.files[0].content)
                signals = self._appear(settings, verdict, cards)
                guard = self._guard_with(settings, cards, place.address if place else "")
            except DynamoMpiError as error:
                return self._stop(f"error: {error}", error.exit_code)
            for line in skipped_checks(settings, self._world.size):
                self._log.info(line)
            for line in obsolete(settings):
                self._log.warning(line)
            probes = plan_hardware_checks(settings, verdict.subject.layout, ranks_by_host(cards))
            spec = engine_spec(settings, plan)._replace(probe=probes.pack() if probes else "")
            self._world.broadcast(GO + guard.rendezvous.pack(spec.pack()))
        if spec.probe and (refused := self._probe(settings, verdict, spec, cards, guard)):
            guard.close()
            return refused
        worker = WorkerContext(self._context, settings, guard, self._hooks, cards, self._departure(settings))
        if settings.engine == "trtllm":
            code = self._lead_trtllm(worker, plan)
        else:
            from dynamo_mpi.runtime.engine_runner import EngineRunner

            leader = EngineRunner(worker, signals, self._dismiss)
            code = leader.run(spec, plan.shape.bos_token_id or 0, partial(self._announce, settings))
        guard.close()
        return code

    def _probe(
        self,
        settings: Settings,
        verdict: PreflightResult,
        spec: EngineSpec,
        cards: Sequence[RankReport],
        guard: WorldSupervisor,
    ) -> ExitCode:
        """Ask the hardware, with all ranks, and tell them whether to go on."""
        from dynamo_mpi.checks.hardware import EvaluationInput
        from dynamo_mpi.checks.run_hardware_checks import run_hardware_checks

        with self._phases.enter("probe"):
            case = EvaluationInput(
                HardwareCheckPlan.unpack(spec.probe), cards, verdict.subject.cluster.gpu, verdict.weights
            )
            report = run_hardware_checks(self._world, case, guard, os.environ, strict=settings.probe_strict)
            self._phases.mark_local_done()
            if (error := report.error) is not None:
                guard.report_orderly_failure(error)
                self._dismiss(error.exit_code)
                return error.exit_code
            self._log.info(report.text)
            self._hooks.on_hardware_checked(report.figures)
            self._world.broadcast(GO)
        return ExitCode.OK

    def _guard_with(self, settings: Settings, cards: Sequence[RankReport], address: str) -> WorldSupervisor:
        """Begin to watch over the ranks, which learn where from it: at ``address``, or at the host's own."""
        from dynamo_mpi.supervisor.failure_files import remove_stale_failure_files
        from dynamo_mpi.supervisor.supervisor import SupervisorConfig, WorldSupervisor

        label = _label(settings)
        if trouble := remove_stale_failure_files(settings.failure_dir, label):
            self._log.warning(trouble)
        terms = SupervisorConfig(
            settings.liveness_network,
            settings.heartbeat_timeout,
            str(settings.failure_dir or ""),
            label,
            str(settings.log_dir or ""),
            address,
        )
        self._guard = guard = WorldSupervisor(self._context, cards, terms, self._hooks)
        self._hooks.add_watchers(settings, guard, self._preflight_seconds)
        return guard

    def _appear(self, settings: Settings, verdict: PreflightResult, cards: Sequence[RankReport]) -> ShutdownSignals:
        """Publish the world record, and compare it with the peers that came first."""
        # after the verdict: a layout that can't be is refused without it
        from dynamo_mpi.runtime.worker_record import record_of
        from dynamo_mpi.supervisor.shutdown_signals import ShutdownSignals
        from dynamo_mpi.supervisor.signal_thread import signals_of

        self._presence = self._hooks.add_record(settings, record_of(settings, verdict.subject, cards, self._phases))
        # from here on the main thread may sit in the engine
        self._context.agent.uninstall_signal_handlers()
        launcher = self._context.launch.launcher
        self._signals = signals = ShutdownSignals(self._hurry, signals_of(launcher), self._note_signal)
        self._presence.publish(settings, os.environ)
        return signals

    def _note_signal(self, number: int) -> None:
        self._context.agent.send(f"signalled {number}")

    def _departure(self, settings: Settings) -> InstanceLease:
        departure = InstanceLease(settings.endpoint, os.environ, self._hooks.on_registered)
        self._hooks.add(departure)
        return departure

    def _hurry(self, number: int) -> None:
        if self._guard is not None:
            self._guard.abort(TerminatedBySignal(number), of_signal(number))
        # nothing that fails here may keep the world from its end
        run_suppressed(partial(self._context.agent.send, "reported"))
        self._hooks.on_exit(of_signal(number))
        self._world.abort(of_signal(number))

    def _ask(self, plan: PreflightInputs, argv: Sequence[str]) -> list[RankReport]:
        self._world.broadcast(GO + plan.inquiry.pack())
        answers = self._world.gather(
            collect_rank_report(plan.inquiry, self._context.launch, argv, self._context.mpi_version).pack()
        )
        return [RankReport.unpack(answer) for answer in answers]

    def _stop(self, text: str, code: ExitCode) -> ExitCode:
        (self._log.info if code is ExitCode.OK else self._log.error)(text)
        if code is not ExitCode.OK:
            failure = Failure(
                0, int(code), text.removeprefix("error: "), phase=self._phases.current, at=time.monotonic()
            )
            self._hooks.on_failure(WorldFailure((failure,), self._log.host, text))
            self._hooks.wait(time.monotonic() + _HOOK_SECONDS)
        self._dismiss(code)
        return code

    def _dismiss(self, code: ExitCode) -> None:
        """Tell the others to leave. Before it comes all that rank 0 has to do, since the first to leave may take it along."""
        if self._signals is not None:
            self._signals.close()
        self._hooks.on_shutdown(code)
        message = STOP + bytes([code])
        if self._guard is None:
            self._world.broadcast(message)
            return
        # a rank that doesn't come can be named only as long as all are watched
        with self._guard.deadline(PARTING_SECONDS, "not all ranks have come to their end", code=int(code) or None):
            self._world.broadcast(message)
            self._world.barrier(2 * PARTING_SECONDS)

    def _lead_trtllm(self, worker: WorkerContext, plan: PreflightInputs) -> int:
        from dynamo_mpi.runtime.trtllm_runner import TrtllmRunner

        gpus_per_node = plan.config.gpus_per_node or len(worker.cards) // len(hosts(worker.cards))
        leader = TrtllmRunner(worker, gpus_per_node, plan.shape.bos_token_id or 0)
        code = leader.run(partial(self._announce, worker.settings))
        self._dismiss(code)
        self._log.info(f"exit: {'done' if code is ExitCode.OK else f'code {int(code)}'} after {self._phases.age:.1f} s")
        return code

    def _announce(self, settings: Settings) -> None:
        seconds = self._phases.durations
        # TensorRT-LLM's worker registers before it can be proven
        spans = ", ".join(f"{name} {seconds[name]:.1f} s" for name in ("load", "prove", "register") if name in seconds)
        self._log.info(
            f"ready: {settings.served_model_name} at {settings.endpoint} after {self._phases.age:.1f} s "
            f"(verdict {self._preflight_seconds:.1f} s, {spans})"
        )
        self._hooks.on_ready()


def _label(settings: Settings) -> str:
    """Return how files of this worker's ranks are called."""
    return settings.endpoint.removeprefix("dyn://").split(".")[1]


def run_leader(context: RankContext, reporter: HealthClient | None, notifier: SystemdNotifier | None) -> int:
    """Run rank 0's part of the worker, and return the exit code. See `LeaderRank`."""
    return LeaderRank(context, LeaderHooks(context, reporter, notifier)).run()
