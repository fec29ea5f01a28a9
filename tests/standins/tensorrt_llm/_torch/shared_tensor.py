# SPDX-License-Identifier: Apache-2.0
"""Tensors shared between processes: there are none."""

from __future__ import annotations

from typing import NoReturn


class SharedTensorContainer:
    """Refuses."""

    def __init__(self, *_: object, **__: object) -> None:
        raise NotImplementedError("the stand-in has no multimodal inputs")

    @classmethod
    def from_dict(cls, *_: object) -> NoReturn:
        """Refuse."""
        raise NotImplementedError("the stand-in has no multimodal inputs")
