# SPDX-License-Identifier: Apache-2.0
"""The input of the rules: one worker, as it would be started."""

from __future__ import annotations

from dynamo_mpi.common.frozen import dataclass, field
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.engine_config import PYTORCH
from dynamo_mpi.layout.layout import Cluster, Layout, layout_of

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


if TYPE_CHECKING:
    Rule = Callable[[LayoutSpec], Iterable[Finding]]
