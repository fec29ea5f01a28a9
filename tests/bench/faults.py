# SPDX-License-Identifier: Apache-2.0
"""What a fault costs, in seconds, with our supervision and without it; prints tables in Markdown.

    python -m tests.bench.faults [--launchers mpirun srun] [--phases load serve drain] [--faults kill stop ...]

srun needs root on Debian: it builds a Slurm cluster in namespaces on this machine. Without us: plain mpi4py ranks in a collective,
and a plain Dynamo worker, whose keys in etcd outlive it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dynamo_mpi.engines.reference.model_files import export_model, find_default_gguf
from tests.conftest import find_mpirun, mpi_environment
from tests.dynamo.fault_runner import CODES as MPIRUN_CODES
from tests.dynamo.fault_runner import RANKS, MpirunFaults, mpirun_faults, program
from tests.dynamo.running import EtcdServer, eventually
from tests.fault_cases import CHILD, CHILD_CASES, CHILD_CODES, FAULTS, HEARTBEAT, PHASES, Case, Outcome
from tests.fault_traces import Keys, end_process, why_no_memory_limit
from tests.slurm.cluster.cluster import Cluster, why_unavailable
from tests.slurm.fault_runner import CODES as SRUN_CODES
from tests.slurm.fault_runner import RANKS_PER_NODE, SrunFaults, srun_faults
from tests.slurm.session import SlurmSession

HERE = Path(__file__).resolve().parent
PATIENCE_SECONDS = 15.0
NONE = "-"
PLAIN_FAULTS = ("kill", "stop", "exception", "exit0", "exit3")
WORKER_FAULTS = ("SIGKILL", "SIGSTOP")


def main() -> int:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", default=["mpirun", "srun"], choices=["mpirun", "srun"])
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
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        model = folder / "SmolLM2-135M-Instruct"
        export_model(find_default_gguf(), model)
        runners: dict[str, tuple[MpirunFaults | SrunFaults, int]] = {}
        slurm: SlurmSession | None = None
        for launcher in arguments.launchers:
            services = folder / launcher
            services.mkdir()
            if launcher == "mpirun":
                runners[launcher] = (stack.enter_context(mpirun_faults(services, model)), 1)
            elif reason := why_unavailable():
                note(f"no srun: {reason}")
            else:
                slurm = stack.enter_context(running_cluster(folder))
                runners[launcher] = (stack.enter_context(srun_faults(slurm, services, model)), 4)
        supervised(runners, arguments, folder)
        if not arguments.no_plain:
            plain_ranks(slurm, "mpirun" in arguments.launchers)
            plain_worker(folder, model)
    return 0


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[SlurmSession]:
    """Build a Slurm cluster, and take it down again."""
    cluster = Cluster.temporary()
    cluster.up(die_with_parent=True)
    try:
        yield SlurmSession(cluster, folder / "mpich")
    finally:
        cluster.down()


def supervised(
    runners: Mapping[str, tuple[MpirunFaults | SrunFaults, int]], arguments: argparse.Namespace, folder: Path
) -> None:
    """Print what follows a fault in a worker of ours."""
    print(f"\nWith our supervision (seconds after the fault; `--heartbeat-timeout {HEARTBEAT:g}`):\n")
    names = " | ".join(f"{name}: end | code | keys gone | as it has to be" for name in runners)
    print(f"| phase | fault | rank | {names} |\n|---|---|---|{'---|---|---|---|' * len(runners)}", flush=True)
    for phase in arguments.phases:
        for fault in arguments.faults:
            for rank in arguments.ranks:
                if rank == "child" and Case(fault, phase, CHILD, "trtllm") not in CHILD_CASES:
                    continue
                cells = [phase, fault, rank]
                for name, (runner, other) in runners.items():
                    case = Case(fault, phase, 0 if rank == "0" else other)
                    if rank == "child":
                        case = Case(fault, phase, CHILD, "trtllm")
                    cells += measure(runner, case, folder / f"{name}-{case}")
                print("| " + " | ".join(cells) + " |", flush=True)


def measure(runner: MpirunFaults | SrunFaults, case: Case, folder: Path) -> list[str]:
    """Return a case's cells."""
    if case.fault == "oom" and why_no_memory_limit():
        return [NONE] * 4
    folder.mkdir()
    try:
        outcome = runner.run(case, folder)
    except AssertionError as error:
        note(f"{case}: {error}")
        return ["not measured", NONE, NONE, NONE]
    codes = CHILD_CODES if case.rank == CHILD else MPIRUN_CODES if isinstance(runner, MpirunFaults) else SRUN_CODES
    host = os.uname().nodename if isinstance(runner, MpirunFaults) else runner.host(max(0, case.rank))
    verdict = "yes"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            outcome.check(host, codes[case.fault])
    except (AssertionError, ValueError) as error:
        verdict = "no"
        note(f"{case}: {str(error).splitlines()[0]}")
    end = f"{outcome.seconds:.1f}" if outcome.code is not None else "hang"
    return [end, str(outcome.code if outcome.code is not None else NONE), keys_cell(outcome), verdict]


def keys_cell(outcome: Outcome) -> str:
    """Return when the keys were gone."""
    if outcome.keys_seconds == float("inf"):
        return "with the lease"
    return f"{outcome.keys_seconds:.1f}"


def plain_ranks(slurm: SlurmSession | None, mpirun: bool) -> None:
    """Print what follows a fault in ranks without us."""
    launchers: dict[str, Callable[[str], subprocess.Popen[str]]] = {}
    if mpirun:
        launchers["mpirun"] = start_under_mpirun
    if slurm is not None:
        launchers["srun"] = lambda fault: start_under_srun(slurm, fault)
        launchers["srun --kill-on-bad-exit=1"] = lambda fault: start_under_srun(slurm, fault, "--kill-on-bad-exit=1")
    names = " | ".join(f"{name}: end | code" for name in launchers)
    print(f"\nPlain mpi4py ranks in a collective (over {PATIENCE_SECONDS:g} s is a hang):\n")
    print(f"| fault in one rank | {names} |\n|---|{'---|---|' * len(launchers)}", flush=True)
    for fault in PLAIN_FAULTS:
        cells = [fault]
        for start in launchers.values():
            cells += time_the_end(start(fault))
        print("| " + " | ".join(cells) + " |", flush=True)
    if slurm is not None:
        slurm.exec("scancel", "--name=plain-ranks")


def start_under_mpirun(fault: str) -> subprocess.Popen[str]:
    """Start as many plain ranks as a worker has under mpirun."""
    command = [find_mpirun(), "-n", str(RANKS), sys.executable, str(HERE / "plain_ranks.py"), fault, "1"]
    return subprocess.Popen(
        command, env=mpi_environment(), text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def start_under_srun(slurm: SlurmSession, fault: str, *options: str) -> subprocess.Popen[str]:
    """Start as many plain ranks as a worker has under srun."""
    placed = ("--job-name=plain-ranks", "--mpi=pmix", "--nodes=2", f"--ntasks-per-node={RANKS_PER_NODE}")
    command = ("srun", *placed, *options, sys.executable, str(HERE / "plain_ranks.py"), fault, "4")
    return slurm.popen(*command, env={**slurm.debian_openmpi_env, "OMPI_MCA_mpi_yield_when_idle": "1"})


def time_the_end(process: subprocess.Popen[str]) -> list[str]:
    """Return seconds from the fault to the launcher's end, and its code; end what hangs."""
    assert process.stderr is not None
    for line in process.stderr:
        if "fault: now" in line:
            break
    begin = time.monotonic()
    try:
        process.communicate(timeout=PATIENCE_SECONDS)
        return [f"{time.monotonic() - begin:.1f}", str(process.returncode)]
    except subprocess.TimeoutExpired:
        for number in (signal.SIGTERM, signal.SIGKILL):
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=10)
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


def note(text: str) -> None:
    """Say something beside the tables."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
