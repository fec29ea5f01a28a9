# SPDX-License-Identifier: Apache-2.0
"""Finds out, after a worker's failure, whether its nodes can run it again; without waiting, so that the others are watched meanwhile."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Protocol

from dynamo_mpi.checks.node_probe import HERE, read_result
from dynamo_mpi.deploy.first_death import first_death
from dynamo_mpi.deploy.node_health import nearest, topology_of
from dynamo_mpi.deploy.nodes import is_this_host
from dynamo_mpi.deploy.recovery import NodeHealth
from dynamo_mpi.deploy.steps import Step, StepController, start

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from dynamo_mpi.deploy.node_watch import NodeWatch
    from dynamo_mpi.deploy.run_dir import RunDir
    from dynamo_mpi.deploy.step_commands import Command

# a launcher's start on a busy node; a node that is lost takes no step at all
ANSWER_SECONDS = 10.0
# of a node whose host answers, but which takes no step: the controller may be busy
STEP_SECONDS = 30.0
# srun about a node that is down or has left the job
_UNAVAILABLE = "node configuration is not available"
_UNREACHABLE = "its host doesn't answer its worker's other ranks, nor a connection from here"
# the probe waits up to 30 s for the GPUs' memory
RESULT_SECONDS = 60.0


class ProbeBuilder(Protocol):
    """Builds the command that probes a node."""

    def probe(self, node: str) -> Command | None:
        """Return the command; None if the node needs none."""


class NodeProber:
    """Begins inquiries.

    Args:
        builder: builds the probes' commands.
        step_controller: ends a probe that hangs.
        run_dir: the deployment's folder.
        watch: what is known of the nodes anyway; None if they aren't watched.
    """

    def __init__(
        self, builder: ProbeBuilder, step_controller: StepController, run_dir: RunDir, watch: NodeWatch | None = None
    ) -> None:
        self._builder, self._step_controller, self._run_dir, self.watch = builder, step_controller, run_dir, watch
        self._topologies: dict[str, list[frozenset[str]]] = {}

    @property
    def lost(self) -> Mapping[str, str]:
        """Nodes that are known to be lost, and why."""
        return self.watch.lost if self.watch is not None else {}

    @property
    def drained(self) -> Mapping[str, str]:
        """Nodes that an administrator drains."""
        return self.watch.drained if self.watch is not None else {}

    def begin(
        self,
        nodes: Sequence[str],
        environment: Mapping[str, str],
        suspects: Collection[str] = (),
        *,
        reporter: str = "",
        has_probes: bool = True,
    ) -> Inquiry:
        """Begin to probe nodes. Call it from the main thread.

        Args:
            nodes: their names.
            environment: the probes' environment.
            suspects: nodes that the worker's ranks have reported as lost: a connection that fails, too, is proof enough.
            reporter: the node whose side has reported it, and which may be cut off itself.
            has_probes: whether nodes are probed; else only what is known of them is taken together.
        """
        self.hurry()
        steps = {}
        for node in nodes:
            is_probed = has_probes and not self.is_known_lost(node, (*suspects, reporter))
            command = self._builder.probe(node) if is_probed else None
            if command is not None:
                steps[node] = start(command, environment, self._run_dir.log(command.name))
        return Inquiry(self, tuple(nodes), steps, tuple(suspects), reporter)

    def hurry(self) -> None:
        """Look at the nodes at once, and often for a while."""
        if self.watch is not None:
            self.watch.hurry()

    @property
    def is_hurried(self) -> bool:
        """Whether something has failed, or may have, some seconds ago."""
        return self.watch is not None and self.watch.is_hurried

    def is_gone(self, node: str, suspects: Collection[str]) -> bool:
        """Return whether a node is lost that its peers have reported: a step on it would need many seconds to fail."""
        return node in suspects and self.watch is not None and self.watch.is_unreachable(node)

    def is_known_lost(self, node: str, suspects: Collection[str]) -> bool:
        """Return whether a node is lost, also one that only its peers have reported and that doesn't answer."""
        return node in self.lost or self.is_gone(node, suspects)

    def order(self, spares: tuple[str, ...], node: str) -> tuple[str, ...]:
        """Return spares in the order of their distance from a node, by Slurm's switches and blocks."""
        if self.watch is None or len(spares) < 2 or not node:
            return spares
        if not self._topologies.get(node):  # not known, or Slurm didn't answer
            self._topologies[node] = topology_of(node)
        return tuple(nearest(spares, self._topologies[node]))

    def is_silent(self, node: str) -> bool:
        """Return whether a node's host is known not to answer; never where nodes aren't watched."""
        return self.watch is not None and self.watch.is_silent(node)

    def is_doubtful(self, node: str) -> bool:
        """Return whether anything is known against a node."""
        return node in self.lost or node in self.drained or self.is_silent(node)

    @property
    def is_waiting(self) -> bool:
        """Whether slurmctld doesn't answer, as far as that is known: no step can start anywhere."""
        return self.watch is not None and not self.watch.controller_answers

    def end(self, steps: Sequence[Step]) -> None:
        """End probes."""
        if running := [step for step in steps if step.child.exit_code() is None]:
            with contextlib.suppress(OSError):
                self._step_controller.cancel(running)
        for step in steps:
            step.child.kill()


class Inquiry:
    """The probes of some nodes.

    Args:
        prober: knows what is known of the nodes anyway.
        nodes: their names.
        steps: by node, the probe's step; nodes without one are known to be lost, or need none.
        suspects: nodes that the worker's ranks have reported as lost.
        reporter: the node whose side has reported it; empty for none.
    """

    def __init__(
        self,
        prober: NodeProber,
        nodes: tuple[str, ...],
        steps: dict[str, Step],
        suspects: tuple[str, ...] = (),
        reporter: str = "",
    ) -> None:
        self._prober, self.nodes, self._steps, self._suspects = prober, nodes, steps, suspects
        # a connection that fails is proof enough for these
        self._doubted = (*suspects, reporter)
        self._began = time.monotonic()
        self._problems: dict[str, str] = {}
        # nodes on which the probe has begun, and problems of those where it never has
        self._reached: set[str] = set()
        self._not_begun: dict[str, str] = {}
        self._probed = frozenset(steps)
        self._domains: dict[str, str] = {}

    def poll(self) -> tuple[NodeHealth, ...] | None:
        """Return the nodes' health; None while it isn't known."""
        gone = {node: _UNREACHABLE for node in self.nodes if self._prober.is_gone(node, self._doubted)}
        lost = {**gone, **self._prober.lost}
        if self._prober.is_waiting:
            self._began = time.monotonic()
        ended = []
        for node, step in list(self._steps.items()):
            problem = lost.get(node) or self._result(node, step)
            if problem is not None:
                ended.append(self._steps.pop(node))
                self._problems[node] = problem
        self._prober.end(ended)
        if self._steps:
            return None
        self._problems |= {node: why for node, why in self._not_begun.items() if self._is_proven(node)}
        drained = self._prober.drained
        return tuple(
            NodeHealth(node, self._problems.get(node) or lost.get(node, ""), drained.get(node, ""), node in lost)
            for node in self.nodes
        )

    def drop(self, node: str) -> None:
        """Ask a node no longer: a worker uses it by now, whose memory the probe would find."""
        self.nodes = tuple(each for each in self.nodes if each != node)
        if (step := self._steps.pop(node, None)) is not None:
            self._prober.end([step])

    def domain_of(self, nodes: Collection[str]) -> str:
        """Return the NVLink domain of some of the nodes; empty if they have none, or it isn't known."""
        return next(filter(None, (self._domains.get(node) for node in nodes)), "")

    def close(self) -> None:
        """End the probes."""
        self._prober.end(list(self._steps.values()))
        self._steps.clear()

    def _is_proven(self, node: str) -> bool:
        """Return whether it is the node's fault that its probe didn't begin, not that of this host, or of slurmctld."""
        if node in self._suspects or any(not is_this_host(other) for other in self._reached):
            return True
        return self._prober.watch is not None and len(self._probed) == 1

    def _result(self, node: str, step: Step) -> str | None:
        """Return a node's problem, or an empty text; None while it isn't known."""
        seconds = time.monotonic() - self._began
        code, output = step.child.exit_code(), step.child.output()
        has_begun = HERE in output
        if has_begun:
            self._reached.add(node)
        result = read_result(output)
        if result is not None:
            self._domains[node] = result.domain
            return "; ".join(result.problems)
        if code is not None:
            death = first_death(output)
            if not has_begun and death is not None and death.host == node:
                return f"a probe there {death.how}"
            words = [line.strip() for line in output.splitlines() if line.strip() and HERE not in line]
            problem = f"a probe ended there with exit code {code}" + (f": {words[-1][:200]}" if words else "")
            if has_begun or _UNAVAILABLE in output:
                return problem
            if self._prober.watch is None or self._prober.is_silent(node):
                self._not_begun[node] = problem
            return ""  # the launcher could not start it; where the host answers, that is no fault of the node's
        if has_begun:
            return f"a probe doesn't end there in {seconds:.0f} s" if seconds > RESULT_SECONDS else None
        is_suspect = self._prober.watch is None and node in self._suspects
        if seconds <= (ANSWER_SECONDS if is_suspect or self._prober.is_silent(node) else STEP_SECONDS):
            return None
        self._not_begun[node] = f"it takes no step in {seconds:.0f} s"
        return ""
