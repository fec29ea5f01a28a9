# SPDX-License-Identifier: Apache-2.0
"""Ask the stand-in tensorrt_llm for what it doesn't have, and print as JSON how it refused each time.

Usage: standin_refusals.py MODEL_DIR
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

from PIL import Image


def outcome(ask: Callable[[], object]) -> str:
    """Return the exception's type and text."""
    try:
        return f"no refusal: {ask()!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


async def request_outcomes(llm: Any) -> dict[str, str]:
    """Return how an engine of one rank refuses requests, and that it still serves."""
    api = importlib.import_module("tensorrt_llm.llmapi.llm")
    params = importlib.import_module("tensorrt_llm.llmapi").DisaggregatedParams

    def ask(disaggregated_params: Any = None, inputs: Any = None, **sampling: Any) -> str:
        arguments = {"sampling_params": api.SamplingParams(**sampling), "disaggregated_params": disaggregated_params}
        return outcome(lambda: llm.generate_async(inputs or [1, 2], **arguments))

    def prompt(**more: Any) -> dict[str, Any]:
        return {"prompt_token_ids": [1, 2], "mm_processor_kwargs": {}, **more}

    served = llm.generate_async(prompt(), api.SamplingParams(max_tokens=2, ignore_eos=True))
    async for result in served:
        last = result.outputs[0]
    return {
        "logprobs": ask(logprobs=2),
        "two answers": ask(n=2),
        "a penalty": ask(presence_penalty=0.5),
        "an image": ask(inputs=prompt(multi_modal_data={"image": [Image.new("RGB", (3, 2))]})),
        "a video": ask(inputs=prompt(multi_modal_data={"video": []})),
        "a prompt in words": ask(inputs=prompt(prompt="Hello!")),
        "prefill": ask(params(request_type="context_only")),
        "request type": outcome(lambda: params(request_type="other")),
        "too long": ask(inputs=list(range(5000))),
        "served": f"{len(last.token_ids)} {last.finish_reason}",
    }


def main() -> None:
    package = importlib.import_module("tensorrt_llm")
    torch = importlib.import_module("torch")
    model = sys.argv[1]

    def construct(**arguments: Any) -> Callable[[], object]:
        return lambda: package.LLM(**({"model": model, "gpus_per_node": 1} | arguments))

    found = {
        "unknown name": outcome(lambda: package.BuildConfig),
        "unknown torch": outcome(lambda: torch.zeros),
        "unknown argument": outcome(construct(tensor_paralel_size=2)),
        "unknown nested": outcome(construct(kv_cache_config={"free_gpu_memory": 0.5})),
        "no gpus_per_node": outcome(lambda: package.LLM(model=model)),
        "beams": outcome(construct(max_beam_width=4)),
        "attention dp": outcome(construct(enable_attention_dp=True)),
        "encoder": outcome(lambda: package.MultimodalEncoder(model=model)),
        "no launcher": outcome(construct(pipeline_parallel_size=2)),
    }
    llm = package.LLM(model=model, gpus_per_node=1, max_seq_len=128, max_batch_size=2)
    found |= asyncio.run(request_outcomes(llm))
    llm.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
