# SPDX-License-Identifier: Apache-2.0
"""What real launchers put into the environment of each rank; see ``tests/slurm/record_environments.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_PATH = Path(__file__).resolve().parent.parent / "slurm" / "recorded_environments.json"
RECORDED: dict[str, dict[str, Any]] = json.loads(_PATH.read_text(encoding="utf-8"))


def ranks_of(name: str) -> list[dict[str, str]]:
    """Return the environments of a recorded launch, in rank order."""
    ranks = RECORDED[name]["ranks"]
    return [ranks[str(rank)] for rank in range(len(ranks))]
