# SPDX-License-Identifier: Apache-2.0
"""What the ends of a deployment's checks, and of containers that could not start, mean for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.deploy.pyxis import pyxis_failure
from dynamo_mpi.deploy.services import StepFailed
from dynamo_mpi.deploy.step_commands import KV_CHECK, report_of_kv_check

if TYPE_CHECKING:
    from collections.abc import Sequence

_LOG_CHARACTERS = 4000


def require_container(name: str, output: str, nodes: Sequence[str] = (), ranks_per_node: int = 1) -> None:
    """Check that a step which has ended had its container: another start would end the same way.

    Args:
        name: the step's name.
        output: its output.
        nodes: its nodes, if there are several.
        ranks_per_node: its ranks on each.

    Raises:
        StepFailed: Pyxis could not start it.
    """
    if failure := pyxis_failure(output):
        found, needed, fix = failure.describe(name, nodes, ranks_per_node)
        raise StepFailed(found, status=failure.code, log=output[-_LOG_CHARACTERS:], expected=needed, fix=fix)


def require_check(code: int, words: str) -> None:
    """Check that the check of the layouts accepted them.

    Args:
        code: its exit code.
        words: the end of its output.

    Raises:
        StepFailed: it refused them, or could not run.
    """
    require_container("check", words)
    if code:
        found = f"the check refused the deployment with exit code {code}; nothing was launched"
        needed = "layouts in which the engine can run the model"
        raise StepFailed(found, status=code, log=words, expected=needed, fix="correct what the check names")


def require_kv_check(code: int, words: str, nodes: Sequence[str], *, is_needed: bool) -> str:
    """Check that KV comes from prefill to decode nodes.

    Args:
        code: the KV check's exit code.
        words: the end of its output.
        nodes: its nodes.
        is_needed: whether a failure refuses the deployment.

    Returns:
        A warning; empty for none.

    Raises:
        StepFailed: it doesn't, or the check could not run.
    """
    require_container(KV_CHECK, words, nodes)
    report = report_of_kv_check(words)
    # if Slurm has killed a rank that hung, the step's code is that of the kill
    code = min(code, ExitCode.TEMPORARY) if report else code
    if code and not is_needed:
        return f"warning: the KV check ended with exit code {code}; the workers start all the same"
    if code:
        raise StepFailed(
            f"the KV check refused the deployment with exit code {code}; no worker was started"
            + (f"\n{report}" if report else ""),
            status=code,
            log="" if report else words,
            expected="KV that comes from each prefill node to each decode node",
            fix="correct what the report names" if report else "read the log; --kv-check off skips the check",
        )
    return ""
