# SPDX-License-Identifier: Apache-2.0
"""What the probes have in common: what each rank gives them, what rank 0 judges by, and what comes out.

A check is a module with two functions, a line in `checks.run_hardware_checks`, its name in `config.options.PROBES`, and its place in `auto`
(`checks.hardware_check_plan.chosen_checks`):

    measure(part: Part) -> list[str]                              on every rank, in its main thread; may use `part.world`, all ranks alike
    judge(answers: Sequence[Sequence[str]], case: Case) -> Outcome     on rank 0, over what `measure` returned, in rank order; pure
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.checks.hardware_check_plan import HardwareCheckPlan
    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.mpi.placement import HasHost
    from dynamo_mpi.mpi.world import World


class CheckContext(NamedTuple):
    """One rank's side.

    Args:
        world: all ranks.
        plan: what is probed.
        environ: this rank's environment.
        began: when this rank began, by `time.monotonic`.
    """

    world: World
    plan: HardwareCheckPlan
    environ: Mapping[str, str]
    began: float


class EvaluationInput(NamedTuple):
    """What rank 0 judges by.

    Args:
        plan: what is probed.
        ranks: where each rank is.
        kind: of GPU, as `layout.gpus` names it; None where it isn't known.
        weights: bytes of each rank's weights; empty where they aren't known.
        earlier: figures of the probes that came before, by probe.
    """

    plan: HardwareCheckPlan
    ranks: Sequence[HasHost]
    kind: str | None = None
    weights: tuple[int, ...] = ()
    earlier: Mapping[str, Mapping[str, Any]] = {}


class CheckResult(NamedTuple):
    """What a probe found.

    Args:
        findings: what there is to say.
        figures: what it has measured, as plain data for JSON.
        line: the figures in a few words; empty for none.
    """

    findings: tuple[Finding, ...]
    figures: Mapping[str, Any]
    line: str = ""
