# SPDX-License-Identifier: Apache-2.0
"""What the checks cost: launch to verdict, against ranks that only start MPI and meet in a barrier.

    python tests/bench/launch_to_verdict.py [--ranks 8 16] [--runs 9]

Both commands run in turn, several times, in one run of this program; the figures to look at are the median ratios. It also counts the files
that a rank other than 0 opens before the verdict, where strace is installed.
"""

from __future__ import annotations

import argparse
import os
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
    '{"architectures": ["LlamaForCausalLM"], "num_attention_heads": 16, "num_key_value_heads": 16, "bos_token_id": 1}'
)


def main() -> int:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16], help="divisors of 16")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--mpirun", default=str(Path(sys.executable).with_name("mpirun")))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "config.json").write_text(CONFIG, encoding="utf-8")
        (folder / "model.gguf").touch()
        (folder / "baseline.py").write_text(BASELINE, encoding="utf-8")
        for ranks in arguments.ranks:
            compare(arguments.mpirun, folder, ranks, arguments.runs)
        count_files(arguments.mpirun, folder)
    return 0


def commands(folder: Path, ranks: int) -> tuple[list[str], list[str]]:
    """Return the two command lines of a rank: ours and the baseline's."""
    sizes = ["--tensor-parallel-size", str(ranks)]
    worker = [sys.executable, "-m", "dynamo_mpi.worker", "--model", str(folder), *sizes, "--preflight-only"]
    return worker, [sys.executable, str(folder / "baseline.py")]


def environment() -> dict[str, str]:
    """Return an environment in which mpirun starts more ranks than there are cores, also as root."""
    return os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PYTHONPATH": str(ROOT),
    }


def seconds(mpirun: str, ranks: int, command: list[str]) -> float:
    """Run a command in ``ranks`` ranks and return its wall time."""
    start = time.perf_counter()
    done = subprocess.run(
        [mpirun, "-n", str(ranks), *command], env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {' '.join(command)}\n{done.stderr}")
    return time.perf_counter() - start


def compare(mpirun: str, folder: Path, ranks: int, runs: int) -> None:
    """Time both commands in turn and print the ratio of each pair."""
    worker, baseline = commands(folder, ranks)
    for command in (worker, baseline):
        seconds(mpirun, ranks, command)
    pairs = [(seconds(mpirun, ranks, worker), seconds(mpirun, ranks, baseline)) for _ in range(runs)]
    ratios = sorted(a / b for a, b in pairs)
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{ranks} ranks: launch to verdict {ours:.2f} s, MPI and a barrier {theirs:.2f} s; "
        f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, {runs} pairs)"
    )


def count_files(mpirun: str, folder: Path) -> None:
    """Count what rank 1 of 2 opens, in both commands, and print the ratio."""
    strace = shutil.which("strace")
    if strace is None:
        print("files opened: not counted, strace is not installed")
        return
    counts = []
    for name, command in zip(("worker", "baseline"), commands(folder, 2), strict=True):
        trace = folder / f"{name}.trace"
        tracer = [strace, "-f", "-qq", "-e", "trace=open,openat,openat2,execve", "-o", str(trace), *command]
        # rank 1 alone is traced; MPMD keeps both in one world
        words = [mpirun, "-n", "1", *command, ":", "-n", "1", *tracer]
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
