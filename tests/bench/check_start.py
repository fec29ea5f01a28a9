# SPDX-License-Identifier: Apache-2.0
"""How long `dynamo-mpi check` and `plan` take from a cold start, and what they need: a login node's time is what people wait for.

Prints medians of whole processes, their peak memory, the ratio to a bare Python, and which heavy packages they import (none).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.unit.model_zoo import ZOO

RUNS = 15
HEAVY = ("mpi4py", "numpy", "pydantic", "dynamo", "torch", "transformers", "tensorrt_llm")
IMPORTED = (
    "import sys; from dynamo_mpi.cli.main import main; code = main(sys.argv[1:]); "
    f"print('heavy imports:', [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr); sys.exit(code)"
)


def run(command: list[str]) -> tuple[float, int, int]:
    """Run a command; return its seconds, its peak memory in kB, and its exit code."""
    began = time.perf_counter()
    quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=quiet)
    _, status, usage = os.wait4(pid, 0)
    return time.perf_counter() - began, usage.ru_maxrss, os.waitstatus_to_exitcode(status)


def report(name: str, command: list[str], bare: float, goal: float) -> None:
    """Measure a command and print a line."""
    done = [run(command) for _ in range(RUNS)]
    assert all(code == 0 for _, _, code in done), f"{name} failed"
    seconds = sorted(wall for wall, _, _ in done)
    median = statistics.median(seconds)
    peak = max(memory for _, memory, _ in done) / 1024
    print(
        f"{name}: median {median * 1000:.0f} ms ({seconds[0] * 1000:.0f}-{seconds[-1] * 1000:.0f}; goal {goal * 1000:.0f}), "
        f"{median / bare:.1f} times a bare Python, peak {peak:.0f} MB (goal 60)",
        flush=True,
    )


def main() -> None:
    """Print all figures."""
    python = sys.executable
    bare = statistics.median(run([python, "-c", "pass"])[0] for _ in range(RUNS))
    print(f"a bare Python: median {bare * 1000:.0f} ms", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        model, engine = Path(scratch, "config.json"), Path(scratch, "engine.yaml")
        model.write_text(json.dumps(ZOO["DeepSeek-R1"]))
        engine.write_text("tensor_parallel_size: 8\nmoe_expert_parallel_size: 8\nenable_chunked_prefill: true\n")
        entry = [python, "-m", "dynamo_mpi.cli.main"]
        check = [
            "check",
            "--model",
            str(model),
            "--engine-config",
            str(engine),
            "--gpus-per-node",
            "8",
            "--gpu",
            "h200",
        ]
        plan = ["plan", "--model", str(model), "--gpus", "128", "--gpus-per-node", "8", "--gpu", "h200"]
        report("check, DeepSeek-R1 on 8 GPUs", [*entry, *check], bare, 0.25)
        report("plan, DeepSeek-R1 on 128 GPUs", [*entry, *plan], bare, 0.5)
        report("plan --role decode (HELIX too)", [*entry, *plan, "--role", "decode"], bare, 0.5)
        for words in (check, plan):
            run([python, "-c", IMPORTED, *words])


if __name__ == "__main__":
    main()
