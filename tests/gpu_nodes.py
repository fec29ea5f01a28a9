# SPDX-License-Identifier: Apache-2.0
"""Nodes with GPUs, as the stand-in of nvidia-ml-py (`tests/standins/pynvml`) reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def gpu_node(*gpus: Mapping[str, Any], total: int = 80 << 30, **more: Any) -> str:
    """Describe a node with H100s.

    Args:
        gpus: what each GPU has of its own.
        total: bytes of each GPU's memory, all of it free.
        more: further members of the node.
    """
    usual = {
        "name": "NVIDIA H100 80GB HBM3",
        "sm": [9, 0],
        "total": total,
        "free": total,
        "used": 0,
        "processes": [],
        "mig": 0,
    }
    some = [{**usual, "uuid": f"GPU-{number}", **gpu} for number, gpu in enumerate(gpus)]
    return json.dumps({"driver": "580.1", "cuda": 13000, "gpus": some, **more})


def write_whole(path: Path, text: str) -> None:
    """Write a file that its readers see whole, whenever they look."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)
