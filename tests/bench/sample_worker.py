# SPDX-License-Identifier: Apache-2.0
"""Dynamo's sample engine with no delay per token, under a name of our choice. For `serving_rate.py` alone."""

from __future__ import annotations

import sys
from typing import Any

import uvloop
from dynamo.common.backend.sample_engine import SampleLLMEngine
from dynamo.common.backend.worker import Worker


async def main() -> None:
    """Serve: MODEL_DIR NAME."""
    model_dir, name = sys.argv[1:3]
    argv = ["--model-name", model_dir, "--delay", "0", "--namespace", "bench", "--disable-kv-routing"]
    engine, config = await SampleLLMEngine.from_args(argv)
    config.served_model_name = name
    start = engine.start

    async def named(worker_id: int) -> Any:
        answer = await start(worker_id)
        answer.served_model_name = name
        return answer

    engine.start = named
    await Worker(engine, config).run()


if __name__ == "__main__":
    uvloop.run(main())
