# SPDX-License-Identifier: Apache-2.0
"""How long `dynamo-mpi check` and `plan` take from a cold start, and 1,000 checks in one process.

Prints medians of whole processes, their peak memory, the ratios to a Python that imports json, argparse and yaml (goal for `check`: 2.0) and
to 1,000 calls (goal: 5 times faster, 1,000 recipes in 30 s), and which heavy packages they import (none). All commands run in turn, so that
other work on the machine slows them alike, and CPU times are compared too; bytecode is cached, as where the package is installed.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dynamo_mpi.layout import Worker, check
from tests.unit.model_zoo import ZOO

RUNS = 25
RECIPES = 1000
HEAVY = ("mpi4py", "numpy", "pydantic", "dynamo", "torch", "transformers", "tensorrt_llm")
LIBRARIES = "import json, argparse, yaml"
ENTRY = "import sys; from dynamo_mpi.cli.main import entry; sys.exit(entry())"
IMPORTED = (
    "import sys; from dynamo_mpi.cli.main import main; code = main(sys.argv[1:]); "
    f"print('heavy imports:', [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr); sys.exit(code)"
)


class Measured(NamedTuple):
    """A process: seconds, CPU seconds, peak memory in kB, exit code."""

    wall: float
    cpu: float
    peak: int
    code: int


def run(command: list[str], environment: dict[str, str] | None = None) -> Measured:
    """Run a command, and measure it."""
    began = time.perf_counter()
    quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    pid = os.posix_spawn(command[0], command, os.environ if environment is None else environment, file_actions=quiet)
    _, status, usage = os.wait4(pid, 0)
    wall = time.perf_counter() - began
    return Measured(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, os.waitstatus_to_exitcode(status))


def report(name: str, command: list[str], bare: float, goal: float) -> None:
    """Measure a command and print a line."""
    done = [run(command) for _ in range(RUNS)]
    assert all(one.code == 0 for one in done), f"{name} failed"
    seconds = sorted(one.wall for one in done)
    median = statistics.median(seconds)
    peak = max(one.peak for one in done) / 1024
    print(
        f"{name}: median {median * 1000:.0f} ms ({seconds[0] * 1000:.0f}-{seconds[-1] * 1000:.0f}; goal {goal * 1000:.0f}), "
        f"{median / bare:.1f} times a bare Python, peak {peak:.0f} MB (goal 60)",
        flush=True,
    )


def write_recipes(folder: Path) -> list[Path]:
    """Write recipes of legal and illegal layouts, some of them with wrong keys."""
    recipes = []
    for number in range(RECIPES):
        recipe = folder / f"recipe-{number}.yaml"
        sizes = f"tensor_parallel_size: {2 ** (number % 5)}\nmoe_expert_parallel_size: {2 ** (number // 5 % 4)}\n"
        more = f"max_batch_size: {1 + number % 64}\nkv_cache_config: {{free_gpu_memory_fraction: 0.8}}\n"
        recipe.write_text(sizes + more + ("max_batch_sise: 4\n" if number % 10 == 0 else ""))
        recipes.append(recipe)
    return recipes


def measure_recipes(folder: Path, model: Path, call_seconds: float) -> None:
    """Check all recipes in this process, and print the ratio to as many calls."""
    recipes = write_recipes(folder)
    worker = Worker(nodes=None, gpus_per_node=8, gpu="h200")
    began, cpu_began = time.perf_counter(), time.process_time()
    failed = sum(not check(model, recipe, worker).ok for recipe in recipes)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    print(
        f"{RECIPES} recipes in one process, {failed} with errors: {seconds:.1f} s, {cpu:.1f} s of CPU time (goal 30), "
        f"{RECIPES * call_seconds / seconds:.1f} times faster than {RECIPES} calls of {call_seconds * 1000:.0f} ms (goal 5)",
        flush=True,
    )


def main() -> None:
    """Print all figures."""
    python = sys.executable
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as scratch:
        environment["PYTHONPYCACHEPREFIX"] = str(Path(scratch, "pycache"))
        model, engine = Path(scratch, "config.json"), Path(scratch, "engine.yaml")
        model.write_text(json.dumps(ZOO["DeepSeek-R1"]))
        engine.write_text("tensor_parallel_size: 8\nmoe_expert_parallel_size: 8\nenable_chunked_prefill: true\n")
        one = ["check", "--model", str(model), "--engine-config", str(engine), "--gpus-per-node", "8", "--gpu", "h200"]
        all_layouts = ["plan", "--model", str(model), "--gpus", "128", "--gpus-per-node", "8", "--gpu", "h200"]
        commands = {
            "bare Python": ["-c", "pass"],
            "json, argparse, yaml": ["-c", LIBRARIES],
            "check, DeepSeek-R1 on 8 GPUs": ["-c", ENTRY, *one],
            "plan, DeepSeek-R1 on 128 GPUs": ["-c", ENTRY, *all_layouts],
            "plan --role decode (HELIX too)": ["-c", ENTRY, *all_layouts, "--role", "decode"],
        }
        done: dict[str, list[Measured]] = {name: [] for name in commands}
        for turn in range(RUNS + 1):
            for name, words in commands.items():
                measured = run([python, *words], environment)
                assert measured.code == 0, f"{name} failed"
                if turn:  # the first run writes the bytecode
                    done[name].append(measured)
        wall = {name: statistics.median(one.wall for one in runs) for name, runs in done.items()}
        cpu = {name: statistics.median(one.cpu for one in runs) for name, runs in done.items()}
        base = "json, argparse, yaml"
        for name in commands:
            print(
                f"{name}: median {wall[name] * 1000:.0f} ms, CPU time {cpu[name] * 1000:.0f} ms; "
                f"{wall[name] / wall[base]:.2f} and {cpu[name] / cpu[base]:.2f} times json, argparse and yaml; "
                f"peak {max(one.peak for one in done[name]) / 1024:.0f} MB (goal 60)",
                flush=True,
            )
        measure_recipes(Path(scratch), model, wall["check, DeepSeek-R1 on 8 GPUs"])
        for words in (one, all_layouts):
            run([python, "-c", IMPORTED, *words])


if __name__ == "__main__":
    main()
