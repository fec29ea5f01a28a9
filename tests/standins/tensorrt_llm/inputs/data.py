# SPDX-License-Identifier: Apache-2.0
"""Prompts: token ids alone, or with images, which the stand-in can't see."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from tensorrt_llm.executor.utils import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

_KEYS = frozenset({"prompt_token_ids", "multi_modal_data", "mm_processor_kwargs"})


def prompt_of(inputs: object) -> list[int]:
    """Return the token ids of a prompt.

    Raises:
        RequestError: there are images; it says as JSON which, and with which tokens, as no other part could.
        NotImplementedError: the stand-in doesn't know such a prompt.
    """
    if isinstance(inputs, list):
        return inputs
    if not isinstance(inputs, dict):
        raise NotImplementedError(f"the stand-in takes lists of token ids, not {type(inputs).__name__}")
    if more := inputs.keys() - _KEYS:
        raise NotImplementedError(f"the stand-in has no prompts with {', '.join(sorted(more))}")
    if inputs.get("mm_processor_kwargs"):
        raise NotImplementedError(f"the stand-in has no mm_processor_kwargs: {inputs['mm_processor_kwargs']!r}")
    prompt: list[int] = inputs["prompt_token_ids"]
    if data := inputs.get("multi_modal_data"):
        if data.keys() != {"image"}:
            raise NotImplementedError(f"the stand-in has no multimodal data but images: {', '.join(sorted(data))}")
        seen: dict[str, Any] = {"prompt_token_ids": prompt, "image": [_described(image) for image in data["image"]]}
        raise RequestError(f"the stand-in sees no images; it was given {json.dumps(seen)}")
    return prompt


def _described(image: Image) -> str:
    width, height = image.size
    return f"{image.mode} {width}x{height} sha256:{hashlib.sha256(image.tobytes()).hexdigest()}"
