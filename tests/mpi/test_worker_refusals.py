# SPDX-License-Identifier: Apache-2.0
"""What a worker refuses, over real mpirun: the launcher's exit code, and one report that says what to do."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Mpirun, find_mpirun, mpi_environment, run_command
from tests.servers import closed_port, listening, running_etcd
from tests.unit.models import SMOLLM2
from tests.unit.recordings import ranks_of

pytestmark = pytest.mark.mpi

# what it maps itself: other worlds come and go on this machine meanwhile
_LEFT_BY_A_LONE_RANK = """
from dynamo_mpi.mpi.world import load_mpi_library, init_mpi
load_mpi_library()
init_mpi(alone=True)
print([line for line in open("/proc/self/maps") if "/dev/shm/" in line and "(deleted)" not in line])
"""
PROGRAMS = Path(__file__).with_name("programs")
Done = subprocess.CompletedProcess[str]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder with as much as the preflight reads: 9 heads, 3 KV heads."""
    return make_model(tmp_path / "model")


def make_model(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SMOLLM2 | changes))
    (folder / "model.safetensors").touch()
    return folder


def mpirun_each(*ranks: tuple[Path, list[str]]) -> Done:
    """Start one world of workers, each with a working folder and a command line of its own."""
    command = [find_mpirun()]
    for folder, arguments in ranks:
        command += [":"] * (len(command) > 1)
        command += ["-n", "1", "-wdir", str(folder), sys.executable, "-m", "dynamo_mpi.worker", *arguments]
    return run_command(command, env=mpi_environment(), timeout=60)


def reports(done: Done) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("dynamo_mpi: ")]


def assert_refused(done: Done, code: int, *words: str) -> None:
    """Check the launcher's exit code, and that rank 0 alone has spoken, once, without a traceback."""
    assert done.returncode == code, done.stderr
    assert len(reports(done)) == 1, done.stderr
    assert reports(done)[0].startswith("dynamo_mpi: rank 0 on ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr


def test_an_illegal_layout(mpirun: Mpirun, model: Path) -> None:
    done = mpirun.worker(2, "--model", str(model), "--tp-size", "2")
    assert_refused(done, 78, "B1", "B3", "one of 1, 3 ", "nothing was loaded")


def test_a_world_of_another_size(mpirun: Mpirun, model: Path) -> None:
    done = mpirun.worker(2, "--model", str(model), "--tp-size", "3")
    assert_refused(done, 64, "A1", "needs 3 ranks", "there are 2")


def test_a_missing_model(mpirun: Mpirun, tmp_path: Path) -> None:
    assert_refused(mpirun.worker(2, "--model", str(tmp_path / "absent")), 66, "there is no model at ", "absent")


def test_bad_yaml(mpirun: Mpirun, model: Path, tmp_path: Path) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text("tensor_parallel_size: [")
    done = mpirun.worker(2, "--model", str(model), "--engine-config", str(config))
    assert_refused(done, 65, "engine.yaml is not YAML")


def test_an_unknown_flag(mpirun: Mpirun, model: Path) -> None:
    assert_refused(mpirun.worker(2, "--model", str(model), "--modle"), 64, "--modle", "--help")


def test_an_engine_config_that_differs_on_one_rank(model: Path, tmp_path: Path) -> None:
    for name, size in (("a", 3), ("b", 9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "engine.yaml").write_text(f"# sizes\ntensor_parallel_size: {size}\n")
    arguments = ["--model", str(model), "--engine-config", "engine.yaml"]
    done = mpirun_each((tmp_path / "a", arguments), (tmp_path / "b", arguments), (tmp_path / "a", arguments))
    assert_refused(done, 65, "P2", "rank 1 on ", "line 2", "tensor_parallel_size: 9", "tensor_parallel_size: 3")


@pytest.mark.landing("nothing-No such file")
@pytest.mark.parametrize(("make", "words"), [("nothing", "No such file"), ("folder", "Is a directory")])
def test_an_engine_config_that_one_rank_cannot_read(model: Path, tmp_path: Path, make: str, words: str) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "engine.yaml").write_text("tensor_parallel_size: 3\n")
    if make == "folder":
        (tmp_path / "b" / "engine.yaml").mkdir()
    arguments = ["--model", str(model), "--engine-config", "engine.yaml"]
    done = mpirun_each((tmp_path / "a", arguments), (tmp_path / "b", arguments), (tmp_path / "b", arguments))
    assert_refused(done, 65, "P2", "ranks 1-2 on ", "engine.yaml can't be read", words)


def test_a_model_that_differs_on_one_rank(tmp_path: Path) -> None:
    make_model(tmp_path / "a" / "model")
    make_model(tmp_path / "b" / "model", vocab_size=1)
    make_model(tmp_path / "c" / "model")
    (tmp_path / "c" / "model" / "model.safetensors").unlink()
    arguments = ["--model", "model", "--tp-size", "3"]
    done = mpirun_each(*((tmp_path / name, arguments) for name in "abc"))
    assert_refused(done, 66, "P3", "rank 1 on ", "rank 2 on ", "vocab_size", "lacks 1 of 1 weight files", "2 errors")


def test_unlike_command_lines(model: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(model), "--tp-size", "3"]
    done = mpirun_each((tmp_path, arguments), (tmp_path, arguments), (tmp_path, [*arguments, "--max-seq-len", "7"]))
    assert_refused(done, 64, "P1", "rank 2 on ", "--max-seq-len 7")


@pytest.fixture(scope="module")
def etcd() -> Iterator[str]:
    with running_etcd() as url:
        yield url


def test_etcd_absent(mpirun: Mpirun, model: Path) -> None:
    with closed_port() as port:
        start = time.monotonic()
        done = mpirun.worker(
            3, "--model", str(model), "--tp-size", "3", env={"ETCD_ENDPOINTS": f"http://127.0.0.1:{port}"}
        )
        assert time.monotonic() - start < 3 + 15
    assert done.returncode == 69
    verdict, error = reports(done)
    assert "preflight: ok" in verdict
    assert "etcd does not answer" in error
    assert f"127.0.0.1:{port}" in error


def test_etcd_that_never_answers_is_waited_for_as_long_as_was_said(mpirun: Mpirun, model: Path) -> None:
    with listening() as port:
        start = time.monotonic()
        done = mpirun.worker(
            1, "--model", str(model), "--probe-timeout", "1", env={"ETCD_ENDPOINTS": f"http://127.0.0.1:{port}"}
        )
        assert 1 < time.monotonic() - start < 1 + 15
    assert done.returncode == 69
    assert "no answer in time" in done.stderr
    assert "within 1 s" in done.stderr


@pytest.mark.parametrize(
    ("user", "code", "said"),
    [
        ("", 69, "NATS does not answer"),
        ("me:hunter2@", 64, "NATS_SERVER holds credentials, which Dynamo's runtime does not read"),
    ],
)
def test_nats_absent_where_the_runtime_would_connect_to_it(
    user: str, code: int, said: str, mpirun: Mpirun, model: Path, etcd: str
) -> None:
    with closed_port() as port:
        done = mpirun.worker(
            3,
            *("--model", str(model), "--tp-size", "3"),
            env={"ETCD_ENDPOINTS": etcd, "NATS_SERVER": f"nats://{user}127.0.0.1:{port}"},
        )
    assert done.returncode == code
    assert len(reports(done)) == 2
    assert said in reports(done)[1]
    assert "hunter2" not in done.stderr + done.stdout


@pytest.mark.landing("--help")
@pytest.mark.parametrize("flag", ["--help", "-h", "--version"])
def test_help_is_shown_once(mpirun: Mpirun, flag: str) -> None:
    done = mpirun.worker(2, "--model", "/nowhere", flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("dynamo_mpi") >= 1
    assert done.stdout.count("usage: ") == (0 if flag == "--version" else 1)
    assert len(done.stdout.splitlines()) == 1 or flag != "--version"


@pytest.mark.landing("3")
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_preflight_alone_stops_after_its_verdict(mpirun: Mpirun, model: Path, ranks: int) -> None:
    """Without etcd: a batch script checks its layout before it starts anything."""
    done = mpirun.worker(ranks, "--model", str(model), "--tp-size", str(ranks), "--preflight-only")
    assert_refused(done, 0, "preflight: ok", "LlamaForCausalLM", f"tp {ranks}", f"{ranks} rank")


def alone(environment: dict[str, str]) -> Done:
    """Start a worker without a launcher, as ``srun`` without an MPI plugin does."""
    command = [sys.executable, "-m", "dynamo_mpi.worker", "--model", "/nowhere"]
    return run_command(command, env={**mpi_environment(), **environment}, timeout=60)


def test_singletons_under_srun_are_refused_by_rank_0_alone() -> None:
    first, second = (alone(environment) for environment in ranks_of("srun_without_mpi")[:2])
    assert_refused(first, 64, "4 tasks", "srun --mpi=pmix")
    assert (second.returncode, second.stdout, second.stderr) == (64, "", "")


def test_a_batch_script_that_forgot_srun_is_reported() -> None:
    assert_refused(alone(ranks_of("sbatch_shell")[0]), 64, "without srun", "srun --mpi=pmix -n 4")


def test_a_rank_without_a_launcher_leaves_no_shared_memory() -> None:
    """Only the rank itself removes its segment."""
    command = [sys.executable, "-c", _LEFT_BY_A_LONE_RANK]
    done = run_command(command, env=mpi_environment(), timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n")


def test_mpi_that_cannot_be_loaded_is_no_traceback() -> None:
    assert_refused(alone({"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}), 64, "mpi4py can't be used", "MPI4PY_LIBMPI")


ALLOWED_BEFORE_THE_VERDICT = {
    # in C
    "_socket",
    "atexit",
    "binascii",
    "errno",
    "gc",
    "math",
    "signal",
}


def test_followers_import_next_to_nothing_before_the_verdict(mpirun: Mpirun, model: Path, tmp_path: Path) -> None:
    done = mpirun(
        3,
        PROGRAMS / "modules_before_verdict.py",
        str(tmp_path),
        "--model",
        str(model),
        "--tp-size",
        "3",
        "--preflight-only",
    )
    assert done.returncode == 0, done.stderr
    imported = {rank: set((tmp_path / str(rank)).read_text().split()) for rank in range(3)}
    assert {"dynamo_mpi.runtime.leader", "dynamo_mpi.layout.report"} <= imported[0]
    for rank in (1, 2):
        foreign = {name for name in imported[rank] if not name.startswith("dynamo_mpi")}
        assert foreign - ALLOWED_BEFORE_THE_VERDICT == set()
        ours = {name for name in imported[rank] if name.startswith("dynamo_mpi")}
        assert "dynamo_mpi.runtime.follower" in ours
        assert not ours & {"dynamo_mpi.runtime.leader", "dynamo_mpi.config.worker", "dynamo_mpi.layout.report"}
        # each is a file to open on every rank of a world of hundreds
        assert len(ours) <= 24, sorted(ours)


@pytest.mark.landing("not allowed")
@pytest.mark.parametrize(
    ("fault", "allowed", "word"),
    [
        ("rank1:load:kill", "", "DYN_MPI_ALLOW_FAULTS=1"),
        ("rank1:lunch:kill", "1", "rankN:PHASE:ACTION"),
        ("rank2:load:kill", "1", "there is no rank 2"),
    ],
    ids=["not allowed", "no fault", "no such rank"],
)
def test_a_fault_on_demand_that_can_not_be(mpirun: Mpirun, fault: str, allowed: str, word: str) -> None:
    done = mpirun.worker(2, env={"DYN_MPI_FAULT": fault, "DYN_MPI_ALLOW_FAULTS": allowed})
    assert_refused(done, 64, word)


@pytest.mark.serial  # on a busy machine, Open MPI 5's mpirun may drop output of ranks that it ends
def test_a_fault_on_demand_is_announced_and_happens_in_its_rank_alone(mpirun: Mpirun, model: Path) -> None:
    fault = {"DYN_MPI_FAULT": "rank1:preflight:exception", "DYN_MPI_ALLOW_FAULTS": "1"}
    done = mpirun.worker(2, "--model", str(model), "--tp-size", "1", "--pp-size", "2", "--preflight-only", env=fault)
    assert done.returncode == 70, done.stderr
    assert len(reports(done)) == 3, done.stderr
    warning, happens, report = reports(done)
    assert "rank 0 on " in warning
    assert warning.endswith("warning: a fault is armed (DYN_MPI_FAULT): rank 1 raises an exception in preflight")
    assert "rank 1 on " in happens
    assert happens.endswith("fault: exception in preflight")
    assert "error in preflight: Traceback" in report
    assert done.stderr.count("FaultError: a fault on demand, in preflight") == 1


def test_a_fault_that_is_empty_is_none(mpirun: Mpirun, model: Path) -> None:
    done = mpirun.worker(1, "--model", str(model), "--tp-size", "1", "--preflight-only", env={"DYN_MPI_FAULT": ""})
    assert done.returncode == 0, done.stderr
