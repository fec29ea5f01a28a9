# SPDX-License-Identifier: Apache-2.0
"""What it costs to have prefill and decode apart: handing KV over, and the time to the first token.

    python tests/bench/hand_over.py [--rounds 7] [--lengths 64 256 1024]

1. KV from a prefill engine's ranks to a decode engine's, by the reference engine's real path (offers, TCP, checksums, agreement of all
   ranks), against a plain socket copy of as many bytes over loopback between two of the same processes, in turn.
2. The time to the first token at the client, through two whole stacks (etcd, frontend, ranks): one aggregated worker, and a pair whose
   prefill worker has as many ranks. They are asked in turn; whichever isn't asked sleeps.

The figures to look at are the median ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from dynamo_mpi.common.files import private_dir
from dynamo_mpi.common.signals import Interrupted, Interrupts
from dynamo_mpi.deploy.local.stack import LocalStack, Ready, StackSettings
from dynamo_mpi.deploy.local.workers import WorkerSpec, mpi_environment
from dynamo_mpi.deploy.programs import find_mpirun
from dynamo_mpi.engines.reference.convert_gguf import export_model, find_default_gguf

ROOT = Path(__file__).resolve().parents[2]
RANKS = Path(__file__).with_name("hand_over_ranks.py")
SPLITS = ((1, 1), (3, 3), (3, 1))
PAIRS = ((1, 1), (3, 1))
QUESTIONS = {"short": "Say hello.", "long": "Count the words: " + "one two three four five " * 80}
WARM_UPS = 2
HANDED_GOAL, FIRST_TOKEN_GOAL = 4.0, 1.25


def machine() -> str:
    """Say what this runs on, and how busy it is."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{len(os.sched_getaffinity(0))} cores, load {load}"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return the ratio of each pair, as its median and range."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, {len(ratios)} pairs"


def hand_over(prefill_tp: int, decode_tp: int, lengths: list[int], rounds: int, folder: Path) -> None:
    """Time the hand-overs between two engines, and print a line for each prompt length."""
    words = [str(number) for number in (prefill_tp, decode_tp, WARM_UPS, rounds, *lengths)]
    command = [*find_mpirun(None), "-n", str(prefill_tp + decode_tp), sys.executable, str(RANKS), str(folder / "model")]
    environment = os.environ | mpi_environment(folder, root=os.geteuid() == 0) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {' '.join(command)}\n{done.stderr}")
    for length, found in json.loads(done.stdout).items():
        handed, copied = found["handed"][WARM_UPS:], found["copied"][WARM_UPS:]
        print(
            f"KV of {length} tokens, tp {prefill_tp} to {decode_tp}: {found['bytes'] / 1e6:.1f} MB handed over in "
            f"{statistics.median(handed) * 1000:.1f} ms, copied by a plain socket in {statistics.median(copied) * 1000:.1f} ms; "
            f"{ratio(handed, copied)}; goal {HANDED_GOAL:g})",
            flush=True,
        )


def first_token(tp: int, decode_tp: int, rounds: int) -> None:
    """Ask an aggregated worker and a pair in turn, and print a line for each question."""
    layouts = ((WorkerSpec("agg", tp),), (WorkerSpec("prefill", tp), WorkerSpec("decode", decode_tp)))
    with Interrupts() as interrupts, ExitStack() as cleanup:
        stacks: list[tuple[LocalStack, Ready]] = []
        for worlds in layouts:
            folder = cleanup.enter_context(private_dir())
            stack = LocalStack(StackSettings(worlds), folder, interrupts, lambda text: None)
            cleanup.callback(stack.stop)
            stacks.append((stack, stack.start()))
        for name, question in QUESTIONS.items():
            seconds: list[list[float]] = [[], []]
            tokens = 0
            for _ in range(WARM_UPS + rounds):
                for (stack, ready), column in zip(stacks, seconds, strict=True):
                    answer = stack.ask(ready, question, max_tokens=2, on_text=lambda text: None)
                    column.append(answer.first_token_seconds)
                    tokens = answer.prompt_tokens
            agg, disagg = (column[WARM_UPS:] for column in seconds)
            print(
                f"first token of a {name} prompt ({tokens} tokens): pair tp {tp} to {decode_tp} ({tp + decode_tp} ranks) "
                f"{statistics.median(disagg) * 1000:.0f} ms, aggregated tp {tp} ({tp} ranks) {statistics.median(agg) * 1000:.0f} ms; "
                f"{ratio(disagg, agg)}; goal {FIRST_TOKEN_GOAL:g})",
                flush=True,
            )


def main() -> int:
    """Run both comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024], help="tokens of the prompts")
    arguments = parser.parse_args()
    print(f"before: {machine()}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        export_model(find_default_gguf(), Path(scratch, "model"))
        for prefill_tp, decode_tp in SPLITS:
            hand_over(prefill_tp, decode_tp, arguments.lengths, arguments.rounds, Path(scratch))
    try:
        for tp, decode_tp in PAIRS:
            first_token(tp, decode_tp, arguments.rounds)
    except Interrupted as end:
        return end.exit_code
    print(f"after: {machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
