# SPDX-License-Identifier: Apache-2.0
"""How much room ``--stage`` needs on each node: as much as the checkpoint has.

The files are counted if they are here, as they are copied: all of the model's folder without hidden ones. With config.json alone the size is
that of the weights, counted from the shape: the tokenizer's files and the like, some MiB, come on top.
"""

from __future__ import annotations

import os

from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.layout.format import gib
from dynamo_mpi.layout.layer_weights import Split, bytes_of, dtype_bytes, layer_parts
from dynamo_mpi.layout.weights import checkpoint_bytes

if TYPE_CHECKING:
    from dynamo_mpi.layout.model_shape import ModelShape

_WEIGHTS = (".safetensors", ".gguf", ".bin")
# a model's folder has hundreds of files; a folder that isn't one may have millions
_MOST_FILES = 20_000
# their GPUs' memory and the host's are one to the kernel: memory taken for files leaves less for the KV cache
_COHERENT = ("gb", "gh")


@dataclass(frozen=True)
class StagingRoom:
    """The room that a copy of the model takes on each node.

    Args:
        bytes: its size.
        counted: whether the files were counted; otherwise it is an estimate from config.json.
        at_least: whether the estimate leaves something out that isn't known here.
    """

    bytes: int
    counted: bool
    at_least: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"bytes_per_node": self.bytes, "counted": self.counted, "at_least": self.at_least}

    def line(self, gpu: str | None) -> str:
        """Say it in one line.

        Args:
            gpu: the kind of GPU, if it is known.
        """
        about = "" if self.counted else "at least " if self.at_least else "about "
        cost = "of its memory"
        if gpu is not None and gpu.startswith(_COHERENT):
            cost += f", which on {gpu} leaves less for the KV cache"
        return f"staging (--stage): {about}{gib(self.bytes)} of disk on each node; in /dev/shm as much {cost}"


def staging_room(config: str, shape: ModelShape) -> StagingRoom | None:
    """Return the room for a model; None if neither its files are here nor its sizes known.

    Args:
        config: path of its config.json.
        shape: its shape.
    """
    size = folder_bytes(os.path.dirname(config))
    if size is not None:
        return StagingRoom(size, counted=True)
    weights = checkpoint_bytes(shape)
    if weights is None:
        return None
    if shape.nextn_layers and shape.nextn_layer is not None:
        weights += round(shape.nextn_layers * bytes_of(shape, layer_parts(shape, shape.nextn_layer, Split())))
    encoders = sum(encoder.parameters or 0 for encoder in shape.encoders) * dtype_bytes(shape)
    unknown = bool(shape.inexact or any(encoder.missing for encoder in shape.encoders))
    return StagingRoom(weights + encoders, counted=False, at_least=unknown)


def folder_bytes(folder: str) -> int | None:
    """Count the bytes of a model's folder; None if it holds no weights, or can't be read."""
    sizes: list[int] = []
    try:
        # looked at first: a config.json may stand anywhere, beside a million other files
        if not any(name.endswith(_WEIGHTS) for name in os.listdir(folder or ".")):
            return None
        for below, folders, files in os.walk(folder or "."):
            folders[:] = [name for name in folders if not name.startswith(".")]
            shown = (name for name in files if not name.startswith("."))
            sizes += [os.stat(os.path.join(below, name)).st_size for name in shown]
            if len(sizes) > _MOST_FILES:
                return None
    except OSError:
        return None
    return sum(sizes)
