# SPDX-License-Identifier: Apache-2.0
"""What the operator's verbs answer for a folder in which nothing runs: the same for each verb, and never that all is well."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.deploy.run_dir import RunDir, ServicesDir, write_refusal
from dynamo_mpi.deploy.run_files import check_run_dir, is_run_dir, open_run_dir

VERBS = {
    "status": ["status", "--run-dir"],
    "wait": ["wait", "--timeout", "0.1", "--run-dir"],
    "down": ["down", "--run-dir"],
    "down, its short form": ["down"],
    "timeline": ["timeline", "--run-dir"],
    "replace": ["replace", "n1", "--run-dir"],
}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
Capture = pytest.CaptureFixture[str]


def missing(folder: Path) -> None:
    del folder


def a_file(folder: Path) -> None:
    folder.write_text("x")


def empty(folder: Path) -> None:
    folder.mkdir(mode=0o700)


def of_other_things(folder: Path) -> None:
    """As /etc: it has a file "services" and folders of our names."""
    (folder / "logs").mkdir(parents=True)
    folder.chmod(0o700)
    (folder / "services").write_text("http 80/tcp\n")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (missing, "there is no folder {}"),
        (a_file, "there is no folder {}"),
        (empty, "{} is no run folder: no deployment was ever started in it"),
        (of_other_things, "{} is no run folder: no deployment was ever started in it"),
    ],
)
def test_no_run_folder(verb: str, make: Callable[[Path], None], words: str, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "folder"
    make(folder)
    before = sorted(tmp_path.rglob("*"))
    assert main([*VERBS[verb], str(folder)]) == 64
    error = capsys.readouterr().err
    assert words.format(folder) in error
    assert "expected: the run folder of a deployment" in error and "fix:" in error
    assert sorted(tmp_path.rglob("*")) == before


@needs_root
@pytest.mark.parametrize("verb", VERBS)
def test_another_users_folder(verb: str, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "folder"
    RunDir(folder).close()
    os.chown(folder, 65534, 65534)
    assert main([*VERBS[verb], str(folder)]) == 77
    assert "belongs to user 65534" in capsys.readouterr().err


# verb: the code, and words
AFTER = {
    "status": (0, "ended"),
    "wait": (75, "has ended"),
    "down": (0, "nothing runs in"),
    "down, its short form": (0, "nothing runs in"),
    "timeline": (64, "there is no timeline in"),
    "replace": (64, "no deployment runs in"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_run_folder_whose_deployment_has_ended(
    verb: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_mpi.ops.wait.STALE_SECONDS", 0.0)
    used = RunDir(tmp_path / "folder")
    used.write_end(0, "ended in order")
    used.close()
    code, words = AFTER[verb]
    assert main([*VERBS[verb], str(used.path)]) == code
    output = capsys.readouterr()
    assert words in output.out + output.err


def test_what_makes_a_run_folder(tmp_path: Path) -> None:
    def is_one(folder: Path) -> bool:
        with open_run_dir(folder) as opened:
            return is_run_dir(opened)

    services = ServicesDir(tmp_path / "services", None, print)
    assert is_one(services.path)
    services.close()
    # its logs are left
    assert is_one(services.path)
    launch = RunDir(tmp_path / "launch")
    launch.close()
    assert is_one(launch.path)


@pytest.mark.parametrize(
    ("make", "status", "code"), [(missing, "warning", 0), (empty, "warning", 0), (of_other_things, "error", 64)]
)
def test_doctor(make: Callable[[Path], None], status: str, code: int, tmp_path: Path, capsys: Capture) -> None:
    """Before a launch its folder isn't there, which is no error."""
    make(tmp_path / "folder")
    assert main(["doctor", "--only", "services", "--run-dir", str(tmp_path / "folder")]) == code
    assert f"{status} " in capsys.readouterr().out


def start_services(folder: Path) -> ServicesDir:
    return ServicesDir(folder, None, print)


STARTS: list[Callable[[Path], RunDir | ServicesDir]] = [RunDir, start_services]
starts = pytest.mark.parametrize("start", STARTS)


def write(folder: Path, name: str, content: str = '{"apiVersion": 1}') -> None:
    (folder / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / name).write_text(content)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


ANOTHER_PROGRAMS = [
    "services.json",
    "deployment.json",
    "ended.json",
    "excluded.json",
    "stop",
    "lock",
    "services.lock",
    "services",
    "replace/n1",
    "logs/server.log",
    "ready/one",
    "timeline/page.html",
]


@pytest.mark.parametrize("name", ANOTHER_PROGRAMS)
@starts
def test_what_a_start_would_remove_or_overwrite_must_be_ours(
    start: Callable[[Path], RunDir | ServicesDir], name: str, tmp_path: Path
) -> None:
    write(tmp_path / "folder", name)
    write(tmp_path / "folder", "notes")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=f"no deployment has left: {name}\n") as caught:
        start(tmp_path / "folder")
    assert caught.value.expected == "a folder without them, or an earlier deployment's"
    assert "--run-dir" in caught.value.fix
    write_refusal(tmp_path / "folder", 64, "the launch was refused")
    assert contents(tmp_path) == before


@starts
def test_a_folder_that_the_user_has_prepared_is_used(
    start: Callable[[Path], RunDir | ServicesDir], tmp_path: Path
) -> None:
    """With engine configs, Slurm's output, what workers write there; and an empty lock, of a process that was killed at once."""
    for name in ("prefill.yaml", "slurm-7.out", "logs/decode-0/rank-0.log", "timeline/notes", "services.yaml"):
        write(tmp_path / "folder", name)
    before = contents(tmp_path)
    write(tmp_path / "folder", "lock", "")
    start(tmp_path / "folder").close()
    assert contents(tmp_path).items() >= before.items()


def test_services_alone_start_again_beside_other_things(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    services = start_services(folder)
    services.new_log("etcd")
    services.close()
    assert [path.name for path in folder.iterdir()] == ["services"]
    for name in ("logs/rank-0.log", "ready/agg.json", "services/notes"):
        write(folder, name)
    start_services(folder).close()
    RunDir(folder).close()


def test_a_folder_of_an_earlier_deployment_may_have_other_things(tmp_path: Path) -> None:
    RunDir(tmp_path / "folder").close()
    write(tmp_path / "folder", "services.json")
    RunDir(tmp_path / "folder").close()


def test_a_folder_in_which_a_launch_was_refused_can_be_used(tmp_path: Path) -> None:
    write_refusal(tmp_path / "folder", 64, "the launch was refused")
    RunDir(tmp_path / "folder").close()


def test_a_folder_that_cannot_be_created_is_refused_unless_its_file_system_is_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    check_run_dir(tmp_path / "not here" / "run")
    with pytest.raises(UsageError, match=f"{tmp_path} isn't writable"):
        check_run_dir(tmp_path / "run")
