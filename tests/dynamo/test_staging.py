# SPDX-License-Identifier: Apache-2.0
"""Workers that load a copy of the model: one copy on a node for all, and none where it can't be made."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.stage.manifest import scan
from dynamo_mpi.stage.store import LOCK, PARTIAL, Store
from tests.dynamo.running import (
    EtcdServer,
    RunningWorker,
    eventually,
    running_frontend,
    system_port,
    terminate,
    worker_starter,
)
from tests.dynamo.test_refused_requests import post
from tests.namespaces.processes import all_pids, command_line

pytestmark = pytest.mark.dynamo
Start = Callable[..., RunningWorker]


@pytest.fixture
def model(tmp_path: Path, model_dir: Path) -> Path:
    """A model of the test's own, with the name that the served one has."""
    return Path(shutil.copytree(model_dir, tmp_path / "own" / model_dir.name))


@pytest.fixture
def start(tmp_path: Path, etcd: EtcdServer, model: Path, temporary: Path) -> Iterator[Start]:
    """Start workers that stage below ``tmp_path / "local"``."""
    with worker_starter(tmp_path, etcd, model, temporary, DYN_MPI_STAGE=str(tmp_path / "local")) as begin:
        yield begin


@pytest.mark.landing("reference")
@pytest.mark.parametrize("engine", ["reference", "trtllm"])
def test_two_workers_and_the_next_start_use_one_copy(
    engine: str, tmp_path: Path, model: Path, etcd: EtcdServer, start: Start
) -> None:
    store, name = Store(str(tmp_path / "local")), scan(str(model)).folder_name
    first, second = start(engine=engine), start("--component", "other", engine=engine)
    ready = [first.ready(), second.ready()]
    assert all(each["phases"]["stage"] >= 0 for each in ready)
    (entry,) = store.entries()
    assert (entry.name, entry.complete, entry.in_use) == (name, True, True)
    records = [record.stage for record in etcd.worlds()]
    assert {record["path"] for record in records if record} == {store.copy_path(name)}
    read = sorted(record["read_bytes"] for record in records if record)
    assert read == [0, scan(str(model)).size], (first.text(), second.text())
    if engine == "trtllm":
        children = [
            words for words in map(command_line, all_pids()) if "dynamo.trtllm" in words and str(model) in words
        ]
        child = children[0]
        # the engine gets the copy, and Dynamo registers the folder that the frontend can read
        assert json.loads(child[child.index("--override-engine-args") + 1]) == {"model": store.copy_path(name)}
        assert child[child.index("--model") + 1] == str(model)
    assert not store.remove(name)
    terminate(first)
    terminate(second)
    third = start(engine=engine)
    assert third.ready()["phases"]["stage"] < 1.0
    assert "had the model already" in third.text()
    terminate(third)
    assert store.remove(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="hides folders from the frontend, in a mount namespace")
@pytest.mark.landing("reference-folder")
@pytest.mark.parametrize("files", ["folder", "url"])
@pytest.mark.parametrize("engine", ["reference", "trtllm"])
def test_a_frontend_that_sees_no_copy_answers(
    engine: str, files: str, tmp_path: Path, model: Path, etcd: EtcdServer, start: Start
) -> None:
    """It reads the model's own folder, or gets the files from the worker's URL."""
    hidden, variables = [tmp_path / "local"], {}
    if files == "url":
        hidden.append(model.parent)
        variables["DYN_SYSTEM_PORT"] = str(system_port())
    worker = start(engine=engine, **variables)
    worker.ready()
    with running_frontend(tmp_path, etcd, hidden=hidden) as frontend:
        eventually(frontend.models, "the model is listed")
        body = {"model": model.name, "prompt": "Hello", "max_tokens": 3}
        reply = post(frontend.port, "completions", body)
        assert reply.status == 200, reply
    assert Store(str(tmp_path / "local")).entries()[0].in_use
    terminate(worker)


def test_where_it_can_t_be_staged_the_worker_loads_the_original_and_says_why(
    tmp_path: Path, model: Path, start: Start
) -> None:
    (model / "more.json").symlink_to("/etc/hostname")
    worker = start()
    worker.ready()
    assert worker.text().count("warning: the model is not staged") == 1
    assert "more.json is a link that leaves the model's folder, to /etc/hostname" in worker.text()
    (model / "more.json").unlink()
    (tmp_path / "local").touch()
    other = start("--component", "other")
    other.ready()
    assert other.text().count("warning: the model is not staged") == 1
    assert f"{tmp_path / 'local'} can't be used: Not a directory" in other.text()
    terminate(worker)
    terminate(other)


def test_refused_hardware_leaves_no_part_of_a_copy(tmp_path: Path, model: Path, start: Start) -> None:
    # sparse, and long to copy with one reader
    with (model / "extra.dat").open("wb") as file:
        file.truncate(4 << 30)
    words = ("--probe", "fabric", "--probe-strict", "--stage-readers", "1")
    worker = start(*words, DYN_MPI_FAULT="rank1:hardware_check:corrupt", DYN_MPI_ALLOW_FAULTS="1")
    assert worker.wait() == ExitCode.TEMPORARY, worker.text()
    local = tmp_path / "local" / f"dynamo-mpi-{os.geteuid()}"
    assert [each for each in os.listdir(local) if not each.startswith(LOCK)] == []


def test_a_killed_rank_leaves_nothing_half_visible_and_the_next_start_goes_on(
    tmp_path: Path, model: Path, start: Start
) -> None:
    name = scan(str(model)).folder_name
    worker = start(DYN_MPI_FAULT="rank1:stage:kill", DYN_MPI_ALLOW_FAULTS="1")
    assert worker.wait() != 0
    local = tmp_path / "local" / f"dynamo-mpi-{os.geteuid()}"
    visible = [each for each in os.listdir(local) if not each.startswith(".")]
    # it may have been complete before the rank was killed
    assert visible in ([], [name])
    second = start()
    second.ready()
    assert not [each for each in os.listdir(local) if each.startswith(PARTIAL)]
    assert Store(str(tmp_path / "local")).is_complete(scan(str(model)), digests=True)
    terminate(second)
