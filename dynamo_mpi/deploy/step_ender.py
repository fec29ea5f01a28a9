# SPDX-License-Identifier: Apache-2.0
"""Ends steps in order: asked to drain first, cancelled after their time, killed at last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.common.subprocess import await_exit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dynamo_mpi.common.signals import Interrupts
    from dynamo_mpi.deploy.steps import Step, StepController

POLL_SECONDS = 0.5
CANCEL_SECONDS = 15.0


class StepEnder:
    """Ends steps.

    Args:
        step_controller: signals and cancels them.
        interrupts: a signal that arrives meanwhile shortens the time.
        say: prints one line.
    """

    def __init__(self, step_controller: StepController, interrupts: Interrupts, say: Callable[[str], None]) -> None:
        self._step_controller, self._interrupts, self._say = step_controller, interrupts, say
        # at most one: a second may have arrived since the first was handled
        self._signals_before = min(interrupts.count, 1)

    @property
    def is_hurried(self) -> bool:
        """Whether a further signal has arrived since this was made."""
        return self._interrupts.count != self._signals_before

    def end(self, steps: Sequence[Step], seconds: float, *, is_last: bool = False) -> None:
        """End steps.

        Args:
            steps: those that may run.
            seconds: the time that they have to drain.
            is_last: whether they get it even after a second signal: what they leave nothing else clears.
        """
        before = self._interrupts.count if is_last else self._signals_before
        running = [step for step in steps if step.child.exit_code() is None]
        if running and self._interrupts.count == before:
            self._say(f"ending {', '.join(step.name for step in running)}")
            self._step_controller.signal(running)
            self._wait(running, seconds, before)
        if running := [step for step in running if step.child.exit_code() is None]:
            self._say(f"cancelling {', '.join(step.name for step in running)}")
            self._step_controller.cancel(running)
            self._wait(running, CANCEL_SECONDS, None)
        for step in steps:
            step.child.kill()

    def _wait(self, steps: Sequence[Step], seconds: float, signals_before: int | None) -> None:
        await_exit([step.child for step in steps], seconds, self._interrupts, signals_before, POLL_SECONDS)
