# SPDX-License-Identifier: Apache-2.0
"""What the hardware checks have in common: each rank's input, rank 0's input for the evaluation, and the result.

A check is a module with two functions, a line in `checks.run_hardware_checks`, its name in `config.options.PROBES`, and its place in `auto`
(`checks.hardware_check_plan.chosen_checks`):

    measure(part: CheckContext) -> list[str]
        on every rank, in its main thread; may use `part.world`, on all ranks alike
    judge(answers: Sequence[Sequence[str]], case: EvaluationInput) -> CheckResult
        on rank 0, over the results of `measure` in rank order; pure
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
    """One rank's input.

    Args:
        world: all ranks.
        plan: the checks and their parameters.
        environ: this rank's environment.
        began: start of the checks on this rank, by `time.monotonic`.
    """

    world: World
    plan: HardwareCheckPlan
    environ: Mapping[str, str]
    began: float


class EvaluationInput(NamedTuple):
    """Rank 0's input for the evaluation.

    Args:
        plan: the checks and their parameters.
        ranks: each rank's host.
        kind: of GPU, as `layout.gpus` names it; None if it isn't known.
        weights: bytes of each rank's weights; empty if they aren't known.
        earlier: figures of the checks that ran before, by check.
    """

    plan: HardwareCheckPlan
    ranks: Sequence[HasHost]
    kind: str | None = None
    weights: tuple[int, ...] = ()
    earlier: Mapping[str, Mapping[str, Any]] = {}


class CheckResult(NamedTuple):
    """The result of a check.

    Args:
        findings: the rules' findings.
        figures: the measurements, as plain data for JSON.
        line: a summary of the figures in one line; empty for none.
    """

    findings: tuple[Finding, ...]
    figures: Mapping[str, Any]
    line: str = ""
