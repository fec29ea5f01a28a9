# SPDX-License-Identifier: Apache-2.0
"""This worker's record, which rank 0 publishes in etcd from preflight on."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from dynamo_mpi import __version__
from dynamo_mpi.common.process import host_name
from dynamo_mpi.discovery.records import LAUNCH_VARIABLE, RecordedLayout, WorkerRecord
from dynamo_mpi.layout.contract import contract_of
from dynamo_mpi.mpi.placement import hosts
from dynamo_mpi.mpi.restart_count import restart_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.checks.rank_report import RankReport
    from dynamo_mpi.common.phases import PhaseTracker
    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.layout.spec import LayoutSpec

_PAIRED = ("prefill", "decode")


def record_of(
    settings: Settings, subject: LayoutSpec, reports: Sequence[RankReport], phases: PhaseTracker
) -> WorkerRecord:
    """Return the worker's record during preflight.

    Args:
        settings: the worker's settings.
        subject: the layout that preflight evaluated.
        reports: the ranks' preflight reports, in rank order.
        phases: rank 0's phases.
    """
    namespace, component, _ = settings.endpoint.removeprefix("dyn://").split(".")
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
        phase_since=began + phases.spans[-1].began,
        pid=os.getpid(),
        host=host_name(),
        launch=os.environ.get(LAUNCH_VARIABLE) or None,
        attempt=restart_count(os.environ),
    )
