# SPDX-License-Identifier: Apache-2.0
"""Spare nodes: made ready in the background while the deployment runs, so that a worker's start there takes no longer than in place.

Each spare gets steps of its own, one after the other: the check of its hardware, its software and the model's files, which in a container
also unpacks the image there; then the copy of the model. A spare that fails the check is left out, as is one that differs from all workers;
one that differs from some serves the others. The copy is tried twice; without one the spare is used all the same.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from dynamo_mpi.checks.node_probe import read_result
from dynamo_mpi.deploy.spare_checks import Judgement, SpareComparer
from dynamo_mpi.deploy.step_commands import COPY_STEP
from dynamo_mpi.deploy.steps import Step, StepController, start

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_mpi.checks.node_probe import ProbeResult
    from dynamo_mpi.deploy.run_dir import RunDir
    from dynamo_mpi.deploy.step_commands import Command

_MOST_SHOWN = 3
PREPARING, READY, USED, FAILED = "preparing", "ready", "used", "failed"


@dataclass(frozen=True)
class Spare:
    """A spare node.

    Args:
        node: its name.
        state: ``preparing``, ``ready``, ``used`` by a worker, or ``failed``.
        reason: the worker that uses it, why it failed, or what isn't as it should be: it has no copy of the model, say.
    """

    node: str
    state: str = PREPARING
    reason: str = ""


class SpareBuilder(Protocol):
    """Builds the commands that make a spare ready."""

    def prepare(self, node: str) -> Sequence[Command]: ...


class SparePool:
    """The spare nodes of one deployment. Use it from the main thread.

    Args:
        nodes: their names, in the order in which they are used.
        builder: builds their commands.
        step_controller: ends a step that a worker's start overtakes.
        run_dir: the deployment's folder.
        failed: called with a spare's name and the reason when it fails.
        workers: number of workers of the deployment.
    """

    def __init__(
        self,
        nodes: Sequence[str],
        builder: SpareBuilder,
        step_controller: StepController,
        run_dir: RunDir,
        failed: Callable[[str, str], None],
        workers: int = 0,
    ) -> None:
        self._spares = {node: Spare(node) for node in nodes}
        self._builder, self._step_controller, self._run_dir, self._failed = builder, step_controller, run_dir, failed
        self._environment: Mapping[str, str] = {}
        self._left: dict[str, list[Command]] = {}
        self._running: dict[str, Step] = {}
        self._checked: set[str] = set()
        self._notes: dict[str, str] = {}
        self._comparer, self._workers = SpareComparer(run_dir.path), workers
        self._judged: dict[str, Judgement] = {}
        self.domains: dict[str, str] = {}
        """By node, the NVLink domain that its GPUs share with other nodes' ones; empty for none."""

    def start(self, environment: Mapping[str, str]) -> None:
        """Begin to make them ready."""
        self._environment = environment
        for node in self._spares:
            self._comparer.forget(node)
        self._left = {node: list(self._builder.prepare(node)) for node in self._spares}
        self.poll()

    def poll(self) -> None:
        """Look at the steps, and start the next ones."""
        for spare in list(self._spares.values()):
            if spare.state == PREPARING:
                self._poll(spare.node)
        for node, found in self._comparer.look(self._checked.intersection(self.available)).items():
            if (found.problems or found.doubts) and found.is_old:
                self._check_again(node)
                continue
            self._judged[node] = found
            if self._workers and len(found.problems) == self._workers:
                self.fail(node, next(iter(found.problems.values())))
            unfit = [f"not for {worker}: {why}" for worker, why in found.problems.items()]
            doubtful = [f"the last choice for {worker}: {why}" for worker, why in found.doubts.items()]
            self._notes[node] = "; ".join([*unfit, *doubtful, *found.notes][:_MOST_SHOWN])

    def _check_again(self, node: str) -> None:
        """Check a spare once more: a worker has started since, maybe with files that have been changed for all."""
        self._comparer.forget(node)
        self._checked.discard(node)
        self._left[node] = [*self._builder.prepare(node)[:1], *self._left.get(node, [])]
        self._set(node, PREPARING, self._spares[node].reason)

    def _poll(self, node: str) -> None:
        step = self._running.get(node)
        if step is not None:
            if (code := step.child.exit_code()) is None:
                return
            del self._running[node]
            step.child.kill()
            result = read_result(step.child.output())
            if reason := _failure(step, code, result):
                if not step.name.startswith(COPY_STEP):
                    self.fail(node, reason)
                    return
                if not self._spares[node].reason:
                    self._left[node].insert(0, step.command)
                self._set(node, PREPARING, f"no copy of the model there: {reason}")
            elif step.name.startswith(COPY_STEP):
                self._set(node, PREPARING)
            if result is not None:
                self.domains[node] = result.domain
                self._checked.add(node)
        if self._left.get(node):
            command = self._left[node].pop(0)
            self._running[node] = start(command, self._environment, self._run_dir.log(command.name))
        else:
            self._set(node, READY, self._spares[node].reason)

    @property
    def spares(self) -> tuple[Spare, ...]:
        """All of them, also those that are used or have failed."""
        notes = {node: self._notes.get(node, "") for node in self.available}
        return tuple(
            replace(spare, reason="; ".join(filter(None, (spare.reason, notes.get(node)))))
            for node, spare in self._spares.items()
        )

    def why_unfit(self, node: str, worker: str) -> str:
        """Return why a spare doesn't suit a worker, be it a problem or a doubt; empty if it does as far as that is known."""
        return self.problem(node, worker) or self.doubt(node, worker)

    def problem(self, node: str, worker: str) -> str:
        """Return why a worker can't start on a spare; empty if nothing is known that would keep it."""
        return self._judged[node].problems.get(worker, "") if node in self._judged else ""

    def doubt(self, node: str, worker: str) -> str:
        """Return which files there differ from those with which the worker has started; empty for none."""
        return self._judged[node].doubts.get(worker, "") if node in self._judged else ""

    def domain_of(self, worker: str) -> str:
        """Return the NVLink domain of a worker, as its last start that served has reported it; empty for none."""
        return self._comparer.domain_of(worker)

    @property
    def available(self) -> tuple[str, ...]:
        """Names of those that a worker can get: the ready ones first; a worker's own start makes ready what isn't yet."""
        found = [spare for spare in self._spares.values() if spare.state in (READY, PREPARING)]
        return tuple(spare.node for spare in sorted(found, key=lambda spare: spare.state != READY))

    @property
    def ready(self) -> tuple[str, ...]:
        """Names of those that are ready."""
        return tuple(node for node in self.available if self._spares[node].state == READY)

    @property
    def steps(self) -> list[Step]:
        """The running steps."""
        return list(self._running.values())

    def take(self, node: str, worker: str) -> None:
        """Give a spare to a worker."""
        self._end(node)
        self._set(node, USED, worker)

    def fail(self, node: str, reason: str) -> None:
        """Leave a spare out."""
        self._end(node)
        self._set(node, FAILED, reason)
        self._failed(node, reason)

    def close(self) -> None:
        """End what still runs."""
        self._end(*self._running)

    def describe(self) -> list[dict[str, Any]]:
        """Return their states as plain data."""
        return [asdict(spare) for spare in self.spares]

    def _set(self, node: str, state: str, reason: str = "") -> None:
        self._spares[node] = replace(self._spares[node], state=state, reason=reason)

    def _end(self, *nodes: str) -> None:
        for node in nodes:
            self._left.pop(node, None)
        if steps := [self._running.pop(node) for node in nodes if node in self._running]:
            with contextlib.suppress(OSError):
                self._step_controller.cancel(steps)
            for step in steps:
                step.child.kill()


def _failure(step: Step, code: int, result: ProbeResult | None) -> str:
    """Return why a spare can't be used, by a step's end; empty if it can."""
    if result is not None and result.problems:
        return result.problems[0]
    if not code:
        return ""
    lines = [line.strip() for line in step.child.output().splitlines() if line.strip()]
    texts = [line for line in lines if any(map(str.isalnum, line))]
    # mpirun frames its explanation by rules, after the cause; other programs end with the cause
    shown = texts[0 if len(texts) < len(lines) else -1][:200] if texts else ""
    return f"{step.name} ended with exit code {code}" + (f": {shown}" if shown else "")
