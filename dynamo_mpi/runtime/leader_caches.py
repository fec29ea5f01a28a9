# SPDX-License-Identifier: Apache-2.0
"""Rank 0's part in compile caches: finds the archive for this worker, decides whether all ranks are seeded, and publishes a new one."""

from __future__ import annotations

import os
import threading
import time

from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.engines.spec import COMPILING
from dynamo_mpi.layout.format import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_mpi.checks.preflight import PreflightInputs
    from dynamo_mpi.checks.rank_report import RankReport
    from dynamo_mpi.common.hooks import WorkerHooks
    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.layout.layout import LayoutSpec
    from dynamo_mpi.stage.cache_session import CachePlan, CacheSession, Seeding
    from dynamo_mpi.supervisor.context import RankContext
    from dynamo_mpi.supervisor.supervisor import WorldSupervisor

_LOOK_SECONDS = 20.0
_PUBLISH_SECONDS = 60.0
_MOST_SHOWN = 3
_SETTING = "--cache (DYN_MPI_CACHE)"


class LeaderCaches(WorkerHook):
    """The compile caches of one worker; without ``--cache``, nothing happens.

    Args:
        context: rank 0's context.
        settings: the worker's settings.
        hooks: called with what it took.
    """

    def __init__(self, context: RankContext, settings: Settings, hooks: WorkerHooks) -> None:
        self._context, self._settings, self._hooks = context, settings, hooks
        self._world, self._log = context.world, context.log
        self._plan: CachePlan | None = None
        self._key: dict[str, Any] = {}
        self._session: CacheSession | None = None
        self._next: Callable[[float], tuple[int, bytes] | None] = lambda _: None
        self._figures: dict[str, Any] = {}

    @property
    def is_on(self) -> bool:
        """Whether there is anything to do."""
        return self._plan is not None

    def plan(self, subject: LayoutSpec, inputs: PreflightInputs, reports: Sequence[RankReport]) -> str:
        """Return what the ranks are to do, for `EngineSpec`; empty for nothing.

        Args:
            subject: the worker that the preflight evaluated.
            inputs: rank 0's inputs of the preflight.
            reports: the ranks' reports, in rank order.
        """
        settings = self._settings
        if settings.cache is None:
            return ""
        if settings.engine not in COMPILING:
            self._log.info(f"{_SETTING} has no effect: the {settings.engine} engine compiles nothing")
            return ""
        import tempfile

        from dynamo_mpi.checks.rank_facts import rows_of
        from dynamo_mpi.stage.cache_key import KeyUnknownError, key_of
        from dynamo_mpi.stage.cache_session import CachePlan
        from dynamo_mpi.stage.cache_store import Part, folders_of, name_of
        from dynamo_mpi.stage.compile_caches import assign

        request = inputs.report_request
        try:
            self._key = key_of(subject, request.files, rows_of(reports), without_gpus=not request.gpus)
        except KeyUnknownError as error:
            self._warn(str(error))
            return ""
        assignment = assign("", os.environ)
        for line in assignment.own:
            self._log.info(line)
        if not assignment.variables:
            return ""
        name = name_of(str(settings.model), self._key)
        folders = folders_of(str(settings.cache), name)
        stage = [settings.stage] if os.path.isabs(settings.stage) else []
        bases = tuple(dict.fromkeys((*stage, tempfile.gettempdir(), "/tmp")))  # noqa: S108 - folders there are this user's own
        found = self._ask(
            {"do": "look", "folders": folders, "key": self._key, "ranks": self._world.size}, _LOOK_SECONDS
        )
        target = folders[0]
        if "problem" in found:
            self._warn(found["problem"])
            target = "" if found.get("refused") else target
        source = str(found.get("folder", ""))
        # an archive that root has made stays as it is
        target = target if source in ("", target) else ""
        parts = tuple(Part(*part) for part in found.get("parts", ()))
        self._plan = CachePlan(name, bases, source, parts, target)
        return self._plan.pack()

    def begin(self) -> None:
        """Start. Not collective."""
        if self._plan is not None:
            from dynamo_mpi.stage.cache_session import CacheSession

            self._session = CacheSession(
                0, self._plan, os.environ, lambda folder: self._context.agent.send(f"caches {folder}")
            )
            self._session.begin()

    def finish(self, supervisor: WorldSupervisor) -> None:
        """Wait until the ranks are seeded, and decide. Collective.

        Args:
            supervisor: receives what the other ranks write back.
        """
        if self._session is None or self._plan is None:
            return
        self._next = supervisor.next_caches
        seeding = self._session.finish(self._world)
        if seeding is None:
            return
        if seeding.problems:
            more = len(seeding.problems) - _MOST_SHOWN
            self._warn("; ".join(seeding.problems[:_MOST_SHOWN]) + (f"; and {more} more" if more > 0 else ""))
        self._log_seeding(seeding)
        self._figures = {
            "seeded": seeding.seeded,
            "files": seeding.files if seeding.seeded else 0,
            "bytes": seeding.size if seeding.seeded else 0,
            "seconds": seeding.seconds,
            "archive": self._plan.source or self._plan.target,
            "new_files": 0,
        }
        self._hooks.add(self)
        self._hooks.on_caches(dict(self._figures))

    def on_ready(self) -> None:
        """Write back what was compiled, in a thread."""
        if self._session is not None and self._session.writes:
            threading.Thread(target=self._write_back, name="caches", daemon=True).start()

    def on_exit(self, code: int) -> None:
        """Remove rank 0's folder."""
        self.remove()

    def remove(self) -> None:
        """End what still runs, and remove rank 0's folder. Idempotent."""
        if self._session is not None:
            self._session.remove()

    def _write_back(self) -> None:
        from dynamo_mpi.stage.cache_session import collect

        session, plan = self._session, self._plan
        if session is None or plan is None:
            return
        began = time.monotonic()
        # the others answer in any case
        results = collect(self._world.size, session.save(), self._next)
        new = sum(int(result.get("new", 0)) for result in results)
        problems = list(dict.fromkeys(str(result["problem"]) for result in results if "problem" in result))
        if new and not problems:
            request = {
                "do": "publish",
                "target": plan.target,
                "key": self._key,
                "parts": [result["part"] for result in results],
            }
            answer = self._ask(request, _PUBLISH_SECONDS)
            problems += [str(answer["problem"])] if "problem" in answer else []
        if session.is_over:
            return  # the worker ends
        if problems:
            self._log.warning(
                f"compile caches are not written back: {'; '.join(problems[:_MOST_SHOWN])}\n"
                f"  expected: room in {_SETTING}, in folders that only this user can write\n"
                f"  fix:      correct it; the next start compiles again"
            )
            return
        if not new:
            self._log.info("caches: nothing new was compiled")
            return
        seconds = round(time.monotonic() - began, 3)
        size = sum(int(result["part"][1]) for result in results)
        self._figures |= {"new_files": new, "written_bytes": size, "written_seconds": seconds}
        self._log.info(
            f"caches: {new} new files; written back to {plan.target} ({size / 2**20:.1f} MiB, {seconds:.1f} s)"
        )
        self._hooks.on_caches(dict(self._figures))

    def _log_seeding(self, seeding: Seeding) -> None:
        plan = self._plan
        if plan is None:
            return
        if seeding.seeded:
            size = f"{counted(seeding.files, 'file')} a rank, {seeding.size / 2**20:.1f} MiB in all"
            self._log.info(f"caches: seeded from {plan.source}: {size}, {seeding.seconds:.1f} s", {"phase": "stage"})
        elif not plan.parts:
            self._log.info(
                f"caches: none yet for this engine, GPU, model and layout in {self._settings.cache}: kernels are compiled"
            )

    def _ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        from dynamo_mpi.stage.cache_session import HelperCall

        return HelperCall(request, os.environ).result(seconds)

    def _warn(self, problem: str) -> None:
        self._log.warning(
            f"compile caches are not seeded, kernels are compiled: {problem}\n"
            f"  expected: in {_SETTING}, archives that only this user or root could have written; on each node, a disk of its own\n"
            f"  fix:      remove the archive or correct its rights, or leave --cache out"
        )
