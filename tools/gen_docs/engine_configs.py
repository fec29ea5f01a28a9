# SPDX-License-Identifier: Apache-2.0
"""``engine_configs/README.md``: the example engine configs by model, role and size, from their headers and their sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from tools.gen_docs.markdown import WRITTEN, table

FOLDER = Path(__file__).resolve().parents[2] / "engine_configs"
HEADER = re.compile(
    r"# model:        (?P<model>\S+)( \((?P<format>.*)\))?\n"
    r"# role:         (?P<role>agg|prefill|decode)\n"
    r"# nodes x GPUs: (?P<nodes>\d+) x (?P<gpus>\d+)( \((?P<gpu>\w+)\)|, ranks without GPUs)"
)
"""The first lines of each file."""
ROLES = ("prefill", "decode", "agg")

_PAGE = """# Engine configs

{written}
Examples of TensorRT-LLM's YAML, one for each worker. The path says the model and the role; where a model has several, the name goes on
with the parallel sizes (`tp8`: tensor, `ep16`: experts, `pp2`: stages, `wide`: experts over nodes) and, for some, nodes x GPUs (`2x8`).
Each file's first lines say model, role, nodes, GPUs and kind of GPU. `dynamo-mpi check` finds nothing wrong with any of them, and every
prefill worker fits every decode worker of its model (`tests/unit/test_engine_configs.py`). None has run on GPUs yet.

[`multimodal/llama4`](multimodal/llama4) is the default of `scripts/srun_disaggregated.sh` and `scripts/srun_aggregated.sh`; with the
checkout mounted as `/mnt`, its files are `/mnt/engine_configs/multimodal/llama4/prefill.yaml` and `decode.yaml` in the container.

{models}
To check one: `dynamo-mpi check --model MODEL --engine-config FILE --role ROLE --nodes N --gpus-per-node G --gpu KIND`. To find layouts for
another model or other GPUs: `dynamo-mpi plan` ([check and plan](../docs/guides/preflight.md)).
"""


@dataclass(frozen=True)
class Example:
    """One file: its path from the folder, its header's groups, and its YAML."""

    path: str
    header: dict[str, str | None]
    sizes: dict[str, Any]

    @property
    def layout(self) -> str:
        """Its parallel sizes in short."""
        sizes = self.sizes
        names = (
            ("TP", "tensor_parallel_size"),
            ("EP", "moe_expert_parallel_size"),
            ("PP", "pipeline_parallel_size"),
            ("CP", "context_parallel_size"),
        )
        parts = [f"{name}{sizes[key]}" for name, key in names if sizes.get(key, 1) > 1 or name == "TP"]
        return "/".join(parts) + (", attention DP" if sizes.get("enable_attention_dp") else "")


def examples() -> list[Example]:
    """Return all files, by model, role and path.

    Raises:
        ValueError: a file's header doesn't say what it is for.
    """
    found = []
    for path in FOLDER.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        head = HEADER.match(text)
        if head is None:
            raise ValueError(f"{path} doesn't begin with model, role, and nodes x GPUs")
        found.append(Example(str(path.relative_to(FOLDER)), head.groupdict(), yaml.safe_load(text)))
    return sorted(found, key=lambda one: (one.header["model"], ROLES.index(one.header["role"] or ""), one.path))


def render() -> str:
    """Return the page."""
    models = ""
    for model, of_model in groupby(examples(), key=lambda one: (one.header["model"], one.header["format"])):
        models += f"## {model[0]}\n\n" + (f"{model[1][:1].upper()}{model[1][1:]}.\n\n" if model[1] else "")
        rows = [
            (
                str(one.header["role"]),
                f"{one.header['nodes']} x {one.header['gpus']} {one.header['gpu'] or 'ranks, on CPUs'}",
                one.layout,
                f"[{one.path}]({one.path})",
            )
            for one in of_model
        ]
        models += table(("role", "nodes x GPUs", "layout", "file"), rows) + "\n"
    return _PAGE.format(written=WRITTEN, models=models.rstrip() + "\n")
