# SPDX-License-Identifier: Apache-2.0
"""What an idle worker costs: the CPU of each of its ranks and of its node agent while it serves and has no request.

    python -m tests.bench.idle_ranks [--ranks 3] [--seconds 30]

A worker with the reference engine and the real model, under mpirun, with a real etcd. The figure to look at is the greatest share of a core
of a rank other than 0: below 2 %.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from dynamo_mpi.common.ports import free_port
from dynamo_mpi.deploy.programs import find_etcd
from dynamo_mpi.deploy.services import Etcd
from dynamo_mpi.engines.reference.convert_gguf import export_model, find_default_gguf
from tests.bench.launch_to_verdict import ROOT, environment

MARK = "DYN_BENCH_MARK"
MOST = 0.02
READY_SECONDS = 300.0
TICKS = os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Measure, print, and return 1 if a follower takes more than it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ranks", type=int, default=3, help="a divisor of the model's three KV heads, or a multiple of them"
    )
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--mpirun", default=str(Path(sys.executable).with_name("mpirun")))
    arguments = parser.parse_args()
    shares = run(arguments)
    for name, share in sorted(shares.items()):
        print(f"{name}: {share:.2%} of a core")
    followers = [share for name, share in shares.items() if name.startswith("rank ") and name != "rank 0"]
    print(f"followers: at most {max(followers, default=0.0):.2%}, load {os.getloadavg()[0]:.1f}")
    return int(max(followers, default=0.0) > MOST)


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Start a worker, wait until it is ready and quiet, and return the CPU of each process, by its name."""
    with ExitStack() as cleanup:
        scratch = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        log = cleanup.enter_context((scratch / "log").open("wb"))
        mark = secrets.token_hex(8)

        def start(*command: str, **variables: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(command, env=environment() | variables, stdout=log, stderr=log)
            cleanup.callback(process.wait)
            cleanup.callback(process.terminate)
            return process

        etcd = Etcd(find_etcd(), free_port(), scratch / "etcd")
        start(*etcd.command())
        export_model(find_default_gguf(), scratch / "model")
        ready = scratch / "ready"
        worker = start(
            *(arguments.mpirun, "-n", str(arguments.ranks), sys.executable, "-m", "dynamo_mpi.worker"),
            *("--engine", "reference", "--model", str(scratch / "model"), "--ready-file", str(ready)),
            *("--tensor-parallel-size", str(arguments.ranks)),
            **{"ETCD_ENDPOINTS": etcd.url, "PYTHONPATH": str(ROOT), MARK: mark},
        )
        end = time.monotonic() + READY_SECONDS
        while not ready.exists():
            if worker.poll() is not None or time.monotonic() > end:
                raise SystemExit((scratch / "log").read_text(errors="replace"))
            time.sleep(0.1)
        before, began = dict(times(mark)), time.monotonic()
        time.sleep(arguments.seconds)
        passed = time.monotonic() - began
        return {name: (used - before[name]) / passed for name, used in times(mark) if name in before}


def times(mark: str) -> Iterator[tuple[str, float]]:
    """Yield the name and the CPU seconds of each rank and agent that the bench has started."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            variables = dict(
                line.partition("=")[::2] for line in (folder / "environ").read_text(errors="replace").split("\0")
            )
            title = (folder / "cmdline").read_text(errors="replace")
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        rank = variables.get("OMPI_COMM_WORLD_RANK")
        if variables.get(MARK) == mark and rank is not None:
            name = "node agent" if "node agent" in title else f"rank {rank}"
            yield name, (int(fields[11]) + int(fields[12])) / TICKS


if __name__ == "__main__":
    sys.exit(main())
