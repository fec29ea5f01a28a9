# SPDX-License-Identifier: Apache-2.0
"""The planner: every legal layout of a model on some GPUs, best first, with the reasons."""

from __future__ import annotations

from math import log2
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.frozen import dataclass, replace
from dynamo_mpi.layout.divisibility import MOST_CONTEXT_RANKS, divisors, kv_copies
from dynamo_mpi.layout.engine_config import EngineConfig
from dynamo_mpi.layout.engine_yaml import LAYOUT_KEYS, engine_yaml, srun_line
from dynamo_mpi.layout.finding import errors
from dynamo_mpi.layout.layout import HELIX, Layout, LayoutSpec, cluster_for, short_name
from dynamo_mpi.layout.memory import MemoryEstimate, estimate
from dynamo_mpi.layout.rules.pipeline import is_documented_helix
from dynamo_mpi.layout.rules.registry import layout_findings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.layout.finding import Finding

_MOST_TRIED = 128
_BAD = ("A14", "D6")  # warnings that count against a layout


@dataclass(frozen=True)
class Plan:
    """One legal layout.

    Args:
        subject: the worker.
        findings: the rules' warnings.
        memory: its memory estimate; None if the config lacks sizes.
        fits: whether it fits on the GPU; None if the kind of GPU isn't known, or the model lacks sizes.
        kv_copies: number of ranks that hold the same KV.
        reasons: the reasons for its place in the order.
    """

    subject: LayoutSpec
    findings: tuple[Finding, ...]
    memory: MemoryEstimate | None
    fits: bool | None
    kv_copies: int
    reasons: tuple[str, ...]

    @property
    def layout(self) -> Layout:
        """How the world is divided."""
        return self.subject.layout

    def as_json(self, model: str, path: str) -> dict[str, Any]:
        """Return it as plain data, with its YAML and its srun command.

        Args:
            model: the model's name.
            path: the model, as ``--model`` takes it.
        """
        return {
            "name": short_name(self.subject),
            "layout": self.subject.layout_as_json(),
            "fits": self.fits,
            "kv_copies": self.kv_copies,
            "reasons": list(self.reasons),
            "findings": [finding.as_json() for finding in self.findings],
            "memory": self.memory.as_json() if self.memory is not None else {},
            "yaml": engine_yaml(self.subject, model),
            "srun": srun_line(self.subject, path),
        }

    @property
    def order(self) -> tuple[float, ...]:
        """Smaller is better: fits, documented (HELIX), TP inside a node, warnings, copies of the KV cache, pipeline stages, memory left."""
        tokens = self.memory.world_tokens if self.memory is not None else None
        return (
            {True: 0, None: 1, False: 2}[self.fits],
            int(self.layout.is_helix and not is_documented_helix(self.subject)),
            _crosses(self.subject),
            sum(finding.rule in _BAD for finding in self.findings),
            self.kv_copies,
            self.layout.pp_size,
            -(tokens or 0),
            self.layout.moe_tp_size,
            self.layout.cp_size,
        )


def plan(subject: LayoutSpec) -> list[Plan]:
    """Find all legal layouts of a worker on its GPUs, best first; HELIX for decode workers only, and not with attention DP.

    Args:
        subject: model, GPUs, role and version; its config is kept, except for the sizes.
    """
    found = [made for candidate in _candidates(subject) if (made := _judge(candidate)) is not None]
    return sorted(found, key=lambda made: made.order)


def nearest(subject: LayoutSpec, count: int = 3) -> list[Plan]:
    """Find the legal layouts on the same GPUs that differ least from an illegal one, nearest first; those that don't fit come last.

    Layouts that differ only in their experts count as one, unless the config mentions experts.
    """
    wanted, config = subject.layout, subject.config
    experts_said = (config.moe_ep_size, config.moe_tp_size) != (None, None)

    def distance(made: Plan) -> tuple[float, ...]:
        layout = made.layout
        pairs = [(layout.tp_size, wanted.tp_size), (layout.pp_size, wanted.pp_size), (layout.cp_size, wanted.cp_size)]
        pairs += [(layout.moe_ep_size, wanted.moe_ep_size)] if experts_said else []
        apart = sum(abs(log2(a / b)) for a, b in pairs)
        dp_apart = 0.5 * (layout.enable_attention_dp != wanted.enable_attention_dp)
        return (made.fits is False, apart + dp_apart, *made.order)

    found: dict[tuple[object, ...], Plan] = {}
    for made in sorted(plan(subject), key=distance):
        layout = made.layout
        kind = (layout.tp_size, layout.pp_size, layout.cp_size, layout.enable_attention_dp)
        found.setdefault((*kind, layout.moe_ep_size) if experts_said else kind, made)
    return list(found.values())[:count]


def workable_sizes(subject: LayoutSpec, count: int = 3) -> list[int]:
    """Return the largest numbers of GPUs, below the subject's, that a legal layout can use completely, ascending."""
    found: list[int] = []
    per_node = subject.cluster.gpus_per_node
    for world_size in range(min(subject.cluster.world_size - 1, _MOST_TRIED), 0, -1):
        cluster = cluster_for(world_size, per_node, subject.cluster.gpu)
        if cluster is None:
            continue
        smaller = replace(subject, cluster=cluster)
        if any(not errors(layout_findings(candidate)) for candidate in _candidates(smaller)):
            found.append(world_size)
        if len(found) == count:
            break
    return sorted(found)


def _candidates(subject: LayoutSpec) -> Iterator[LayoutSpec]:
    world = subject.cluster.world_size
    if subject.other_backend:
        yield _autodeployed(subject)
        return
    experts, suits = subject.shape.experts, subject.shape.suits_attention_dp
    helix = subject.role == "decode" and subject.shape.state_space is None
    for cp_size in divisors(world):
        if cp_size > (MOST_CONTEXT_RANKS if helix else 1):
            break
        for pp_size in divisors(world // cp_size):
            if pp_size > (subject.shape.num_layers or 1):
                break
            tp_size = world // cp_size // pp_size
            for attention_dp in (False, True) if tp_size > 1 and cp_size == 1 and suits else (False,):
                for ep_size in divisors(tp_size * cp_size) if experts is not None else (None,):
                    yield replace(
                        subject,
                        config=_resize(
                            subject.config,
                            subject.cluster.gpus_per_node,
                            tp_size,
                            pp_size,
                            cp_size,
                            attention_dp,
                            ep_size,
                        ),
                    )


def _autodeployed(subject: LayoutSpec) -> LayoutSpec:
    """A16: AutoDeploy has one layout for a number of ranks."""
    config, world = subject.config, subject.cluster.world_size
    keys = {key: value for key, value in config.keys.items() if key not in LAYOUT_KEYS}
    per_node = subject.cluster.gpus_per_node
    keys |= {"world_size": world, "gpus_per_node": per_node}
    return replace(subject, config=replace(config, tp_size=world, gpus_per_node=per_node, keys=keys))


def _resize(
    config: EngineConfig,
    gpus_per_node: int,
    tp_size: int,
    pp_size: int,
    cp_size: int,
    attention_dp: bool,
    ep_size: int | None,
) -> EngineConfig:
    return replace(
        config,
        tp_size=tp_size,
        pp_size=pp_size,
        cp_size=cp_size,
        cp_type=HELIX if cp_size > 1 else None,
        cp_tokens_per_block=None,
        enable_attention_dp=attention_dp,
        enable_lm_head_tp_in_adp=False,
        moe_tp_size=None,
        moe_ep_size=ep_size,
        moe_cluster_size=None,
        pp_partition=None,
        gpus_per_node=gpus_per_node,
    )


def _judge(candidate: LayoutSpec) -> Plan | None:
    findings = layout_findings(candidate)
    if errors(findings):
        return None
    if candidate.other_backend:
        return Plan(candidate, tuple(findings), None, None, 1, ("AutoDeploy divides the model by itself: not judged",))
    memory = estimate(candidate)
    fits = memory.fits if memory is not None else None
    copies = _kv_copies(candidate)
    return Plan(candidate, tuple(findings), memory, fits, copies, tuple(_reasons(candidate, fits, copies)))


def _kv_copies(subject: LayoutSpec) -> int:
    """B4: number of ranks that hold the same keys and values. A latent (MLA) is on every tp rank."""
    tp_size = subject.layout.attention_tp_size
    if subject.shape.latent is not None:
        return tp_size
    return max((kv_copies(count, tp_size) for count in subject.shape.kv_head_counts), default=1)


def _crosses(subject: LayoutSpec) -> int:
    """Return whether attention's or a dense MLP's all-reduce leaves the node. With attention DP and whole experts only their all-to-all
    does."""
    layout = subject.layout
    wide = layout.enable_attention_dp and layout.moe_tp_size == 1 and subject.shape.experts is not None
    return int(layout.leaves_nvlink(subject.cluster) and not wide)


def _reasons(subject: LayoutSpec, fits: bool | None, copies: int) -> Iterator[str]:
    layout, cluster = subject.layout, subject.cluster
    if fits is False:
        yield "does not fit"
    if layout.is_helix and not is_documented_helix(subject):
        yield "HELIX isn't documented for it"
    if _crosses(subject):
        yield "tensor parallelism over nodes"
    elif cluster.nodes > 1:
        group = layout.tp_size * layout.cp_size
        inside = "inside a node" if group <= cluster.gpus_per_node else "over NVLink"
        yield "only experts over nodes" if layout.leaves_nvlink(cluster) else f"tensor parallelism {inside}"
    yield f"{copies} copies of the KV cache" if copies > 1 else "no copies of the KV cache"
    if layout.pp_size > 1:
        yield f"{layout.pp_size} pipeline stages"
