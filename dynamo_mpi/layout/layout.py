# SPDX-License-Identifier: Apache-2.0
"""The rules' input: one worker as it would be started (`LayoutSpec`), and its layout: the coordinates of each rank,
with the engine's defaults (A2-A4, A11-A13, F1, F10)."""

from __future__ import annotations

from dynamo_mpi.common.frozen import dataclass, field, replace
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.engine_config import PYTORCH, ParallelSizes
from dynamo_mpi.layout.format import counted
from dynamo_mpi.layout.gpus import GPUS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dynamo_mpi.layout.engine_config import EngineConfig
    from dynamo_mpi.layout.trtllm_version import TrtllmVersion

HELIX = "HELIX"
ULYSSES = "ULYSSES"


@dataclass(frozen=True)
class Cluster:
    """The GPUs of one worker.

    Args:
        nodes: nodes of the worker.
        gpus_per_node: GPUs, and ranks, of each.
        gpu: kind of GPU, as in `gpus.GPUS`; None if it isn't known.
    """

    nodes: int
    gpus_per_node: int
    gpu: str | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks: one on each GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def nvlink_gpus(self) -> int:
        """Number of neighbouring GPUs that NVLink joins: a node's, or more if it joins nodes."""
        reach = GPUS[self.gpu].nvlink_gpus if self.gpu in GPUS else 0
        return max(self.gpus_per_node, reach)

    def __str__(self) -> str:
        gpus = counted(self.gpus_per_node, "GPU")
        return gpus if self.nodes == 1 else f"{self.nodes} nodes x {gpus}"


def cluster_for(world_size: int, gpus_per_node: int, gpu: str | None = None) -> Cluster | None:
    """Return nodes for this number of ranks: whole nodes, or a part of one; None if they would be unequal."""
    if world_size <= gpus_per_node:
        return Cluster(1, world_size, gpu)
    return Cluster(world_size // gpus_per_node, gpus_per_node, gpu) if world_size % gpus_per_node == 0 else None


@dataclass(frozen=True)
class Place:
    """A rank's coordinates in the layout.

    Args:
        rank: in the world.
        node: ``rank // gpus_per_node`` (A11).
        gpu: ``rank % gpus_per_node``, its CUDA device (K9).
        tp_rank: in its tensor-parallel group.
        pp_rank: its pipeline stage.
        cp_rank: in its context-parallel group.
        moe_tp_rank: its slice of an expert.
        moe_ep_rank: its share of the experts.
    """

    rank: int
    node: int
    gpu: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    moe_tp_rank: int
    moe_ep_rank: int


@dataclass(frozen=True)
class Layout(ParallelSizes):
    """How the world is divided. All sizes include the engine's defaults.

    Args:
        tp_size: tensor-parallel size.
        pp_size: pipeline stages.
        cp_size: context-parallel size.
        cp_type: of context parallelism; None without it.
        moe_tp_size: ranks that share an expert.
        moe_ep_size: shares of the experts.
        moe_cluster_size: clusters of the smart router.
        enable_attention_dp: attention is data-parallel over the tp ranks.
        experts_over_cp: HELIX divides experts over its context ranks too; before 1.2 no kind did (A2).
        cp_fastest: neighbouring ranks differ in their context rank first, as in TensorRT-LLM's main; else in their tp rank (A12).
    """

    tp_size: int
    pp_size: int = 1
    cp_size: int = 1
    cp_type: str | None = None
    moe_tp_size: int = 1
    moe_ep_size: int = 1
    moe_cluster_size: int = 1
    enable_attention_dp: bool = False
    experts_over_cp: bool = True
    cp_fastest: bool = True

    @property
    def multiplies_out(self) -> bool:
        """A2: whether the product of the expert sizes is the number of ranks over which experts are divided."""
        return self.moe_tp_size * self.moe_ep_size * self.moe_cluster_size == self.moe_world_size

    @property
    def dp_size(self) -> int:
        """Number of groups with their own requests (C1)."""
        return self.tp_size if self.enable_attention_dp else 1

    @property
    def attention_tp_size(self) -> int:
        """Number of ranks over which a layer's keys and values are divided: 1 with attention DP (C1)."""
        return 1 if self.enable_attention_dp else self.tp_size

    @property
    def head_split(self) -> int:
        """Number of ranks over which query heads are divided (B1)."""
        return self.attention_tp_size * self.cp_size

    @property
    def is_helix(self) -> bool:
        """Whether it has context parallelism for decoding, whose ranks count as tp outside attention (F10)."""
        return self.cp_size > 1 and self.cp_type == HELIX

    @property
    def moe_world_size(self) -> int:
        """A2: number of ranks over which experts are divided: tp for ULYSSES, the default, tp x cp for every other kind."""
        over_cp = self.experts_over_cp and self.cp_type not in (None, ULYSSES)
        return self.tp_size * (self.cp_size if over_cp else 1)

    @property
    def dense_tp_size(self) -> int:
        """F10: number of ranks over which a dense MLP is divided."""
        return self.tp_size * self.cp_size if self.is_helix else self.tp_size

    def place(self, rank: int, gpus_per_node: int) -> Place:
        """Return the coordinates of ``rank`` (A11-A13)."""
        stage, index = divmod(rank, self.tp_size * self.cp_size)
        if self.cp_fastest:
            tp_rank, cp_rank = divmod(index, self.cp_size)
        else:
            cp_rank, tp_rank = divmod(index, self.tp_size)
        # experts are divided over the tp ranks, under HELIX over all of the stage
        expert_index = index if self.moe_world_size > self.tp_size else tp_rank
        return Place(
            rank,
            rank // gpus_per_node,
            rank % gpus_per_node,
            tp_rank,
            stage,
            cp_rank,
            expert_index // (self.moe_ep_size * self.moe_cluster_size),
            expert_index % self.moe_ep_size,
        )

    def groups(self, kind: str) -> list[list[int]]:
        """Partition the ranks into the groups that communicate.

        Args:
            kind: ``tp``, ``pp``, ``cp``, ``moe_tp`` or ``moe_ep``.

        Returns:
            Groups of ascending ranks; every rank is in exactly one.
        """
        places = [self.place(rank, 1) for rank in range(self.world_size)]
        keys: dict[str, Callable[[Place], Sequence[int]]] = {
            "tp": lambda p: (p.pp_rank, p.cp_rank),
            "cp": lambda p: (p.pp_rank, p.tp_rank),
            "pp": lambda p: (p.tp_rank, p.cp_rank),
            "moe_ep": lambda p: (p.pp_rank, p.moe_tp_rank, *self._outside_moe(p)),
            "moe_tp": lambda p: (p.pp_rank, p.moe_ep_rank, *self._outside_moe(p)),
        }
        found: dict[Sequence[int], list[int]] = {}
        for place in places:
            found.setdefault(keys[kind](place), []).append(place.rank)
        return list(found.values())

    def _outside_moe(self, place: Place) -> tuple[int, ...]:
        """Return what else distinguishes groups of experts: their cluster, and the context rank if experts aren't divided over context
        ranks."""
        whole = self.moe_world_size > self.tp_size
        index = place.rank % (self.tp_size * self.cp_size) if whole else place.tp_rank
        cluster = index // self.moe_ep_size % self.moe_cluster_size
        return (cluster,) if whole else (cluster, place.cp_rank)

    def stage_sizes(self, layers: int, partition: Sequence[int] | None = None) -> list[int]:
        """F1: number of layers of each stage; the first ``layers % pp_size`` stages have one more."""
        if partition is not None and len(partition) == self.pp_size and sum(partition) == layers:
            return list(partition)
        quotient, remainder = divmod(layers, self.pp_size)
        return [quotient + (stage < remainder) for stage in range(self.pp_size)]

    def leaves_nvlink(self, cluster: Cluster) -> bool:
        """A14: return whether a tensor-parallel group, with its context ranks, contains GPUs that NVLink doesn't join."""
        group, reach = self.tp_size * self.cp_size, cluster.nvlink_gpus
        return group > reach or (reach % group != 0 and self.world_size > reach)

    def as_json(self) -> dict[str, object]:
        """Return it as plain data, with the names that TensorRT-LLM's mapping has."""
        return {
            "tp_size": self.tp_size,
            "pp_size": self.pp_size,
            "cp_size": self.cp_size,
            "cp_type": self.cp_type,
            "moe_tp_size": self.moe_tp_size,
            "moe_ep_size": self.moe_ep_size,
            "moe_cluster_size": self.moe_cluster_size,
            "enable_attention_dp": self.enable_attention_dp,
            "dp_size": self.dp_size,
            "world_size": self.world_size,
        }

    def __str__(self) -> str:
        parts = [f"tp {self.tp_size}"]
        if self.pp_size > 1:
            parts.append(f"pp {self.pp_size}")
        if self.cp_size > 1:
            parts.append(f"cp {self.cp_size}" + (f" {self.cp_type.lower()}" if self.cp_type else ""))
        if self.moe_ep_size > 1:
            parts.append(f"ep {self.moe_ep_size}")
        text = " x ".join(parts)
        return text + (", attention DP" if self.enable_attention_dp else "")


def layout_of(config: EngineConfig, version: TrtllmVersion | None = None) -> Layout:
    """Return the layout with the engine's defaults (A2, A3).

    Args:
        config: the engine config.
        version: TensorRT-LLM's version; None for the newest known one. It decides the order of ranks (A12).
    """
    bare = Layout(
        tp_size=config.tp_size,
        pp_size=config.pp_size,
        cp_size=config.cp_size,
        cp_type=(config.cp_type or ULYSSES) if config.cp_size > 1 else None,
        moe_cluster_size=config.moe_cluster_size or 1,
        enable_attention_dp=config.enable_attention_dp,
        experts_over_cp=version is None or version.release >= (1, 2),
        cp_fastest=version is None or version.release >= (1, 3),
    )
    ranks, moe_tp, moe_ep = bare.moe_world_size // bare.moe_cluster_size, config.moe_tp_size, config.moe_ep_size
    if moe_tp is None:
        moe_tp = ranks // (moe_ep or 1)
    if moe_ep is None:
        moe_ep = max(1, ranks // max(1, moe_tp))  # A2 reports impossible sizes
    return replace(bare, moe_tp_size=moe_tp, moe_ep_size=moe_ep)


ROLES = ("agg", "prefill", "decode", "encode")
"""Roles of a worker. An encode worker hands embeddings over, no KV: the rules see it as an aggregated one."""

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dynamo_mpi.layout.engine_config import EngineConfig
    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.model_shape import ModelShape
    from dynamo_mpi.layout.trtllm_version import TrtllmVersion


@dataclass(frozen=True)
class LayoutSpec:
    """One worker.

    Args:
        shape: the model.
        config: the engine config.
        cluster: the GPUs it gets.
        role: one of `ROLES`.
        version: TensorRT-LLM's version; None for the newest known one.
        engine: ``trtllm`` or ``reference``.
        launched: whether the ranks are running, so that a file that doesn't exist here is missing; otherwise it may be on another machine.
        min_requests: requests of full length that should fit into the KV cache.
        draft: the draft model of speculative decoding, if it is known.
        layout: how the world is divided; derived from the config.
    """

    shape: ModelShape
    config: EngineConfig
    cluster: Cluster
    role: str = "agg"
    version: TrtllmVersion | None = None
    engine: str = "trtllm"
    min_requests: int = 1
    launched: bool = False
    draft: ModelShape | None = None
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", layout_of(self.config, self.version))

    @property
    def other_backend(self) -> bool:
        """A16: whether the engine's backend isn't PyTorch's, whose rules and estimates then don't apply."""
        return self.engine == "trtllm" and self.config.backend != PYTORCH

    def layout_as_json(self) -> dict[str, object]:
        """Return the layout with its nodes as plain data."""
        return {**self.layout.as_json(), "nodes": self.cluster.nodes, "gpus_per_node": self.cluster.gpus_per_node}

    def older_than(self, *release: int) -> bool:
        """Return whether TensorRT-LLM is known to be older than ``release``; False if the version isn't known."""
        return self.version is not None and self.version.release < release


def short_name(subject: LayoutSpec) -> str:
    """Format a layout in the usual short form: ``TP8/EP8/PP2``, ``TP8 x CP2 helix/EP16 on a decode worker``."""
    layout = subject.layout
    text = f"TP{layout.tp_size}"
    if layout.cp_size > 1:
        text += f" x CP{layout.cp_size} {(layout.cp_type or '').lower()}".rstrip()
    if layout.moe_ep_size > 1:
        text += f"/EP{layout.moe_ep_size}"
    if layout.pp_size > 1:
        text += f"/PP{layout.pp_size}"
    if layout.enable_attention_dp:
        text += " with attention DP"
    return text + (" on a decode worker" if layout.is_helix else "")


if TYPE_CHECKING:
    Rule = Callable[[LayoutSpec], Iterable[Finding]]
