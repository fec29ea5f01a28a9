# SPDX-License-Identifier: Apache-2.0
"""What `workers.WorkerSet` knows of one worker."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dynamo_mpi.deploy.blame import Blame
    from dynamo_mpi.deploy.recovery import Degrade, MoveToSpare
    from dynamo_mpi.deploy.reports import Beginning, Report
    from dynamo_mpi.deploy.steps import Step, StepEnd


class Ending(NamedTuple):
    """A worker's end, until it is decided what follows.

    Args:
        step: the step, which has ended.
        code: its exit code.
        report: the launcher's own report; None if the ranks have reported.
    """

    step: Step
    code: int
    report: Report | None


@dataclass
class WorkerState:
    """What is known of a worker; times are seconds of the monotonic clock.

    Args:
        count: its starts.
        step: the running step.
        beginning: what was there when that, or the one before it, started.
        ready: when that became ready.
        remains: ends what is left of that step.
        deadline: when that is begun, at the latest.
        silence: the last warning of its ranks about a host that doesn't answer.
        ending: its end, until it is decided what follows.
        next_start: when it starts again.
        failed_at: when it failed, in seconds since 1970, until it serves again.
        found: why it failed, until it starts again.
        planned: what follows as soon as it has drained, and when it must have.
    """

    count: int = 0
    step: Step | None = None
    beginning: Beginning | None = None
    ready: float | None = None
    remains: StepEnd | None = None
    deadline: float = math.inf
    silence: str = ""
    ending: Ending | None = None
    next_start: float | None = None
    failed_at: float | None = None
    found: Blame | None = None
    planned: tuple[MoveToSpare | Degrade, float] | None = None

    @property
    def serves(self) -> bool:
        return self.step is not None and self.ready is not None

    @property
    def lives(self) -> bool:
        return self.step is not None or self.next_start is not None or self.ending is not None

    @property
    def is_pending(self) -> bool:
        return self.lives and not self.serves

    @property
    def beginning_of_step(self) -> Beginning:
        """What was there when the step started that runs, or has just ended."""
        assert self.beginning is not None  # noqa: S101 - a start sets both
        return self.beginning
