# SPDX-License-Identifier: Apache-2.0
"""How long a deployment is without a worker after a fault, beside what others do, on the real Slurm of the tests, in one run:

    python -m tests.bench.recovery [--only kill node peer-node staged]

- kill: a rank is killed; beside a loop around the same srun line that looks every 5 s and waits 5 s before it starts it again;
- node: a node is powered off, and one is cut off; serving on a spare node;
- peer-node: the same with ``sbatch --requeue``, which starts again when Slurm has given the node up (SlurmdTimeout 60 s);
- staged: the load after a rank was killed, of a model that is staged, beside the first one, from a slow shared file system.

A worker has two ranks on two nodes, the reference engine and a llama of two layers (staged: SmolLM2). The streams of another worker of the
role are open meanwhile. Needs root on Debian. Prints figures and their bounds; exits with 1 if one is missed, also
for want of the part that it needs: node needs kill, peer-node needs node.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.bench.cold_start import bound
from tests.bench.slow_share import SlowShare
from tests.conftest import ROOT
from tests.dynamo.running import eventually
from tests.namespaces.anchor import remove_leftovers
from tests.namespaces.commands import InsideProcess
from tests.namespaces.processes import children_of, command_line
from tests.slurm.cluster.cluster import Cluster, why_unavailable
from tests.slurm.recovery import HEARTBEAT, LONGEST_STALL, OpenStreams, RecoveringDeployment, settings, write_model
from tests.slurm.session import SlurmSession

SLURMD_TIMEOUT = 60
TICK_SECONDS = BACK_OFF_SECONDS = 5.0
VERDICT = "preflight: ok"
PEER_NODES = ("n6", "n7")
# of the shared file system, as in the cold-start bench (1024 MB at 64 MB/s): the model is read once in so many seconds
READ_SECONDS, MOUNT_SHARE, OPEN_SECONDS = 16.0, 0.5, 0.005
_STAGED = re.compile(r"stage: \d+ nodes have the model.*?, after ([\d.]+) s;")
_READY = re.compile(r"ready: \S+ at \S+ after [\d.]+ s \((.*?)\)")


class Figures(NamedTuple):
    """What followed a fault.

    Args:
        verdict: seconds until the next start's preflight had passed.
        serving: seconds until it served.
    """

    verdict: float
    serving: float


class Worker:
    """A worker as its files show it.

    Args:
        log: its output.
        ready: its ready file.
    """

    def __init__(self, log: Path, ready: Path) -> None:
        self.log, self.ready = log, ready

    def verdicts(self) -> int:
        return self.log.read_text(errors="replace").count(VERDICT) if self.log.exists() else 0

    def is_ready_since(self, moment: float) -> bool:
        with contextlib.suppress(OSError):
            return self.ready.stat().st_mtime > moment
        return False

    def watch(self, fault: Callable[[], object], seconds: float) -> Figures:
        """Let a fault happen, and measure."""
        before, began = self.verdicts(), time.time()
        fault()
        self._wait(lambda: self.verdicts() > before, "the next verdict", seconds)
        verdict = time.time() - began
        self._wait(lambda: self.is_ready_since(began), "it serves again", seconds)
        return Figures(verdict, time.time() - began)

    def _wait(self, is_there: Callable[[], bool], what: str, seconds: float) -> None:
        try:
            eventually(is_there, what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log.read_text(errors='replace')[-4000:]}") from None


@contextmanager
def cluster(nodes: int, node_timeout: int = SLURMD_TIMEOUT) -> Iterator[SlurmSession]:
    """Build a cluster."""
    own = Cluster.temporary(nodes=nodes, node_timeout=node_timeout)
    try:
        own.up(die_with_parent=True)
        yield SlurmSession(own, Path("/nonexistent"))
    finally:
        own.down()


@contextmanager
def deployed(
    slurm: SlurmSession, folder: Path, model: Path, words: Sequence[str] = (), **environment: str
) -> Iterator[tuple[RecoveringDeployment, Worker, OpenStreams]]:
    """Launch the deployment, and open streams of the worker that nothing happens to."""
    folder.mkdir()
    deployment = RecoveringDeployment(slurm, folder, model, 1, words, environment)
    try:
        deployment.all_ready(300)
        run_dir = deployment.run_dir
        yield deployment, Worker(run_dir / "logs" / "agg-1.log", run_dir / "ready" / "agg-1.json"), deployment.streams()
    except BaseException:
        print(deployment.text(), file=sys.stderr)
        raise
    finally:
        deployment.stop()


def undisturbed(streams: OpenStreams) -> list[str]:
    """Return what the other worker's streams missed."""
    rows = streams.close()
    failed = [row["end"] for row in rows if row["end"] != "done"]
    longest = max((row["longest_wait"] for row in rows), default=float("inf"))
    return [
        *bound(f"other worker's {len(rows)} streams: errors", len(failed), 0),
        *bound("other worker's streams: longest wait for a piece in s", longest, LONGEST_STALL),
    ]


class Peer:
    """A loop around the same srun line: looks every 5 s whether it has ended, and waits 5 s before it starts it again.

    Args:
        deployment: has the line, of ``agg-1``; its nodes and files become the peer's own.
        folder: for the files.
    """

    def __init__(self, deployment: RecoveringDeployment, folder: Path) -> None:
        self._slurm, self._folder = deployment.slurm, folder
        folder.mkdir()
        (sruns,) = {
            tuple(words[words.index("srun") :])
            for pid in deployment.slurm.pids("login")
            if "srun" in (words := command_line(pid)) and any(word.endswith("-agg-1") for word in words)
        }
        pid = next(p for p in deployment.slurm.pids("login") if command_line(p) == list(sruns))
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        self._environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        self._environment["SLURM_JOB_NODELIST"] = ",".join(PEER_NODES)
        names = {"--nodelist=n3,n4": f"--nodelist={','.join(PEER_NODES)}"}
        own = [names.get(word, word) for word in sruns if word != "--no-kill"]
        self._words = [word.replace(str(deployment.run_dir), str(folder)).replace("-agg-1", "-peer") for word in own]
        (folder / "ready").mkdir(mode=0o700)
        self.worker = Worker(folder / "log", next(Path(w) for w in self._words if "/ready/" in w))
        self._process: InsideProcess | None = None
        self._looked = 0.0

    def start(self) -> None:
        """Start the line."""
        with self.worker.log.open("ab") as log:
            self._process = self._slurm.cluster.popen(
                self._words, environment=self._environment, stdout=log, stderr=log
            )

    def poll(self) -> None:
        """Look, at its time."""
        now = time.monotonic()
        if now < self._looked + TICK_SECONDS:
            return
        self._looked = now
        if self._process is not None and self._process.poll() is not None:
            time.sleep(BACK_OFF_SECONDS)
            self.start()

    def watch(self, after_look: float) -> Figures:
        """Kill a rank so long after a look, and go on with the loop until it serves again."""
        self._looked = time.monotonic() - after_look
        pids = self._slurm.pids(PEER_NODES[1])
        ranks = [pid for pid in pids if "dynamo_mpi.worker" in command_line(pid)]
        forked = {child for pid in ranks for child in children_of(pid)}
        (rank,) = [pid for pid in ranks if pid not in forked]
        before, began, verdict = self.worker.verdicts(), time.time(), 0.0
        os.kill(rank, signal.SIGKILL)
        while not self.worker.is_ready_since(began):
            self.poll()
            verdict = verdict or (time.time() - began if self.worker.verdicts() > before else 0.0)
            if time.time() > began + 120:
                raise AssertionError(self.worker.log.read_text(errors="replace")[-4000:])
            time.sleep(0.02)
        return Figures(verdict, time.time() - began)

    def end(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.end()


class Bench:
    """All parts.

    Args:
        folder: for their files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder / "tiny")
        self.warm: float | None = None
        self.nodes: dict[str, float] = {}

    def kill(self) -> list[str]:
        """A rank is killed."""
        missed, theirs, warm = [], [], []
        ours, again = list[Figures](), list[Figures]()
        # a quarter and three quarters of a tick after a look: the loop's mean
        for share in (0.25, 0.75):
            folder = self.folder / f"kill-{share}"
            with cluster(7) as slurm, deployed(slurm, folder, self.model) as (deployment, worker, streams):
                for node, figures in (("n4", ours), ("n3", again)):
                    figures.append(worker.watch(functools.partial(deployment.kill, node, signal.SIGKILL), 90))
                with ExitStack() as stack:
                    peer = Peer(deployment, folder / "peer")
                    stack.callback(peer.end)
                    began = time.time()
                    peer.start()
                    eventually(functools.partial(peer.worker.is_ready_since, began), "the peer's worker serves", 90)
                    # srun to ready, with all files in the caches
                    warm.append(time.time() - began)
                    theirs.append(peer.watch(share * TICK_SECONDS))
                # open until here, so that the peer has as much of this machine
                missed += undisturbed(streams)
        self.warm = statistics.mean(warm)
        print(f"\na rank killed ({len(ours)} times each); a warm start takes {self.warm:.1f} s")
        show("launch", ours)
        show("launch, a second one at once: a pause of 1 s, and the nodes are probed", again)
        show("loop of 5 s tick and 5 s back-off", theirs)
        ratio = mean(ours, "verdict") / mean(theirs, "verdict")
        missed += bound("kill: next verdict by the loop's", ratio, 0.3)
        return [*missed, *bound("kill: serving again by a warm start", mean(ours, "serving") / self.warm, 1.3)]

    def node(self) -> list[str]:
        """A node is lost."""
        missed = []
        for how in ("off", "cut"):
            with (
                cluster(5) as slurm,
                deployed(slurm, self.folder / f"node-{how}", self.model) as (deployment, worker, streams),
            ):
                fault = slurm.kill_node if how == "off" else lambda node: slurm.switch_cable(node, on=False)
                figures = worker.watch(lambda: fault("n4"), 120)  # noqa: B023 - called at once
                print(f"\na node {how}: on {','.join(deployment.nodes_of('agg-1'))}")
                show("launch", [figures])
                missed += undisturbed(streams)
            self.nodes[how] = figures.serving
            if self.warm is not None:
                limit = HEARTBEAT + 1.2 * self.warm
                missed += bound(
                    f"node {how}: serving in s, heartbeat timeout + 1.2 warm starts", figures.serving, limit
                )
            else:
                missed.append(f"node {how}: no bound without the warm start of kill")
        return missed

    def peer_node(self) -> list[str]:
        """The same for two batch jobs that Slurm requeues."""
        missed, variables = [], {}
        with cluster(6) as slurm:
            # one after the other: the first gets n1 and n2, the second n3 and n4
            for how in ("off", "cut"):
                folder = self.folder / f"batch-{how}"
                folder.mkdir()
                own = settings(slurm, self.model, folder / "engine.yaml", 0)
                own |= {"NUM_WORKERS": "1", "DYN_MPI_RUN_DIR": str(folder / "run")}
                script = folder / "job.sh"
                # the services and the job are there until Slurm ends them, as where nothing but Slurm watches the node
                script.write_text(f"#!/bin/bash\n{ROOT}/scripts/srun_aggregated.sh --skip-check\nsleep infinity\n")
                words = ("--requeue", "--exclusive", "--nodes=2", f"--output={folder}/log")
                done = slurm.sbatch(
                    *words,
                    "--open-mode=append",
                    "--gpus-per-node=4",
                    script,
                    env=own,
                    cwd=folder,
                )
                assert done.returncode == 0, done.stderr
                ready = folder / "run" / "ready" / "agg-0.json"
                eventually(ready.exists, f"{how}: it serves", 120)
                variables[how] = ready
            began = time.time()
            slurm.kill_node("n2")
            slurm.switch_cable("n4", on=False)
            print("\nsbatch --requeue, SlurmdTimeout 60 s")
            waiting = dict(variables)
            while waiting:
                for how, ready in list(waiting.items()):
                    with contextlib.suppress(OSError):
                        if ready.stat().st_mtime > began:
                            seconds = time.time() - began
                            print(f"  node {how}: serving again after {seconds:.1f} s", flush=True)
                            del waiting[how]
                            if how in self.nodes:
                                missed += bound(
                                    f"node {how}: serving by sbatch --requeue", self.nodes[how] / seconds, 0.2
                                )
                            else:
                                missed.append(f"node {how} by sbatch --requeue: no bound without node")
                assert time.time() < began + 600, (self.folder / "batch-off" / "log").read_text()
                time.sleep(0.05)
        return missed

    def staged(self) -> list[str]:
        """The load of a staged model after a rank was killed."""
        from dynamo_mpi.engines.reference.convert_gguf import export_model, find_default_gguf

        folder = self.folder / "share"
        model = export_model(find_default_gguf(), folder / "model")
        size = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
        rate = size / READ_SECONDS
        share = SlowShare(folder, rate, rate * MOUNT_SHARE, OPEN_SECONDS)
        path, mount = str(self.folder / "share.socket"), self.folder / "mount"
        mount.mkdir()
        with cluster(5) as slurm, socket.socket(socket.AF_UNIX) as listener, ExitStack() as mounts:
            listener.bind(path)
            listener.listen()
            share.serve(listener)
            program = Path(__file__).with_name("slow_share.py")
            for node in slurm.nodes:
                done = slurm.exec(sys.executable, program, path, mount, host=node)
                assert done.returncode == 0, done.stderr
                mounts.callback(slurm.exec, "umount", "--lazy", mount, host=node)
            with deployed(slurm, self.folder / "staged", mount / model.name, STAGE_DIR="/dev/shm") as (
                deployment,
                worker,
                streams,
            ):
                cold = load_seconds(worker.log)
                figures = worker.watch(lambda: deployment.kill("n4", signal.SIGKILL), 120)
                eventually(lambda: len(_READY.findall(worker.log.read_text())) == 2, "its line", 10)
                warm = load_seconds(worker.log)
                print(
                    f"\n{size / 1e6:.0f} MB staged at {rate / 1e6:.1f} MB/s for all nodes: stage and load {cold:.1f} s, again {warm:.1f} s"
                )
                show("launch", [figures])
                return [*bound("staged: warm load by the cold one", warm / cold, 0.2), *undisturbed(streams)]


def load_seconds(log: Path) -> float:
    """Return the seconds of staging and loading of a log's last start, as rank 0 prints them."""
    last = log.read_text(errors="replace").rpartition(VERDICT)[2]
    (spans,) = _READY.findall(last)
    load = float(dict(re.findall(r"(\w+) ([\d.]+) s", spans))["load"])
    # the line has no seconds where all nodes have the model already
    return load + sum(map(float, _STAGED.findall(last)))


def mean(figures: Sequence[Figures], name: str) -> float:
    """Return the mean of one of the figures."""
    return float(statistics.mean(getattr(each, name) for each in figures))


def show(title: str, figures: Sequence[Figures]) -> None:
    """Print figures."""
    listed = "; ".join(f"verdict {each.verdict:.1f} s, serving {each.serving:.1f} s" for each in figures)
    print(f"  {title}: {listed}", flush=True)


def main() -> int:
    """Run the parts; return 1 if a figure misses its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["kill", "node", "peer-node", "staged"]
    parser.add_argument("--only", nargs="*", default=[], choices=names)
    arguments = parser.parse_args()
    if reason := why_unavailable():
        print(f"no Slurm cluster: {reason}")
        return 2
    remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix="recovery-"))
    folder.chmod(0o700)
    try:
        bench = Bench(folder)
        parts = {"kill": bench.kill, "node": bench.node, "peer-node": bench.peer_node, "staged": bench.staged}
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs before the bench", flush=True)
        missed = [line for name in names if name in (arguments.only or names) for line in parts[name]()]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for line in missed:
        print(f"MISSED: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
