# SPDX-License-Identifier: Apache-2.0
"""Workers with ``--cache``: real ranks under mpirun, whose engine, the stand-in, keeps kernels as Triton and tactics as the autotuner."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.dynamo.running import EtcdServer, RunningWorker, terminate, worker_starter
from tests.namespaces.processes import all_pids

pytestmark = pytest.mark.dynamo
RANKS, KERNELS = 3, 4
Start = Callable[..., RunningWorker]


@pytest.fixture
def start(tmp_path: Path, etcd: EtcdServer, small_model_dir: Path, temporary: Path) -> Iterator[Start]:
    """Start TensorRT-LLM's workers with one archive folder."""
    usual = {
        # other tests set it, to keep out of the home directory
        "TRTLLM_CACHE_DIR": "",
        "DYN_MPI_CACHE": str(tmp_path / "shared"),
        "STANDIN_TRTLLM_KERNELS": str(KERNELS),
    }
    with worker_starter(tmp_path, etcd, small_model_dir, temporary, **usual) as begin:
        yield partial(begin, engine="trtllm")


def variables(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return []


def await_text(worker: RunningWorker, pattern: str) -> str:
    end = time.monotonic() + 120
    while (found := re.search(pattern, worker.text())) is None:
        assert time.monotonic() < end, worker.text()
        time.sleep(0.05)
    return found.group()


def kernels(worker: RunningWorker) -> list[tuple[int, int, int, str]]:
    """Return of each rank: its number, the kernels that it loaded and made, what it did about tactics."""
    found = re.findall(r"stand-in kernels: rank (\d+) loaded (\d+), made (\d+), ([a-z ]+), in", worker.text())
    return sorted((int(rank), int(loaded), int(made), tactics) for rank, loaded, made, tactics in found)


def archive_of_a_first_start(tmp_path: Path, start: Start) -> Path:
    """Start a worker, which compiles, and end it; return the archive that it has written."""
    first = start()
    first.ready()
    await_text(first, "written back to ")
    terminate(first)
    (archive,) = (tmp_path / "shared" / f"dynamo-mpi-{os.geteuid()}").iterdir()
    return archive


COLD = [(rank, 0, KERNELS, "tuned") for rank in range(RANKS)]
SEEDED = [(rank, KERNELS, 0, "tactics loaded") for rank in range(RANKS)]


def test_the_first_start_compiles_the_second_doesn_t_and_nothing_is_left(
    tmp_path: Path, temporary: Path, etcd: EtcdServer, start: Start
) -> None:
    first = start()
    first.ready()
    assert kernels(first) == COLD
    assert "caches: none yet for this engine, GPU, model and layout" in first.text()
    # each kernel is two files, and there is one of tactics
    await_text(first, rf"caches: {RANKS * (2 * KERNELS + 1)} new files; written back to ")
    terminate(first)
    assert [name for name in os.listdir(temporary) if "caches" in name] == []
    (archive,) = (tmp_path / "shared" / f"dynamo-mpi-{os.geteuid()}").iterdir()
    assert len(list(archive.glob("*.tar"))) == RANKS
    # the next one's folders are elsewhere: Triton's lists have absolute paths
    (temporary / "other").mkdir()
    second = start(TMPDIR=str(temporary / "other"))
    ready = second.ready()
    assert kernels(second) == SEEDED
    assert ready["phases"]["stage"] < 20
    assert f"caches: seeded from {archive}: {2 * KERNELS + 1} files a rank" in second.text()
    await_text(second, "caches: nothing new was compiled")
    record = etcd.worlds()[0].caches
    assert record is not None
    assert (record["seeded"], record["files"], record["new_files"]) == (True, 2 * KERNELS + 1, 0)
    # rank 0's child has rank 0's folders
    (child,) = [
        words
        for pid in all_pids()
        if f"DYN_MPI_CACHE={tmp_path}/shared" in (words := variables(pid)) and "TLLM_SPAWN_PROXY_PROCESS=1" in words
    ]
    assert [word for word in child if re.fullmatch(r"TRITON_CACHE_DIR=.*/other/dynamo-mpi-caches-.*-r0/triton", word)]
    third = start("--component", "third", STANDIN_TRTLLM_KERNELS=str(KERNELS + 1), TMPDIR=str(temporary / "other"))
    third.ready()
    # beside the second worker: folders of its own, seeded, and not written back
    assert [each[:3] for each in kernels(third)] == [(rank, KERNELS, 1) for rank in range(RANKS)]
    assert "-s1/" in third.text() and "-s1/" not in second.text()
    terminate(second)
    terminate(third)
    assert "written back" not in third.text()
    assert [name for name in os.listdir(temporary / "other") if "caches" in name] == []


@pytest.mark.full
def test_another_layout_is_another_archive(tmp_path: Path, start: Start) -> None:
    first = start("--tensor-parallel-size", "3")
    first.ready()
    await_text(first, "written back to ")
    terminate(first)
    other = start("--tensor-parallel-size", "1", "--pipeline-parallel-size", "3")
    other.ready()
    assert kernels(other) == COLD
    await_text(other, "written back to ")
    assert len(list((tmp_path / "shared" / f"dynamo-mpi-{os.geteuid()}").iterdir())) == 2
    terminate(other)


def test_one_rank_s_file_that_is_bad_starts_all_ranks_cold_and_is_replaced(tmp_path: Path, start: Start) -> None:
    archive = archive_of_a_first_start(tmp_path, start)
    bad = sorted(archive.glob("*.tar"))[0]
    with bad.open("r+b") as file:
        file.seek(bad.stat().st_size // 2)
        file.write(b"other code")
    second = start()
    second.ready()
    # the autotuner of a rank that has no tactics would wait for those that have some
    assert kernels(second) == COLD
    assert second.text().count("compile caches are not seeded") == 1
    assert "other bytes than its index says" in second.text()
    await_text(second, "written back to ")
    terminate(second)
    third = start()
    third.ready()
    assert kernels(third) == SEEDED
    terminate(third)


def test_tactics_of_some_ranks_are_not_an_archive_and_leave_no_file(tmp_path: Path, start: Start) -> None:
    first = start(STANDIN_TRTLLM_TORN_TACTICS="1")
    first.ready()
    await_text(first, "compile caches are not written back, the next start compiles again: ")
    assert "autotuner/cache.json is missing or not whole on rank 1, not on the others\n" in first.text()
    terminate(first)
    (archive,) = (tmp_path / "shared" / f"dynamo-mpi-{os.geteuid()}").iterdir()
    assert os.listdir(archive) == []
    # seeded from what the ranks had, those with tactics would wait for rank 1 for ever
    second = start()
    second.ready()
    assert kernels(second) == COLD
    await_text(second, "written back to ")
    terminate(second)
    assert len(list(archive.glob("*.tar"))) == RANKS


def test_an_archive_with_which_a_start_failed_is_not_used_for_the_next_one(tmp_path: Path, start: Start) -> None:
    first = start()
    first.ready()
    await_text(first, "written back to ")
    terminate(first)
    failed = start(DYN_MPI_FAULT="rank1:load:kill", DYN_MPI_ALLOW_FAULTS="1")
    assert failed.wait() != 0
    # rank 0 may be ended before it logs that it is seeded
    (archive,) = (tmp_path / "shared" / f"dynamo-mpi-{os.geteuid()}").iterdir()
    assert len(list(archive.glob(".begun-*"))) == 1
    # a worker that is started again, by whatever started it
    again = start(DYN_MPI_ATTEMPT="2")
    again.ready()
    assert kernels(again) == COLD
    assert "start 2 of this worker; the one before may have failed with the archive in" in again.text()
    assert "caches: none yet" not in again.text()
    await_text(again, "written back to ")
    terminate(again)
    # it has served: what is restarted after that is seeded
    third = start(DYN_MPI_ATTEMPT="3")
    third.ready()
    assert kernels(third) == SEEDED
    await_text(third, "caches: nothing new was compiled")
    terminate(third)
    assert list(archive.glob(".begun*")) == []
    fourth = start(DYN_MPI_ATTEMPT="4")
    fourth.ready()
    assert kernels(fourth) == SEEDED
    terminate(fourth)


@pytest.mark.full
def test_an_archive_that_others_can_write_is_refused_and_left_as_it_is(tmp_path: Path, start: Start) -> None:
    archive = archive_of_a_first_start(tmp_path, start)
    archive.chmod(0o770)
    before = sorted(os.listdir(archive))
    second = start()
    second.ready()
    assert kernels(second) == COLD
    assert f"{archive} is a folder that others can write (mode 0770)\n" in second.text()
    assert f"  fix:      chmod 700 {archive}\n" in second.text()
    terminate(second)
    assert sorted(os.listdir(archive)) == before


@pytest.mark.full
def test_a_user_s_own_variable_wins(tmp_path: Path, temporary: Path, start: Start) -> None:
    worker = start(TRITON_CACHE_DIR=str(tmp_path / "mine"))
    worker.ready()
    assert worker.text().count("TRITON_CACHE_DIR is set: Triton's compile cache is left alone") == 1
    assert {path.name[:6] for path in (tmp_path / "mine").iterdir()} == {"KERNEL"}
    await_text(worker, f"caches: {RANKS} new files; written back to ")
    terminate(worker)
    assert (tmp_path / "mine").exists()


@pytest.mark.parametrize("moment", ["rank1:load:kill", "rank0:load:kill", "rank1:stage:kill", "rank2:serve:kill"])
@pytest.mark.landing("rank1:load:kill")
def test_a_killed_rank_leaves_nothing_on_its_node(temporary: Path, start: Start, moment: str) -> None:
    worker = start(DYN_MPI_FAULT=moment, DYN_MPI_ALLOW_FAULTS="1")
    assert worker.wait() != 0
    end = time.monotonic() + 10
    while left := [str(path) for path in temporary.rglob("*") if "caches" in str(path)]:
        assert time.monotonic() < end, left
        time.sleep(0.1)


def test_the_reference_engine_has_none(start: Start, tmp_path: Path, etcd: EtcdServer, small_model_dir: Path) -> None:
    words = ("--engine", "reference", "--tensor-parallel-size", "3", "--cache", str(tmp_path / "shared"))
    worker = RunningWorker(tmp_path, etcd, small_model_dir, RANKS, *words, name="reference")
    try:
        worker.ready()
        assert "--cache (DYN_MPI_CACHE) has no effect: the reference engine compiles nothing" in worker.text()
        terminate(worker)
    finally:
        worker.stop()
    assert not (tmp_path / "shared").exists()
