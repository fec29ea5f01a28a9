# SPDX-License-Identifier: Apache-2.0
"""The hardware checks in common: which run over which ranks, each rank's input, rank 0's input for the evaluation, the result.

A check is a module with two functions, a line in `checks.run_hardware_checks`, its name in `config.options.PROBES`, and its place in `auto`
(`chosen_checks`):

    measure(part: CheckContext) -> list[str]
        on every rank, in its main thread; may use `part.world`, on all ranks alike
    judge(answers: Sequence[Sequence[str]], case: EvaluationInput) -> CheckResult
        on rank 0, over the results of `measure` in rank order; pure
"""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.layout import Layout
    from dynamo_mpi.mpi.placement import HasHost
    from dynamo_mpi.mpi.world import World

Groups = tuple[tuple[int, ...], ...]

WAIT_SHARE = START_SHARE = 0.5
"""Additional time, as a share of the checks' time: to wait until memory is freed, and to start NCCL's processes."""
NODE = "node"
"""The kind of group that consists of a node's ranks."""
_LAYOUT_KINDS = ("tp", "moe_ep", "pp")


class HardwareCheckPlan(NamedTuple):
    """The checks that every rank runs.

    Args:
        names: the checks, in their order.
        seconds: time limit of what ranks do together; see `WAIT_SHARE`.
        over: the transport of the fabric check: ``nccl``, or ``mpi`` if the ranks have no GPUs.
        groups: ranks that communicate, by kind: `NODE`, ``tp``, ``moe_ep`` and ``pp``, as in `Layout.groups`.
    """

    names: tuple[str, ...]
    seconds: float
    over: str = "mpi"
    groups: tuple[tuple[str, Groups], ...] = ()

    def of_kind(self, kind: str) -> Groups:
        """Return the groups of a kind; empty if the plan has no such kind."""
        return dict(self.groups).get(kind, ())

    def pack(self) -> str:
        """Write it as one text: ``gpu,fabric|30|nccl|node=0,1;2,3``."""
        kinds = (f"{kind}={';'.join(','.join(map(str, group)) for group in groups)}" for kind, groups in self.groups)
        return "|".join((",".join(self.names), repr(self.seconds), self.over, *kinds))

    @classmethod
    def unpack(cls, text: str) -> HardwareCheckPlan:
        """Read what `pack` wrote."""
        names, seconds, over, *kinds = text.split("|")
        groups = []
        for kind in kinds:
            name, _, members = kind.partition("=")
            groups.append((name, tuple(tuple(map(int, group.split(","))) for group in members.split(";"))))
        return cls(tuple(names.split(",")), float(seconds), over, tuple(groups))


def plan_hardware_checks(
    settings: Settings, layout: Layout, nodes: Mapping[str, Sequence[int]]
) -> HardwareCheckPlan | None:
    """Decide which checks run.

    Args:
        settings: the worker's.
        layout: how its ranks are divided.
        nodes: each node's ranks.

    Returns:
        The plan; None if no check runs.
    """
    size = sum(map(len, nodes.values()))
    names = chosen_checks(settings, size)
    if not names:
        return None
    over = "nccl" if has_gpus(settings) else "mpi"
    by_kind = [(NODE, _tuples(nodes.values()))]
    if layout.world_size == size:
        by_kind += [(kind, groups) for kind in _LAYOUT_KINDS if len((groups := _tuples(layout.groups(kind)))[0]) > 1]
    return HardwareCheckPlan(names, settings.probe_seconds, over, tuple(by_kind))


def chosen_checks(settings: Settings, size: int) -> tuple[str, ...]:
    """Return the checks that run. ``auto`` selects those that are cheap on this hardware: none if the engine uses no GPU.

    Args:
        settings: the worker's.
        size: ranks of the world.
    """
    if settings.probe == "none":
        return ()
    names = settings.probe.split(",")
    if settings.probe == "auto":
        names = ["gpu", "fabric"] if has_gpus(settings) else []
    return tuple(name for name in names if not _idle(settings, size).get(name))


def skipped_checks(settings: Settings, size: int) -> list[str]:
    """Return a line for each requested check that has nothing to check, or that no longer exists. Pure; arguments as for `chosen_checks`."""
    idle = _idle(settings, size)
    return [f"probe {name}: {idle[name]}" for name in settings.probe.split(",") if idle.get(name)]


def obsolete(settings: Settings) -> list[str]:
    """Return a warning for each setting that is accepted but no longer has an effect. Pure."""
    if settings.probe_kv_seconds is None:
        return []
    return ["--probe-kv-seconds has no effect any more: the KV check is a step of `dynamo-mpi launch`"]


def _idle(settings: Settings, size: int) -> dict[str, str]:
    """Return the reason why a check is skipped, by name; empty if it runs."""
    return {
        "fabric": "nothing to check in a world of one rank" if size == 1 else "",
        # accepted until 0.2
        "kv": "moved to `dynamo-mpi launch` (--kv-check) and python -m dynamo_mpi.checks.kv; a worker leaves it out",
    }


def has_gpus(settings: Settings) -> bool:
    """Return whether the ranks use GPUs that the preflight has checked."""
    return settings.engine == "trtllm" and not settings.allow_no_gpu


def memory_is_awaited(settings: Settings) -> bool:
    """Return whether the GPU check will wait until memory is freed, and then evaluate rule V2. Usable before MPI is initialised."""
    return has_gpus(settings) and not settings.preflight_only and "gpu" in chosen_checks(settings, 1)


def _tuples(groups: Iterable[Sequence[int]]) -> Groups:
    return tuple(tuple(group) for group in groups)


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
