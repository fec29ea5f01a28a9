# SPDX-License-Identifier: Apache-2.0
"""Rank 0's part in staging: plans it, logs how far it is, and decides from which folder the engine loads."""

from __future__ import annotations

import os
import time

from dynamo_mpi.common.errors import ModelNotFoundError, RetryableError
from dynamo_mpi.common.frozen import replace
from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.mpi.placement import hosts
from dynamo_mpi.runtime.follower import CONTINUE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.checks.rank_report import RankReport
    from dynamo_mpi.common.hooks import WorkerHooks
    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.stage.coordinator import Status
    from dynamo_mpi.stage.plan import StagePlan
    from dynamo_mpi.stage.session import Staging
    from dynamo_mpi.supervisor.context import RankContext


_MODEL = "regular files, or links that stay within the model's folder or its hub repository"
# as long as the supervisor waits for hooks
_FAILED_SECONDS = 1.0
_NEEDED = "room for it in --stage (DYN_MPI_STAGE) on each node, in a folder that only this user can write"


def settings_to_only_stage(settings: Settings) -> Settings:
    """Return the settings of a world that only stages: it has no files of a worker's, whatever flags it shares with one.

    Raises:
        UsageError: there is no ``--stage``, nor a folder of the site's that can be used.
    """
    from dynamo_mpi.stage.site import folder_to_use

    folder = folder_to_use(settings.stage, os.environ)
    endpoint = f"dyn://{settings.namespace}.stage.generate"
    return replace(settings, stage=folder, endpoint=endpoint, ready_file=None, metrics_file=None, timeline=None)


class LeaderStaging(WorkerHook):
    """The staging of one worker; with ``--stage none``, nothing happens.

    Args:
        context: rank 0's context.
        settings: the worker's settings.
        hooks: called with what it took.
    """

    def __init__(self, context: RankContext, settings: Settings, hooks: WorkerHooks) -> None:
        self._world, self._phases, self._log = context.world, context.phases, context.log
        self._settings, self._hooks = settings, hooks
        self._plan: StagePlan | None = None
        self._staging: Staging | None = None
        self._began = self._due = 0.0
        self._is_failing = False
        self._interval = settings.progress_interval

    @property
    def is_on(self) -> bool:
        """Whether there is anything to do."""
        return self._plan is not None

    def plan(self, reports: Sequence[RankReport], network: str, read_ahead: str = "") -> str:
        """Return what to stage, for `EngineSpec`; empty for nothing.

        Args:
            reports: the ranks' preflight reports, in rank order.
            network: the network that all nodes share; empty if it isn't known.
            read_ahead: how the engine itself reads the model, if it isn't staged.

        Raises:
            ModelNotFoundError: the model's folder can't be copied, and staging is all that is to be done.
            UsageError: copies would be in the model's folder itself.
        """
        settings = self._settings
        folder = settings.stage
        if folder == "auto":
            folder = self._site_folder(reports, read_ahead)
        if folder in ("", "none"):
            return ""
        from dynamo_mpi.stage.manifest import StageError
        from dynamo_mpi.stage.plan import plan_staging

        limits = (settings.stage_readers, settings.stage_timeout, settings.stage_verify == "digest")
        try:
            plan = plan_staging(str(settings.model), folder, reports, network, limits)
        except StageError as error:
            if settings.only_stage:
                raise ModelNotFoundError(
                    f"the model can't be copied: {error}", expected=_MODEL, fix="correct the model's folder"
                ) from None
            self._warn(str(error), _MODEL, "correct the model's folder, or leave --stage out")
            return ""
        self._plan = plan._replace(auto=settings.stage == "auto")
        return self._plan.pack()

    def _site_folder(self, reports: Sequence[RankReport], read_ahead: str) -> str:
        """Return where to stage if no folder is named; empty for nowhere."""
        from dynamo_mpi.stage.site import read_by_each_node, site_folder

        nodes = len(hosts(reports))
        shared = read_by_each_node(str(self._settings.model), nodes)
        if not shared:
            return ""
        site = site_folder(os.environ)
        if site is not None and not site.problem:
            self._log.info(
                f"stage: the {nodes} nodes copy the model to {site.path} ({site.variable}), as each would read it from {shared}; "
                "--stage none leaves that out"
            )
            return site.path
        unfit = f"{site.variable} ({site.path}) {site.problem}; " if site is not None else ""
        self._log.info(
            f"stage: each of the {nodes} nodes reads the model from {shared}; {unfit}--stage DIR has them read it once for all"
            + (f". {read_ahead}" if read_ahead else "")
        )
        return ""

    def begin(self) -> None:
        """Start it. Collective."""
        if self._plan is not None:
            from dynamo_mpi.stage.session import Staging

            self._began = time.monotonic()
            self._due = self._began + self._interval
            self._staging = Staging(self._world, self._plan, self._on_status)
            self._hooks.add(self)
            self._staging.begin()
            if awaited := self._staging.awaited:
                self._log.info(
                    f"stage: another worker on {', '.join(awaited)} copies the model, waiting for it "
                    f"(at most {self._plan.seconds:g} s)"
                )

    def cancel(self) -> None:
        """End it, as the worker stops; what is copied only in part is removed. No effect once it has ended."""
        if self._staging is not None:
            self._staging.cancel()

    def on_failure_detected(self) -> None:
        """Remove what is copied on this node only in part, if that can be done before the worker's end."""
        self._is_failing = True
        if self._staging is not None:
            self._staging.cancel(_FAILED_SECONDS)

    def finish(self) -> str:
        """Wait until all nodes have a copy, in the phase ``stage``. Collective.

        Returns:
            The folder of the copies, the same on all nodes; empty to load from the model's own folder.

        Raises:
            RetryableError: the model has changed meanwhile; or it wasn't staged, and that is all that is to be done. The other ranks have
                not received it.
        """
        if self._staging is None:
            return ""
        from dynamo_mpi.stage.session import describe

        outcome = self._staging.finish()
        while self._is_failing:  # that is what has ended it; until the process is ended
            time.sleep(_FAILED_SECONDS)
        self._phases.mark_local_done()
        if outcome.problem:
            self._warn(outcome.problem)
        else:
            self._log.info(describe(outcome.figures), dict(outcome.figures))
            self._hooks.on_staged(dict(outcome.figures))
            if damaged := outcome.figures.get("damaged"):
                self._log.warning(
                    f"the copy of the model on {', '.join(damaged)} was damaged, and has been made again\n"
                    "  expected: a disk that keeps what is written\n"
                    "  fix:      look at that node's disk and memory (its kernel log, smartctl, ECC counts)"
                )
        self._world.broadcast(CONTINUE + os.fsencode(outcome.path))
        return outcome.path

    def _warn(self, problem: str, expected: str = _NEEDED, fix: str = "correct --stage, or leave it out") -> None:
        if self._settings.only_stage:
            raise RetryableError(
                f"the model is not staged: {problem}", expected=_NEEDED, fix="correct --stage, or what it says"
            )
        if self._settings.stage == "auto":
            self._log.info(f"stage: the model is not staged, and is loaded from {self._settings.model}: {problem}")
            return
        self._log.warning(
            f"the model is not staged, and is loaded from {self._settings.model}: {problem}\n"
            f"  expected: {expected}\n"
            f"  fix:      {fix}"
        )

    def _on_status(self, status: Status) -> None:
        from dynamo_mpi.stage.session import describe_status

        now = time.monotonic()
        if now < self._due or self._settings.progress == "off":
            return
        self._interval *= 2
        self._due = now + self._interval
        rate = status.have / (now - self._began)
        self._log.info(describe_status(status, rate), {"phase": "stage", **status._asdict()})
