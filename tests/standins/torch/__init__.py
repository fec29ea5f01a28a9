# SPDX-License-Identifier: Apache-2.0
"""The sliver of torch that dynamo.trtllm and what it imports name while they are loaded: types, and no arithmetic.

It belongs to the stand-in ``tensorrt_llm`` beside it. What isn't here raises AttributeError.
"""

from __future__ import annotations

from . import cuda as cuda
from . import nn as nn

__version__ = "0.0.0+standin"


class Tensor:
    """For annotations and ``isinstance``; there are none."""

    def __init__(self, *_: object) -> None:
        raise NotImplementedError("the stand-in torch has no tensors")


class dtype:
    """A number format: a name, nothing more."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return f"torch.{self._name}"


# safetensors.torch has tables of them
bool = dtype("bool")
uint8, int8, int16, int32, int64 = (dtype(name) for name in ("uint8", "int8", "int16", "int32", "int64"))
float16, bfloat16, float32, float64 = (dtype(name) for name in ("float16", "bfloat16", "float32", "float64"))
complex64 = dtype("complex64")
