# SPDX-License-Identifier: Apache-2.0
"""What rank 0 publishes about its worker: the record in etcd, from preflight on, and the ready file, while the worker accepts requests."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from dynamo_mpi import __version__
from dynamo_mpi.common.folder_walk import reason
from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.common.own_files import remove_own, write_own
from dynamo_mpi.common.process import host_name
from dynamo_mpi.common.worker_process import process_start
from dynamo_mpi.discovery.model_cards import PlannedCard
from dynamo_mpi.discovery.records import LAUNCH_VARIABLE, RecordedLayout, WorkerRecord
from dynamo_mpi.engines.reference.config import DEFAULT_CONTEXT, DEFAULT_KV_BLOCK
from dynamo_mpi.layout.contract import contract_of
from dynamo_mpi.mpi.launcher import restart_count
from dynamo_mpi.mpi.placement import hosts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.checks.preflight import PreflightResult
    from dynamo_mpi.checks.rank_report import RankReport, ReportRequest
    from dynamo_mpi.common.phases import PhaseTracker
    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.layout.engine_config import EngineConfig
    from dynamo_mpi.supervisor.context import RankContext


_PAIRED = ("prefill", "decode")


def record_of(
    settings: Settings, result: PreflightResult, reports: Sequence[RankReport], phases: PhaseTracker
) -> WorkerRecord:
    """Return the worker's record during preflight.

    Args:
        settings: the worker's settings.
        result: the preflight's, with the layout that it evaluated.
        reports: the ranks' preflight reports, in rank order.
        phases: rank 0's phases.
    """
    namespace, component, _ = settings.endpoint.removeprefix("dyn://").split(".")
    subject = result.subject
    layout, nodes = subject.layout, hosts(reports)
    began = time.time() - phases.age
    return WorkerRecord(
        role=settings.role,
        engine=settings.engine,
        namespace=namespace,
        component=component,
        endpoint=settings.endpoint,
        model=settings.served_model_name,
        phase="preflight",
        layout=RecordedLayout(
            layout.tp_size,
            layout.pp_size,
            layout.cp_size,
            layout.moe_ep_size,
            layout.enable_attention_dp,
            len(reports),
            len(reports) // len(nodes),
        ),
        hosts=nodes,
        contract=contract_of(subject) if settings.role in _PAIRED else None,
        dynamo_mpi=__version__,
        trtllm=None if subject.version is None else str(subject.version),
        job=os.environ.get("SLURM_JOB_ID") or None,
        step=os.environ.get("SLURM_STEP_ID") or None,
        started=began,
        process_start=process_start(os.getpid()),
        phase_since=began + phases.spans[-1].began,
        pid=os.getpid(),
        host=host_name(),
        launch=os.environ.get(LAUNCH_VARIABLE) or None,
        attempt=restart_count(os.environ),
        binding=_binding(result),
    )


def _binding(result: PreflightResult) -> dict[str, Any] | None:
    if not result.bindings:
        return None
    from dynamo_mpi.checks.binding import as_record

    return as_record(result.bindings) or None


_TEMPLATE_FLAG = "--custom-jinja-template"


def planned_card(settings: Settings, config: EngineConfig, model_context: int | None) -> PlannedCard | None:
    """Return the model card that this worker will register; None if it has none.

    Args:
        settings: the worker's settings.
        config: the engine's.
        model_context: the model's own context, in tokens.
    """
    if settings.role == "encode":
        return None
    # TensorRT-LLM says the size of its blocks when it has loaded
    context, block = config.max_seq_len, None
    if settings.engine == "reference":
        # what it has without a setting
        context = context or min(model_context or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
        block = config.kv_cache.tokens_per_block or DEFAULT_KV_BLOCK
    template = os.environ.get("DYN_CUSTOM_JINJA_TEMPLATE")
    words = [word for text in settings.passed_on for word in text.split("=", 1)]
    if _TEMPLATE_FLAG in words[:-1]:
        template = words[words.index(_TEMPLATE_FLAG) + 1]
    return PlannedCard(
        settings.served_model_name,
        "aggregated" if settings.role == "agg" else settings.role,
        settings.model,
        Path(os.path.expanduser(template)) if template else None,
        context,
        block,
    )


class ReadyFile(WorkerHook):
    """Writes the ready file when the worker is ready, and removes it when it is not any more.

    Args:
        context: rank 0's context.
        settings: the worker's settings; they name the file.
        preflight_seconds: seconds from the start to the end of preflight.
        system: URL of /health, /live and /metrics; None if they aren't served.
        preflight: rank 0's request of the preflight and its own report, with which spare nodes are compared; None for nothing.
    """

    def __init__(
        self,
        context: RankContext,
        settings: Settings,
        preflight_seconds: float,
        system: str | None,
        preflight: tuple[ReportRequest, RankReport] | None = None,
    ) -> None:
        self._context, self._settings = context, settings
        self._preflight_seconds, self._system, self._preflight = preflight_seconds, system, preflight

    def on_ready(self) -> None:
        """Write the file atomically."""
        path, phases = self._settings.ready_file, self._context.phases
        if path is None:
            return
        content = {
            "pid": os.getpid(),
            "host": os.uname().nodename,
            "started": time.time() - phases.age,
            "process_start": process_start(os.getpid()),
            "ranks": self._context.world.size,
            "attempt": restart_count(os.environ),
            "model": self._settings.served_model_name,
            "endpoint": self._settings.endpoint,
            "system": self._system,
            "phases": phases.durations,
            "verdict_seconds": self._preflight_seconds,
            "ready_seconds": phases.age,
            "node": self._node(),
        }
        try:
            # as the umask allows: other users' scripts may wait for it, and it contains no secret
            write_own(path, f"{json.dumps(content)}\n".encode(), 0o666)
        except OSError as error:
            self._context.log.warning(f"the ready file {path} can't be written: {reason(error)}")

    def _node(self) -> dict[str, Any] | None:
        if self._preflight is None:
            return None
        from dynamo_mpi.checks.node_facts import facts_of_worker

        return facts_of_worker(*self._preflight)._asdict()

    def on_failure_detected(self) -> None:
        """Remove the file."""
        remove_ready_file(self._settings.ready_file)

    def on_shutdown(self, code: int) -> None:
        """Remove the file."""
        remove_ready_file(self._settings.ready_file)

    def on_exit(self, code: int) -> None:
        """Remove the file."""
        remove_ready_file(self._settings.ready_file)


def remove_ready_file(path: Path | None) -> str:
    """Remove the ready file, also one that an earlier, killed run has left; return why it can't be removed, or an empty text."""
    return "" if path is None else remove_own(path)
