# SPDX-License-Identifier: Apache-2.0
"""The lifecycle of rank 0: decides in preflight, leads the engine, and is the rank that registers with Dynamo."""

from __future__ import annotations

import gc
import os
import time
from functools import partial

from dynamo_mpi.checks.hardware import HardwareCheckPlan, obsolete, plan_hardware_checks, skipped_checks
from dynamo_mpi.checks.preflight import check_frontend_can_load, evaluate, load_inputs, refusal_of_ranks
from dynamo_mpi.checks.rank_report import RankReport, ReportRequest, collect_rank_report
from dynamo_mpi.common.credentials import clients_environ, held, load_services
from dynamo_mpi.common.errors import DynamoMpiError, ExitCode, of_signal
from dynamo_mpi.common.failure import Failure, TerminatedBySignal, describe_error
from dynamo_mpi.common.frozen import replace
from dynamo_mpi.common.hooks import WorldFailure
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.common.log_writer import log_writer
from dynamo_mpi.common.process import forbid_core_dumps
from dynamo_mpi.common.waiting import run_suppressed
from dynamo_mpi.config.variables import unknown_variables
from dynamo_mpi.config.worker import former_names, load_settings, resolve_model_dir, unknown_flags
from dynamo_mpi.engines.spec import EngineSpec
from dynamo_mpi.mpi.placement import hosts, ranks_by_host
from dynamo_mpi.runtime.engine_choice import check_engine_installed, describe_read_ahead, engine_spec
from dynamo_mpi.runtime.follower import CONTINUE, SHUTDOWN_SECONDS, STOP
from dynamo_mpi.runtime.leader_caches import LeaderCaches
from dynamo_mpi.runtime.leader_staging import LeaderStaging, settings_to_only_stage
from dynamo_mpi.runtime.rank_binding import announce_binding, bind_to_gpu, watch_gpus
from dynamo_mpi.runtime.worker_hooks import LeaderHooks, WorkerContext

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.checks.preflight import PreflightInputs, PreflightResult
    from dynamo_mpi.common.networks import Choice
    from dynamo_mpi.config.sources import WorkerSources
    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.discovery.record_publisher import RecordPublisher
    from dynamo_mpi.supervisor.context import RankContext
    from dynamo_mpi.supervisor.signals import ShutdownSignals
    from dynamo_mpi.supervisor.supervisor import WorldSupervisor
    from dynamo_mpi.telemetry.health_client import HealthClient
    from dynamo_mpi.telemetry.sd_notify import SystemdNotifier

_HOOK_SECONDS = 1.0


class LeaderRank:
    """Runs rank 0, phase by phase.

    Args:
        context: rank 0's context.
        sources: the worker's command line, variables and settings file.
        hooks: the observers of the worker's lifecycle.
    """

    def __init__(self, context: RankContext, sources: WorkerSources, hooks: LeaderHooks) -> None:
        self._context, self._sources = context, sources
        self._world, self._phases, self._log = context.world, context.phases, context.log
        self._hooks = hooks
        self._preflight_seconds = 0.0
        self._record_publisher: RecordPublisher | None = None
        self._supervisor: WorldSupervisor | None = None
        self._signals: ShutdownSignals | None = None
        self._staging: LeaderStaging | None = None
        self._caches: LeaderCaches | None = None

    def run(self) -> int:
        """Run all phases.

        Returns:
            The exit code, which every other rank has received.
        """
        self._phases.on_phase(lambda name: self._log.debug(f"phase {name}"))
        try:
            code = self._run()
            self._hooks.on_exit(code)
            return code
        except Exception as error:  # any error: the other ranks may be inside the engine's collectives
            if self._supervisor is None:
                self._hooks.on_exit(describe_error(error)[1])
                raise
            self._supervisor.abort(error)

    def _run(self) -> int:
        with self._phases.enter("preflight"):
            try:
                load_services()
                if held():
                    forbid_core_dumps()
                settings = load_settings(self._sources)
                if settings.only_stage:
                    settings = settings_to_only_stage(settings)
                log_writer.open_file(str(settings.log_dir or ""), _label(settings), self._world.rank)
                self._hooks.add_status_hooks(settings)
                unknown = (*unknown_variables(os.environ).values(), *unknown_flags(settings.passed_on))
                for line in (*former_names(self._sources), *unknown):
                    self._log.warning(line)
                check_engine_installed(settings)
                settings = resolve_model_dir(settings, os.environ)
                if settings.only_stage:
                    return self._stage_only(settings)
                inputs = load_inputs(settings, self._context.argv)
            except DynamoMpiError as error:
                return self._stop(f"error: {error}", error.exit_code)
            reports = self._collect_reports(inputs.report_request)
            result = evaluate(inputs, reports)
            self._preflight_seconds = self._phases.age
            if self._hooks.status is not None:
                self._hooks.status.severities = tuple(finding.severity for finding in result.findings)
            if result.exit_code is not ExitCode.OK:
                return self._stop(result.report, result.exit_code)
            try:
                rank0_address = self._choose_address(settings, reports)
            except DynamoMpiError as error:
                return self._stop(f"error: {error}", error.exit_code)
            bind = announce_binding(result.bindings, self._log)
            if settings.preflight_only:
                return self._stop(result.report, result.exit_code)
            self._log.info(result.report)
            if rank0_address is not None:
                settings = replace(settings, kv_network=settings.kv_network or rank0_address.network or None)
            try:
                from dynamo_mpi.runtime.runtime_environment import prepare_runtime

                for line in prepare_runtime(settings, rank0_address):
                    self._log.warning(line)
                self._hooks.assign_runtime_port(settings)
                check_frontend_can_load(settings.model, inputs.report_request.files[0].content)
                signals = self._publish_record(settings, result, reports)
                self._hooks.preflight = inputs.report_request, reports[0]
                supervisor = self._start_supervisor(settings, reports, rank0_address.address if rank0_address else "")
            except DynamoMpiError as error:
                return self._stop(f"error: {error}", error.exit_code)
            for line in skipped_checks(settings, self._world.size):
                self._log.info(line)
            for line in obsolete(settings):
                self._log.warning(line)
            hardware_checks = plan_hardware_checks(settings, result.subject.layout, ranks_by_host(reports))
            spec = engine_spec(settings, inputs)._replace(probe=hardware_checks.pack() if hardware_checks else "")
            self._staging = staging = LeaderStaging(self._context, settings, self._hooks)
            network = rank0_address.network if rank0_address else ""
            stage = staging.plan(reports, network, describe_read_ahead(settings, inputs))
            self._caches = caches = LeaderCaches(self._context, settings, self._hooks)
            spec = spec._replace(bind=bind, stage=stage, caches=caches.plan(result.subject, inputs, reports))
            is_staged = staging.is_on or caches.is_on
            self._phases.ahead = "hardware_check" if spec.probe else "stage" if is_staged else "load"
            self._world.broadcast(CONTINUE + supervisor.rendezvous.pack(spec.pack()))
            bind_to_gpu(self._context, spec)
            watch_gpus(self._context, reports[0])
            caches.begin()
            staging.begin()
        if spec.probe and (refused := self._check_hardware(settings, result, spec, reports, supervisor)):
            supervisor.close()
            return refused
        copy, code = self._finish_staging(staging, supervisor, caches)
        if code is not ExitCode.OK:
            return code
        spec = spec._replace(model_dir=copy or spec.model_dir)
        lease = self._hooks.add_instance_lease(settings)
        worker = WorkerContext(self._context, settings, supervisor, self._hooks, reports, lease)
        if settings.engine == "trtllm":
            exit_code = self._lead_trtllm(worker, inputs, spec.model_dir)
        else:
            from dynamo_mpi.runtime.engine_runner import EngineRunner

            runner = EngineRunner(worker, signals, self._release_ranks)
            exit_code = runner.run(spec, inputs.shape.bos_token_id or 0, partial(self._on_ready, settings))
        supervisor.close()
        return exit_code

    def _stage_only(self, settings: Settings) -> ExitCode:
        """Copy the model to the nodes, and end. Neither an engine config nor etcd or NATS is needed.

        Raises:
            DynamoMpiError: it can't begin.
        """
        reports = self._collect_reports(ReportRequest(tuple(self._context.argv), str(settings.model), (), ()))
        code, text = refusal_of_ranks(reports)
        if code is not ExitCode.OK:
            return self._stop(text, code)
        rank0_address = self._choose_address(settings, reports)
        self._staging = staging = LeaderStaging(self._context, settings, self._hooks)
        plan = staging.plan(reports, rank0_address.network if rank0_address else "")
        self._catch_signals()
        supervisor = self._start_supervisor(settings, reports, rank0_address.address if rank0_address else "")
        spec = EngineSpec("", str(settings.model), 1, 1, 1, stage=plan)
        self._phases.ahead = "stage"
        self._world.broadcast(CONTINUE + supervisor.rendezvous.pack(spec.pack()))
        staging.begin()
        _, code = self._finish_staging(staging, supervisor)
        if code is ExitCode.OK:
            self._release_ranks(code)
            supervisor.close()
        return code

    def _finish_staging(
        self, staging: LeaderStaging, supervisor: WorldSupervisor, caches: LeaderCaches | None = None
    ) -> tuple[str, ExitCode]:
        """Return the copy's folder, empty for the model's own; or end the world in order, and return the exit code."""
        if not staging.is_on and (caches is None or not caches.is_on):
            return "", ExitCode.OK
        try:
            with self._phases.enter("stage"):
                copy = staging.finish()
                if caches is not None:
                    caches.finish(supervisor)
            return copy, ExitCode.OK
        except DynamoMpiError as error:
            supervisor.report_orderly_failure(error)
            self._release_ranks(error.exit_code)
            supervisor.close()
            return "", error.exit_code

    def _choose_address(self, settings: Settings, reports: Sequence[RankReport]) -> Choice | None:
        # only ranks on several hosts report their networks
        if not any(report.networks for report in reports):
            return None
        from dynamo_mpi.runtime.reach import choose_rank0_address

        choice = choose_rank0_address(reports, settings.liveness_network)
        if choice is not None:
            self._log.info(choice.line)
        return choice

    def _check_hardware(
        self,
        settings: Settings,
        result: PreflightResult,
        spec: EngineSpec,
        reports: Sequence[RankReport],
        supervisor: WorldSupervisor,
    ) -> ExitCode:
        """Run the hardware checks with all ranks, and let them continue or stop."""
        from dynamo_mpi.checks.hardware import EvaluationInput
        from dynamo_mpi.checks.run_hardware_checks import run_hardware_checks

        with self._phases.enter("hardware_check"):
            evaluation_input = EvaluationInput(
                HardwareCheckPlan.unpack(spec.probe), reports, result.subject.cluster.gpu, result.weights
            )
            report = run_hardware_checks(
                self._world, evaluation_input, supervisor, os.environ, strict=settings.probe_strict
            )
            self._phases.mark_local_done()
            if self._hooks.status is not None:
                self._hooks.status.hardware = tuple(finding.severity for finding in report.findings)
            if (error := report.error) is not None:
                supervisor.report_orderly_failure(error)
                self._release_ranks(error.exit_code)
                return error.exit_code
            self._log.info(report.text)
            self._hooks.on_hardware_checked(report.figures)
            self._world.broadcast(CONTINUE)
        return ExitCode.OK

    def _start_supervisor(self, settings: Settings, reports: Sequence[RankReport], address: str) -> WorldSupervisor:
        """Start the supervisor, which listens at ``address`` or, if that is empty, at the host's own address."""
        gc.enable()
        from dynamo_mpi.supervisor.failure_reports import remove_stale_failure_files
        from dynamo_mpi.supervisor.rendezvous import SupervisorConfig
        from dynamo_mpi.supervisor.supervisor import WorldSupervisor

        label = _label(settings)
        if problem := remove_stale_failure_files(settings.failure_dir, label):
            self._log.warning(problem)
        failure_dir, log_dir = str(settings.failure_dir or ""), str(settings.log_dir or "")
        config = SupervisorConfig(
            settings.liveness_network, settings.heartbeat_timeout, failure_dir, label, log_dir, address
        )
        self._supervisor = supervisor = WorldSupervisor(self._context, reports, config, self._hooks)
        self._hooks.add_supervision_hooks(settings, supervisor, self._preflight_seconds)
        return supervisor

    def _publish_record(
        self, settings: Settings, result: PreflightResult, reports: Sequence[RankReport]
    ) -> ShutdownSignals:
        """Publish the worker record, and compare it with those of earlier peers."""
        # imported after the preflight result: a refused layout doesn't need it
        from dynamo_mpi.runtime.worker_record import planned_card, record_of

        self._record_publisher = self._hooks.add_record_hooks(
            settings, record_of(settings, result, reports, self._phases)
        )
        signals = self._catch_signals()
        subject = result.subject
        card = planned_card(settings, subject.config, subject.shape.context_length)
        self._record_publisher.publish(settings, clients_environ(), card)
        return signals

    def _catch_signals(self) -> ShutdownSignals:
        """Handle signals in a thread: from here on the main thread may block in the engine."""
        from dynamo_mpi.supervisor.signals import ShutdownSignals, signals_of

        agent = self._context.agent
        agent.uninstall_signal_handlers()
        self._signals = ShutdownSignals(
            self._terminate_now, signals_of(self._context.launch.launcher), agent.note_signal
        )
        return self._signals

    def _terminate_now(self, number: int) -> None:
        if self._supervisor is not None:
            self._supervisor.abort(TerminatedBySignal(number), of_signal(number))
        # an error here must not prevent the abort
        run_suppressed(partial(self._context.agent.send, "reported"))
        self._hooks.on_exit(of_signal(number))
        self._world.abort(of_signal(number))

    def _collect_reports(self, request: ReportRequest) -> list[RankReport]:
        context = self._context
        self._world.broadcast(CONTINUE + request.pack())
        answers = self._world.gather(
            collect_rank_report(request, context.launch, context.argv, context.mpi_version).pack()
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
        self._release_ranks(code)
        return code

    def _release_ranks(self, code: ExitCode) -> None:
        """Let the other ranks exit. Everything else must be done before, as the launcher may end rank 0 when the first rank exits."""
        if self._signals is not None:
            self._signals.close()
        self._hooks.on_shutdown(code)
        if self._staging is not None:
            self._staging.cancel()
        if self._caches is not None:
            self._caches.end()
        message = STOP + bytes([code])
        if self._supervisor is None:
            self._world.broadcast(message)
            return
        # while the supervisor runs, it can name a rank that doesn't finish
        with self._supervisor.deadline(SHUTDOWN_SECONDS, "not all ranks have finished", code=int(code) or None):
            self._world.broadcast(message)
            self._world.barrier(2 * SHUTDOWN_SECONDS)
        if self._caches is not None:
            self._caches.remove()

    def _lead_trtllm(self, worker: WorkerContext, inputs: PreflightInputs, model_dir: str) -> int:
        from dynamo_mpi.runtime.trtllm_runner import TrtllmRunner

        gpus_per_node = inputs.config.gpus_per_node or len(worker.reports) // len(hosts(worker.reports))
        # with a draft model, some of the engine's samplers fail for a request with log probabilities
        log_probs = inputs.config.speculative is None
        runner = TrtllmRunner(worker, gpus_per_node, inputs.shape.bos_token_id or 0, model_dir, log_probs=log_probs)
        code = runner.run(partial(self._on_ready, worker.settings))
        self._release_ranks(code)
        self._log.info(f"exit: {'done' if code is ExitCode.OK else f'code {int(code)}'} after {self._phases.age:.1f} s")
        return code

    def _on_ready(self, settings: Settings) -> None:
        seconds = self._phases.durations
        # TensorRT-LLM's worker registers before its first completion
        spans = ", ".join(f"{name} {seconds[name]:.1f} s" for name in ("load", "warmup", "register") if name in seconds)
        self._log.info(
            f"ready: {settings.served_model_name} at {settings.endpoint} after {self._phases.age:.1f} s "
            f"(verdict {self._preflight_seconds:.1f} s, {spans})"
        )
        self._hooks.on_ready()


def _label(settings: Settings) -> str:
    """Return the name prefix of the files of this worker's ranks."""
    return settings.endpoint.removeprefix("dyn://").split(".")[1]


def run_leader(
    context: RankContext, sources: WorkerSources, health_client: HealthClient | None, notifier: SystemdNotifier | None
) -> int:
    """Run rank 0 and return the exit code. See `LeaderRank`."""
    return LeaderRank(context, sources, LeaderHooks(context, health_client, notifier)).run()
