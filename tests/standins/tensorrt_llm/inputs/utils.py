# SPDX-License-Identifier: Apache-2.0
"""Multimodal inputs: there are none."""

from __future__ import annotations

from typing import NoReturn


async def async_load_video(*_: object, **__: object) -> NoReturn:
    """Refuse."""
    raise NotImplementedError("the stand-in has no multimodal inputs")
