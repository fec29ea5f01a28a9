# SPDX-License-Identifier: Apache-2.0
"""``--stage auto``: only with a folder of the site's on each node's disk, and only where several nodes would read a shared file system."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.hooks import WorkerHooks
from dynamo_mpi.config.sources import WorkerSources
from dynamo_mpi.config.worker import load_settings
from dynamo_mpi.runtime.engine_choice import describe_read_ahead
from dynamo_mpi.runtime.leader_staging import LeaderStaging, settings_to_only_stage
from dynamo_mpi.stage import site
from dynamo_mpi.stage.file_system import file_system_type
from dynamo_mpi.stage.plan import StagePlan
from dynamo_mpi.stage.site import SiteFolder, site_folder


class Lines(list[str]):
    """A log."""

    def info(self, text: str, *_: object) -> None:
        self.append(text)

    def warning(self, text: str) -> None:
        self.append(f"warning: {text}")


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir(0o700)
    return folder


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model on a shared file system, as the system would say."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")

    def kind(path: str) -> str:
        return "nfs4" if str(path).startswith(str(folder)) else file_system_type(path)

    monkeypatch.setattr(site, "file_system_type", kind)
    return folder


@pytest.fixture
def in_memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def plan(model: Path, *flags: str, hosts: tuple[str, ...] = ("n1", "n2"), read_ahead: str = "") -> tuple[str, Lines]:
    """Return what rank 0 plans, and what it logs."""
    settings = load_settings(WorkerSources(["--engine", "reference", "--model", str(model), *flags], {}))
    log = Lines()
    context: Any = SimpleNamespace(world=None, phases=None, log=log)
    reports: Any = [SimpleNamespace(host=host) for host in hosts]
    staging = LeaderStaging(context, settings, WorkerHooks(lambda _: None))
    return staging.plan(reports, "", read_ahead), log


def test_a_folder_of_this_user_on_a_disk_is_taken(scratch: Path) -> None:
    assert site_folder({}) is None
    assert site_folder({"TMPDIR": str(scratch)}) is None
    for variable in site.VARIABLES:
        assert site_folder({variable: str(scratch)}) == SiteFolder(str(scratch), variable)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda path: path.chmod(0o770), "can be written by others"),
        (lambda path: path.rmdir(), "can't be used: No such file or directory"),
        (lambda path: (path.rmdir(), path.touch()), "is no folder"),
    ],
)
def test_other_folders_are_not(scratch: Path, change: Any, problem: str) -> None:
    change(scratch)
    assert site_folder({"SLURM_TMPDIR": str(scratch)}) == SiteFolder(str(scratch), "SLURM_TMPDIR", problem)


def test_another_user_s_folder_memory_and_shared_file_systems_are_not(
    scratch: Path, in_memory: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert site.problem_of(str(in_memory)) == "is in memory"
    assert site.problem_of(str(model)) == "is on a shared file system (nfs4)"
    assert site.problem_of("scratch") == "is no absolute path"
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert site.problem_of(str(scratch)) == f"belongs to user {scratch.stat().st_uid}"


def test_only_staging_refuses_a_folder_that_auto_would_not_take(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load_settings(WorkerSources(["--only-stage", "--model", "m"], {}))
    monkeypatch.setenv("SLURM_TMPDIR", str(scratch))
    assert settings_to_only_stage(settings).stage == str(scratch)
    assert main(["stage"]) == 0
    scratch.chmod(0o777)
    problem = f"SLURM_TMPDIR ({scratch}) can be written by others"
    with pytest.raises(UsageError) as refused:
        settings_to_only_stage(settings)
    assert str(refused.value).startswith(problem)
    for words in ([], ["m", "--dry-run"], ["--unstage", "all"]):
        assert main(["stage", *words]) == 64
        assert problem in capsys.readouterr().err
    # who names it decides
    assert main(["stage", "m", "--dry-run", "--stage", str(scratch)]) == 0


def test_several_nodes_stage_to_the_site_s_folder(scratch: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_SCRATCH", str(scratch))
    packed, log = plan(model)
    made = StagePlan.unpack(packed)
    assert (made.folder, made.auto) == (str(scratch), True)
    assert log == [
        f"stage: the 2 nodes copy the model to {scratch} (LOCAL_SCRATCH), as each would read it from nfs4; "
        "--stage none leaves that out"
    ]
    assert plan(model, "--stage", "none") == ("", [])
    assert plan(model, hosts=("n1", "n1")) == ("", [])
    made = StagePlan.unpack(plan(model, "--stage", "/named")[0])
    assert (made.folder, made.auto) == ("/named", False)


def test_where_it_can_t_one_line_says_what_each_node_reads(
    scratch: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = "stage: each of the 2 nodes reads the model from nfs4; "
    assert plan(model) == ("", [f"{reads}--stage DIR has them read it once for all"])
    scratch.chmod(0o777)
    monkeypatch.setenv("SLURM_TMPDIR", str(scratch))
    assert plan(model, read_ahead="It reads ahead") == (
        "",
        [
            f"{reads}SLURM_TMPDIR ({scratch}) can be written by others; --stage DIR has them read it once for all. "
            "It reads ahead"
        ],
    )


def test_a_model_on_a_disk_is_never_staged_by_itself(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(scratch))
    assert plan(scratch) == ("", [])


@pytest.mark.parametrize(
    ("engine", "keys", "minor", "text"),
    [
        ("trtllm", {}, (1, 3), "TensorRT-LLM reads ahead by itself (checkpoint_io_policy: auto)"),
        ("trtllm", {}, (1, 2), ""),
        (
            "trtllm",
            {"checkpoint_io_policy": "native"},
            (1, 3),
            "TensorRT-LLM reads ahead as the engine config says (checkpoint_io_policy: native)",
        ),
        ("reference", {}, (1, 3), ""),
    ],
)
def test_the_engine_s_own_read_ahead_is_named(
    engine: str, keys: dict[str, str], minor: tuple[int, int], text: str
) -> None:
    settings: Any = SimpleNamespace(engine=engine)
    inputs: Any = SimpleNamespace(config=SimpleNamespace(keys=keys), version=SimpleNamespace(minor=minor))
    assert describe_read_ahead(settings, inputs) == text
