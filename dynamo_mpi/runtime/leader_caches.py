# SPDX-License-Identifier: Apache-2.0
"""Rank 0's part in compile caches: finds the archive for this worker, decides whether all ranks are seeded, and publishes a new one."""

from __future__ import annotations

import os
import re
import threading
import time

from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.engines.spec import COMPILING
from dynamo_mpi.layout.format import counted
from dynamo_mpi.mpi.launcher import restart_count

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_mpi.checks.preflight import PreflightInputs
    from dynamo_mpi.checks.rank_report import RankReport
    from dynamo_mpi.common.hooks import WorkerHooks
    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.layout.layout import LayoutSpec
    from dynamo_mpi.stage.cache_call import Problem
    from dynamo_mpi.stage.cache_session import CachePlan, CacheSession, Seeding
    from dynamo_mpi.supervisor.context import RankContext
    from dynamo_mpi.supervisor.supervisor import WorldSupervisor

_LOOK_SECONDS = 20.0
_PUBLISH_SECONDS = 60.0
_NOT_SEEDED = "not seeded, kernels are compiled"
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
        self._is_skipped = False

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
        from dynamo_mpi.checks.rank_facts import rows_of
        from dynamo_mpi.stage.cache_call import Problem
        from dynamo_mpi.stage.cache_folder import bases_for
        from dynamo_mpi.stage.cache_key import KeyUnknownError, key_of
        from dynamo_mpi.stage.cache_session import CachePlan
        from dynamo_mpi.stage.cache_store import Part, folders_of, name_of
        from dynamo_mpi.stage.compile_caches import assign

        request = inputs.report_request
        try:
            self._key = key_of(subject, request.files, rows_of(reports), without_gpus=not request.gpus)
        except KeyUnknownError as error:
            self._warn(
                Problem(str(error), "NVML, which names each rank's GPU and driver", "run nvidia-smi on that node")
            )
            return ""
        assignment = assign("", os.environ)
        for line in assignment.own:
            self._log.info(line)
        if not assignment.variables:
            return ""
        name = name_of(str(settings.model), self._key)
        folders = folders_of(str(settings.cache), name)
        worker = re.sub(r"[^A-Za-z0-9.-]", "_", settings.endpoint.removeprefix("dyn://"))
        found = self._ask(
            {"do": "look", "folders": folders, "key": self._key, "ranks": self._world.size, "worker": worker},
            _LOOK_SECONDS,
        )
        target = folders[0]
        if (problem := Problem.in_answer(found)) is not None:
            self._warn(problem, "not read from this user's own archive" if "folder" in found else _NOT_SEEDED)
            target = "" if found.get("refused") else target
        for line in found.get("skipped", ()):
            self._log.info(f"caches: skipped, as if it weren't there: {line}")
        source = str(found.get("folder", ""))
        # an archive that root has made stays as it is
        target = target if source in ("", target) else ""
        parts = tuple(Part(*part) for part in found.get("parts", ()))
        if parts and found["failed"] and (start := restart_count(os.environ)) > 1:
            self._warn(
                Problem(
                    f"start {start} of this worker; the one before may have failed with the archive in {source}",
                    "a start that comes to serve",
                    "none needed: this start replaces it if it serves; one that can't be written is used at first starts only",
                )
            )
            self._is_skipped, source, parts = True, "", ()
        self._plan = CachePlan(name, bases_for(settings.stage), source, parts, target, worker)
        return self._plan.pack()

    def begin(self) -> None:
        """Start. Not collective."""
        if self._plan is not None:
            from dynamo_mpi.stage.cache_session import CacheSession

            agent, node_ranks = self._context.agent, self._context.launch.local_size or self._world.size
            self._session = CacheSession(
                0, self._plan, os.environ, lambda folder: agent.send(f"caches {folder}"), node_ranks
            )
            self._session.begin()

    def finish(self, supervisor: WorldSupervisor) -> None:
        """Wait until the ranks are seeded, and decide. Collective.

        Args:
            supervisor: receives what the other ranks write back.
        """
        if self._session is None or self._plan is None:
            return
        from dynamo_mpi.stage.cache_call import Problem

        self._next = supervisor.next_caches
        seeding = self._session.finish(self._world)
        if seeding is None:
            return
        if seeding.problems:
            self._warn(Problem.joined(seeding.problems))
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
        if self._session is not None:
            threading.Thread(target=self._after_start, name="caches", daemon=True).start()

    def end(self) -> None:
        """End what still runs. Idempotent."""
        if self._session is not None:
            self._session.end()

    def remove(self) -> None:
        """Remove rank 0's folder, which may take seconds. Idempotent. Where the world fails, the node agent does it."""
        if self._session is not None:
            self._session.remove()

    def _after_start(self) -> None:
        session, plan = self._session, self._plan
        if session is None or plan is None:
            return
        if plan.source:
            self._forget(plan.source, plan.worker)
        if session.writes:
            self._write_back(session, plan)

    def _forget(self, source: str, worker: str) -> None:
        """Let the next start of this worker be seeded from an archive, even if it is a restart."""
        self._ask({"do": "forget", "source": source, "worker": worker}, _LOOK_SECONDS)

    def _write_back(self, session: CacheSession, plan: CachePlan) -> None:
        from dynamo_mpi.stage.cache_call import Problem
        from dynamo_mpi.stage.cache_session import collect, problems_in, unlike_json

        began = time.monotonic()
        # the others answer in any case
        results = collect(self._world.size, session.save(), self._next)
        new = sum(int(result.get("new", 0)) for result in results)
        problems = list(problems_in(results))
        if new and not problems and (unlike := unlike_json(results)):
            problems = [unlike]
        if new and not problems:
            request = {
                "do": "publish",
                "target": plan.target,
                "key": self._key,
                "parts": [result["part"] for result in results],
            }
            answer = self._ask(request, _PUBLISH_SECONDS)
            problems += filter(None, [Problem.in_answer(answer)])
        if problems or not new:
            written = [result["part"][0] for result in results if result.get("written")]
            self._ask({"do": "discard", "target": plan.target, "digests": written}, _PUBLISH_SECONDS)
        if session.is_over:
            return  # the worker ends
        if problems:
            self._warn(Problem.joined(problems), "not written back, the next start compiles again")
            return
        if not new:
            self._log.info("caches: nothing new was compiled")
            return
        if self._is_skipped:
            self._forget(plan.target, plan.worker)
        seconds = round(time.monotonic() - began, 3)
        size = sum(int(result["part"][1]) for result in results)
        self._figures |= {"new_files": new, "written_bytes": size, "written_seconds": seconds}
        self._log.info(
            f"caches: {new} new files; written back to {plan.target} ({size / 2**20:.1f} MiB, {seconds:.1f} s)"
        )
        self._hooks.on_caches(dict(self._figures))

    def _log_seeding(self, seeding: Seeding) -> None:
        from dynamo_mpi.stage.session import MEMORY_COST

        plan = self._plan
        if plan is None:
            return
        if seeding.in_memory:
            whose = counted(seeding.in_memory, "rank")
            self._log.info(f"caches: those of {whose} are {MEMORY_COST}; name a disk with --stage or TMPDIR")
        if seeding.seeded:
            size = f"{counted(seeding.files, 'file')} a rank, {seeding.size / 2**20:.1f} MiB in all"
            self._log.info(f"caches: seeded from {plan.source}: {size}, {seeding.seconds:.1f} s", {"phase": "stage"})
        elif not plan.parts and not self._is_skipped:
            self._log.info(
                f"caches: none yet for this engine, GPU, model and layout in {self._settings.cache}: kernels are compiled"
            )

    def _ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        from dynamo_mpi.stage.cache_call import HelperCall

        return HelperCall(request, os.environ).result(seconds)

    def _warn(self, problem: Problem, what: str = _NOT_SEEDED) -> None:
        self._log.warning(
            f"compile caches are {what}: {problem.problem}\n  expected: {problem.expected}\n  fix:      {problem.fix}"
        )
