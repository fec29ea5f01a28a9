# SPDX-License-Identifier: Apache-2.0
"""Sets the environment variables that a rank needs before it imports TensorRT-LLM."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any


def prepare_rank(rank: int) -> None:
    """Set the variables that TensorRT-LLM's own launcher sets for a rank, unless the user has set them.

    FlashInfer compiles into its workspace, and ranks that share one disturb each other; the cubins that it downloads stay shared.
    """
    # with it, the ranks of this world would ignore each other
    os.environ.pop("TLLM_DISABLE_MPI", None)
    if "FLASHINFER_WORKSPACE_BASE" in os.environ or os.environ.get("TRTLLM_FLASHINFER_WORKSPACE_PER_PROCESS") == "0":
        return
    try:
        cache = Path.home() / ".cache"
    except RuntimeError:  # no home directory: FlashInfer reports that itself
        return
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(cache / "tensorrt_llm" / "flashinfer" / f"rank-{rank}")
    os.environ.setdefault("FLASHINFER_CUBIN_DIR", str(cache / "flashinfer" / "cubins"))


def take_own_gpu(rank: int) -> None:
    """Make this rank's GPU (K9) the current one if TensorRT-LLM has imported torch: loading a task from bytes may use a GPU, which would
    otherwise be the node's first."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
