# SPDX-License-Identifier: Apache-2.0
"""What the checks cost: launch to verdict, against ranks that only start MPI and meet in a barrier.

    python tests/bench/launch_to_verdict.py [--engine trtllm] [--ranks 8 16] [--runs 9]

Both commands run in turn, several times, in one run of this program; the figures to look at are the median ratios of wall time and of CPU
time (of all processes that mpirun or its ranks waited for). With bytecode caches, as an installed package has them. It also counts the
files that a rank other than 0 opens before the verdict, where strace is installed.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BASELINE = "from mpi4py import MPI\nMPI.COMM_WORLD.Barrier()\n"
CONFIG = (
    '{"architectures": ["LlamaForCausalLM"], "num_attention_heads": 64, "num_key_value_heads": 64, "bos_token_id": 1}'
)
ENGINES = {"reference": ("--engine", "reference"), "trtllm": ("--engine", "trtllm", "--allow-no-gpu")}


def main() -> int:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16], help="divisors of 64")
    parser.add_argument("--engine", choices=["reference", "trtllm"], default="reference")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--mpirun", default=str(Path(sys.executable).with_name("mpirun")))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "config.json").write_text(CONFIG, encoding="utf-8")
        (folder / "model.gguf").touch()
        (folder / "baseline.py").write_text(BASELINE, encoding="utf-8")
        for ranks in arguments.ranks:
            compare(arguments, folder, ranks)
        count_files(arguments, folder)
    return 0


def commands(folder: Path, ranks: int, engine: str) -> tuple[list[str], list[str]]:
    """Return the two command lines of a rank: ours and the baseline's."""
    sizes = ["--tensor-parallel-size", str(ranks), *ENGINES[engine]]
    worker = [sys.executable, "-m", "dynamo_mpi.worker", "--model", str(folder), *sizes, "--preflight-only"]
    return worker, [sys.executable, str(folder / "baseline.py")]


def environment() -> dict[str, str]:
    """Return an environment in which mpirun starts more ranks than there are cores, also as root."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return inherited | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMP_NUM_THREADS": "1",
        # the stand-in for TensorRT-LLM is found, but not imported, by a preflight
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/standins")]),
    }


def measure(mpirun: str, ranks: int, command: list[str]) -> tuple[float, float]:
    """Run a command in ``ranks`` ranks and return its wall time and CPU time in seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [mpirun, "-n", str(ranks), *command], env=environment(), capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {' '.join(command)}\n{done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(arguments: argparse.Namespace, folder: Path, ranks: int) -> None:
    """Time both commands in turn and print the ratios of the pairs."""
    worker, baseline = commands(folder, ranks, arguments.engine)
    for command in (worker, baseline):
        measure(arguments.mpirun, ranks, command)
    pairs = [
        (measure(arguments.mpirun, ranks, worker), measure(arguments.mpirun, ranks, baseline))
        for _ in range(arguments.runs)
    ]
    for name, column in (("wall time", 0), ("CPU time", 1)):
        ours, theirs = ([pair[side][column] for pair in pairs] for side in (0, 1))
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        print(
            f"{ranks} ranks, {arguments.engine}: {name} from launch to verdict {statistics.median(ours):.2f} s, MPI and a barrier "
            f"{statistics.median(theirs):.2f} s; ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, "
            f"{len(pairs)} pairs)"
        )


def count_files(arguments: argparse.Namespace, folder: Path) -> None:
    """Count what rank 1 of 2 opens, in both commands, and print the ratio."""
    strace = shutil.which("strace")
    if strace is None:
        print("files opened: not counted, strace is not installed")
        return
    counts = []
    for name, command in zip(("worker", "baseline"), commands(folder, 2, arguments.engine), strict=True):
        trace = folder / f"{name}.trace"
        tracer = [strace, "-f", "-qq", "-e", "trace=open,openat,openat2,execve", "-o", str(trace), *command]
        # rank 1 alone is traced; MPMD keeps both in one world
        words = [arguments.mpirun, "-n", "1", *command, ":", "-n", "1", *tracer]
        subprocess.run(words, env=environment(), capture_output=True, check=True)
        lines = trace.read_text(encoding="utf-8", errors="replace").splitlines()
        opened = [line for line in lines if "open" in line.split("(", 1)[0] and "= -1" not in line]
        missed = [line for line in lines if "open" in line.split("(", 1)[0] and "= -1" in line]
        counts.append((len(opened), len(opened) + len(missed)))
    (ours, ours_all), (theirs, theirs_all) = counts
    print(
        f"files opened by rank 1: {ours} and {theirs}, ratio {ours / theirs:.2f}; "
        f"attempts included {ours_all} and {theirs_all}, ratio {ours_all / theirs_all:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
