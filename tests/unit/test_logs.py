# SPDX-License-Identifier: Apache-2.0
"""What is said: levels, lines of text and JSON, log files."""

from __future__ import annotations

import json
import re
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.common.log import RankLogger
from dynamo_mpi.common.log_record import Level, Line, least_level
from dynamo_mpi.common.log_writer import LogFile, LogFormat, LogWriter, log_writer
from dynamo_mpi.common.redact import MASK


@pytest.mark.parametrize(
    ("filters", "least"),
    [
        ("", Level.INFO),
        ("info", Level.INFO),
        ("debug", Level.DEBUG),
        ("DEBUG", Level.DEBUG),
        ("trace", 5),
        ("4", Level.DEBUG),
        # Dynamo's own chatter is turned down with it, not the few lines that everybody waits for
        ("warn", Level.INFO),
        ("error", Level.INFO),
        ("off", Level.INFO),
        ("warn,dynamo_mpi=debug", Level.DEBUG),
        ("dynamo_mpi=warn,debug", Level.WARN),
        ("debug,dynamo_mpi=warn", Level.WARN),
        ("dynamo_mpi=off", Level.ERROR),
        ("dynamo_runtime=trace", Level.INFO),
        ("dynamo_mpi::leader=debug", Level.INFO),
        ("nonsense,dynamo_mpi=loud", Level.INFO),
    ],
)
def test_dyn_log_is_read_as_dynamo_reads_it(filters: str, least: int) -> None:
    assert least_level(filters) == least


@given(st.text())
def test_no_filter_silences_errors(filters: str) -> None:
    assert least_level(filters) <= Level.ERROR


def test_each_method_has_its_level(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "format", LogFormat(least=int(Level.DEBUG), jsonl=True))
    log = RankLogger(3, "n1")
    log.debug("phase load")
    log.info("error is only a word here", {"done": 1})
    log.warning("a file can't be written")
    log.error("error in load: out of memory")
    found = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(line["level"], line["message"]) for line in found] == [
        ("DEBUG", "phase load"),
        ("INFO", "error is only a word here"),
        ("WARN", "warning: a file can't be written"),
        ("ERROR", "error in load: out of memory"),
    ]
    assert all((line["rank"], line["host"]) == (3, "n1") for line in found)
    assert found[1]["done"] == 1


def test_a_line_as_dynamo_has_it() -> None:
    line = Line(1_700_000_000.25, Level.WARN, 3, "n1", 'two\n"lines"', {"done": 2, "host": "other", "seconds": 1.5})
    assert line.as_text() == 'dynamo_mpi: rank 3 on n1: two\n"lines"\n'
    assert line.as_logged() == '2023-11-14T22:13:20.250000Z  WARN dynamo_mpi: rank 3 on n1: two\n"lines"\n'
    (written,) = line.as_json().splitlines()
    assert list(json.loads(written).items()) == [
        ("time", "2023-11-14T22:13:20.250000Z"),
        ("level", "WARN"),
        ("target", "dynamo_mpi"),
        ("message", 'two\n"lines"'),
        ("rank", 3),
        ("host", "n1"),
        ("done", 2),
        ("seconds", 1.5),
    ]
    # as `launch` finds our lines among others
    assert '"target":"dynamo_mpi"' in written
    assert line._replace(rank=None).as_text().startswith("dynamo_mpi: n1: two")
    assert "rank" not in json.loads(line._replace(rank=None).as_json())


@given(st.text(), st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text()))
def test_any_text_is_one_line_of_json(text: str, facts: dict[str, str | int | bool | None]) -> None:
    written = Line(0.0, Level.INFO, 0, "n1", text, facts).as_json()
    assert written.count("\n") == 1
    assert json.loads(written)["message"] == text


def test_secrets_are_taken_out_and_levels_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    log_writer = LogWriter(LogFormat(least=int(Level.WARN)))
    log_writer.emit(0, "n1", "not said", Level.INFO)
    log_writer.emit(0, "n1", "warning: password=hunter2", Level.WARN)
    log_writer.emit(None, "n1", "error of the node", Level.ERROR)
    assert capfd.readouterr().err == (
        f"dynamo_mpi: rank 0 on n1: warning: password={MASK}\ndynamo_mpi: n1: error of the node\n"
    )
    LogWriter(LogFormat(jsonl=True)).emit(2, "n1", "ready", Level.INFO, {"url": "nats://u:p@h:1", "seconds": 2.0})
    document = json.loads(capfd.readouterr().err)
    assert (document["message"], document["rank"], document["url"]) == ("ready", 2, f"nats://{MASK}@h:1")


def test_a_log_file_has_all_with_times_and_is_its_owners_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log_writer = LogWriter(LogFormat())
    log_writer.emit(1, "n1", "early", Level.INFO)
    log_writer.open_file(str(tmp_path / "logs" / "here"), "backend", 1)
    log_writer.emit(1, "n1", "late api_key=hunter2", Level.INFO)
    (path,) = (tmp_path / "logs" / "here").iterdir()
    assert path.name == "backend-rank-1.log"
    first, second = path.read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z  INFO dynamo_mpi: rank 1 on n1: early", first)
    assert second.endswith(f"late api_key={MASK}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert capfd.readouterr().err.count("\n") == 2


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log_writer = LogWriter(LogFormat())
    log_writer.open_file("", "backend", 0)
    log_writer.emit(0, "n1", "said", Level.INFO)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_reported_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    log_writer = LogWriter(LogFormat())
    log_writer.open_file(str(tmp_path / "file"), "backend", 0)
    log_writer.emit(0, "n1", "one", Level.INFO)
    log_writer.emit(0, "n1", "two", Level.INFO)
    said = capfd.readouterr().err.splitlines()
    assert [line.removeprefix("dynamo_mpi: rank 0 on n1: ") for line in said] == [
        "one",
        f"warning: the log file {tmp_path}/file/backend-rank-0.log can't be written, so there is none: Not a directory",
        "two",
    ]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("mine")
    (tmp_path / "log").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="is a link"):
        LogFile(str(tmp_path / "log")).write(b"line\n")
    assert (tmp_path / "other").read_text() == "mine"


def test_files_are_rotated_at_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    log = LogFile(str(path), most=40, files=3)
    for number in range(20):
        log.write(f"line number {number:2}\n".encode())
    log.close()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.log", "x.log.1", "x.log.2"]
    texts = [(tmp_path / name).read_text() for name in ("x.log.2", "x.log.1", "x.log")]
    assert "".join(texts) == "".join(f"line number {number:2}\n" for number in range(14, 20))
    # a start that comes later goes on in the same file
    again = LogFile(str(path), most=40, files=3)
    again.write(b"more\n")
    again.write(b"much more than fits\n")
    again.close()
    assert path.read_text() == "much more than fits\n"
    assert (tmp_path / "x.log.1").read_text().endswith("more\n")


def test_lines_of_threads_do_not_mix(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log_writer = LogWriter(LogFormat())
    log_writer.open_file(str(tmp_path), "w", 0)

    def talk(word: str) -> None:
        for _ in range(20):
            log_writer.emit(0, "n1", word * 500, Level.INFO)

    threads = [threading.Thread(target=talk, args=(word,)) for word in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    for text in (capfd.readouterr().err, (tmp_path / "w-rank-0.log").read_text()):
        words = [line.rpartition(" ")[2] for line in text.splitlines()]
        assert sorted(words) == sorted(word * 500 for word in "abcd" for _ in range(20))
