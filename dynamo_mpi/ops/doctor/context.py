# SPDX-License-Identifier: Apache-2.0
"""What every question is asked with, and what a question is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo, detect_launcher

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo_mpi.ops.doctor.check import Check

QUESTION_SECONDS = 5.0
"""What asking another program or server may take by default: a Slurm controller that is busy answers in one or two."""
# of the whole time, so that a question can still say that it got no answer
_SHARE = 0.9
_ALONE = LaunchInfo(Launcher.ALONE)
# Slurm's own steps: of batch scripts, of interactive shells
_SPECIAL_STEPS = 0xFFFFFFF0
_RANKS = frozenset(Launcher) - {Launcher.ALONE, Launcher.SLURM_SHELL}


@dataclass(frozen=True)
class Context:
    """Where and how to look.

    Args:
        environ: the environment of this process.
        started: when it all began, as `time.monotonic` counts.
        seconds: all of it together.
        run_dir: a deployment's folder.
        write: whether a key may be written to etcd, to see whether it can.
        launch: what started this process.
    """

    environ: Mapping[str, str]
    started: float = field(default_factory=time.monotonic)
    seconds: float = 10.0
    run_dir: Path | None = None
    write: bool = False
    launch: LaunchInfo = _ALONE

    @classmethod
    def of(
        cls, environ: Mapping[str, str], seconds: float, run_dir: Path | None = None, write: bool = False
    ) -> Context:
        """Return the context of this process from now on."""
        launch = detect_launcher(environ)
        if launch.launcher is Launcher.SRUN_WITHOUT_MPI and _is_shell(environ):
            launch = launch._replace(launcher=Launcher.SLURM_SHELL)
        return cls(environ, time.monotonic(), seconds, run_dir, write, launch)

    @property
    def in_rank(self) -> bool:
        """Are we where a rank would be? What is missing here is missing to the ranks."""
        return self.launch.launcher in _RANKS

    @property
    def end(self) -> float:
        """When the last question has to have its answer, as `time.monotonic` counts."""
        return self.started + self.seconds * _SHARE

    def left(self, most: float = QUESTION_SECONDS) -> float:
        """Return the seconds that asking somebody may take from now on; never none at all."""
        return max(0.01, min(most, self.end - time.monotonic()))


def _is_shell(environ: Mapping[str, str]) -> bool:
    """Is this task of srun one that somebody types in (``srun --pty bash``, or ``salloc`` where Slurm starts its shell on a node)?"""
    step = environ.get("SLURM_STEP_ID", "")
    return "SLURM_PTY_PORT" in environ or (step.isdecimal() and int(step) >= _SPECIAL_STEPS)


class Question(NamedTuple):
    """Something to look at, in a thread of its own.

    Args:
        id: of what it finds, and of the check that says that it found nothing in time.
        ask: looks.
    """

    id: str
    ask: Callable[[Context], Iterable[Check]]


class Section(NamedTuple):
    """Questions that belong together.

    Args:
        name: for ``--only`` and the heading.
        questions: in the order in which their answers are shown.
    """

    name: str
    questions: tuple[Question, ...]
