# SPDX-License-Identifier: Apache-2.0
"""Writes the engine's YAML for a layout, one value of it for a user to paste, and the command that starts its ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

from dynamo_mpi.common.display import sanitize, shell_word
from dynamo_mpi.common.frozen import replace
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.layout.engine_config import Transceiver
from dynamo_mpi.layout.kv_cache import tokens_per_block
from dynamo_mpi.layout.layout import short_name

if TYPE_CHECKING:
    import yaml

    from dynamo_mpi.layout.engine_config import EngineConfig
    from dynamo_mpi.layout.layout import LayoutSpec

LONGEST = 2000
"""Characters of a value that is written in full."""
_CUT = "..."
ENGINE_CONFIG = "engine.yaml"
"""The engine config's path in `srun_line`."""


def yaml_line(value: object) -> str:
    """Return a value as YAML on one line, in ASCII; aliases are written out. Read back, it is the same value.

    Args:
        value: as a YAML or JSON reader returns it, without a reference to itself.

    Raises:
        RecursionError: it is nested too deeply.
        ValueError: it has a number that Python doesn't write.
    """
    import yaml

    # in a list, where no scalar takes the block style or an end marker of its own
    line: str = yaml.dump([value], None, _dumper(), default_flow_style=True, width=math.inf, sort_keys=False)
    return line[1:-2]


def short_line(value: object, limit: int) -> str:
    """Return a value as YAML on one line, cut to ``limit`` characters; values that can't be written in full are described."""
    if isinstance(value, str):
        value = value[:LONGEST]
    line = _line_within(value, LONGEST)
    return shortened("<a value too long to be shown>" if line is None else line, limit)


def whole(value: object) -> object:
    """Return the value itself if it can be written in full, else text that stands for it."""
    return value if _line_within(value, LONGEST) is not None else "<the value that is there>"


def shortened(text: str, limit: int) -> str:
    """Cut text that is longer than ``limit``, and show that it was."""
    return text if len(text) <= limit else text[: limit - len(_CUT)] + _CUT


def _line_within(value: object, limit: int) -> str | None:
    """Return a value's line; None if it is longer than ``limit``, even if endless."""
    rest, left = [value], limit
    while rest and left > 0:
        item = rest.pop()
        left -= len(item) if isinstance(item, str | bytes) else 1
        if isinstance(item, Mapping):
            rest += [*item, *item.values()]
        elif isinstance(item, list | tuple | set):
            rest += item
    if left <= 0:
        return None
    try:
        line = yaml_line(value)
    except RecursionError:
        return None
    except ValueError:
        return "<a very large number>"
    return line if len(line) <= limit else None


@cache
def _dumper() -> type[yaml.SafeDumper]:
    # not at the top: ranks import this module's neighbours, but only a finding needs a YAML writer
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

        def represent_scalar(self, tag: str, value: str, style: str | None = None) -> yaml.ScalarNode:
            # the other styles break the line where the text does
            return super().represent_scalar(tag, value, '"' if "\n" in value else None)

    return Dumper


LAYOUT_KEYS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "context_parallel_size",
    "cp_config",
    "moe_tensor_parallel_size",
    "moe_expert_parallel_size",
    "moe_cluster_parallel_size",
    "enable_attention_dp",
    "enable_lm_head_tp_in_adp",
    "pp_partition",
    "gpus_per_node",
)
"""Keys that the layout decides, so that the planner writes them."""


def for_role(config: EngineConfig, role: str) -> EngineConfig:
    """Add the keys that a role requires (I6, I9), unless the user has set a transceiver or the scheduler."""
    missing: dict[str, Any] = {}
    if role == "prefill" and config.keys.get("disable_overlap_scheduler") is None:
        missing["disable_overlap_scheduler"] = True
        config = replace(config, disable_overlap_scheduler=True)
    if role in ("prefill", "decode") and config.transceiver is None:
        missing["cache_transceiver_config"] = {"backend": "UCX"}
        config = replace(config, transceiver=Transceiver("UCX"))
    return replace(config, keys={**missing, **config.keys, **missing})


def engine_yaml(subject: LayoutSpec, model: str) -> str:
    """Write the engine config of a layout: its sizes, the keys that its role requires, and all other keys of the original config.

    Args:
        subject: the worker.
        model: its name, for the comment.
    """
    head = f"# {sanitize(' '.join(model.split()))}: {short_name(subject)}, {subject.cluster}, role {subject.role}\n"
    return head + "".join(f"{key}: {yaml_line(value)}\n" for key, value in _keys(subject).items())


def _keys(subject: LayoutSpec) -> dict[str, object]:
    layout = subject.layout
    if subject.other_backend:
        return dict(for_role(subject.config, subject.role).keys)
    keys: dict[str, object] = {
        "tensor_parallel_size": layout.tp_size,
        "pipeline_parallel_size": layout.pp_size,
    }
    if subject.shape.experts is not None:
        keys["moe_expert_parallel_size"] = layout.moe_ep_size
    keys |= {"enable_attention_dp": layout.enable_attention_dp, "gpus_per_node": subject.cluster.gpus_per_node}
    rest = {key: value for key, value in for_role(subject.config, subject.role).keys.items() if key not in LAYOUT_KEYS}
    keys |= rest
    if layout.cp_size > 1:
        block = tokens_per_block(subject)
        cache = rest.get("kv_cache_config")
        keys["context_parallel_size"] = layout.cp_size
        keys["cp_config"] = {"cp_type": layout.cp_type, "tokens_per_block": block}
        keys["kv_cache_config"] = {**(cache if isinstance(cache, dict) else {}), "tokens_per_block": block}
    return keys


def srun_line(subject: LayoutSpec, model: str) -> str:
    """Write the command that starts a worker's ranks on Slurm.

    Args:
        subject: the worker.
        model: model folder, as ``--model`` takes it.
    """

    cluster = subject.cluster
    words = [
        "srun",
        "--mpi=pmix",
        f"--nodes={cluster.nodes}",
        f"--ntasks-per-node={cluster.gpus_per_node}",
        f"--gpus-per-node={cluster.gpus_per_node}",
        "--distribution=block",
        "--kill-on-bad-exit=1",
        "--label",
        "python",
        "-m",
        "dynamo_mpi.worker",
        "--engine",
        subject.engine,
        "--role",
        subject.role,
        "--model",
        model,
        "--engine-config",
        ENGINE_CONFIG,
    ]
    return " ".join(map(shell_word, words))
