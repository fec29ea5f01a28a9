# SPDX-License-Identifier: Apache-2.0
"""``dynamo-mpi doctor`` as a command on this machine, and the examination's own promises: in time, and no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dynamo_mpi.checks.local_check import LocalResult
from dynamo_mpi.cli.main import main
from dynamo_mpi.common.errors import ExitCode, UsageError
from dynamo_mpi.layout.finding import Finding, Severity
from dynamo_mpi.ops.doctor.check import Check, Context, Probe, Section, Status, error, ok, skipped, warning
from dynamo_mpi.ops.doctor.runner import SECTIONS, checks_of, chosen, run_sections
from tests.conftest import ROOT, mpi_environment, run_command
from tests.servers import closed_port, listening

NAMES = [section.name for section in SECTIONS]


def doctor(*words: str, python: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *python.split(), "-m", "dynamo_mpi.cli.main", "doctor", *words]
    return run_command(command, env=mpi_environment(variables), timeout=60)


def read(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stderr == ""
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_all_of_this_machine() -> None:
    start = time.monotonic()
    done = doctor("--output", "json", DYN_MPI_LIVENESS_NETWORK="lo")
    # 10 s, and the start of Python on a busy machine
    assert time.monotonic() - start < 15
    report = read(done)
    assert done.returncode == report["exit_code"] == 0, done.stdout
    assert (report["schema"], report["ok"]) == (1, True)
    assert [section["name"] for section in report["sections"]] == NAMES
    for section in report["sections"]:
        ids = [check["id"] for check in section["checks"]]
        assert ids
        assert len(set(ids)) == len(ids), section
        for check in section["checks"]:
            assert set(check) == {"id", "status", "found", "needed", "fix"}
            assert check["status"] in {status.value for status in Status}
            assert check["found"]
            assert check["status"] != "warning" or (check["needed"] and check["fix"]), check


def test_an_etcd_that_is_absent_is_69_and_nothing_secret_is_shown() -> None:
    with closed_port() as port:
        secrets = {
            "ETCD_ENDPOINTS": f"http://root:hunter2@127.0.0.1:{port}",
            "NATS_SERVER": f"nats://me:hunter2@127.0.0.1:{port}",
            "http_proxy": "http://me:hunter2@proxy:1",
            "ETCD_AUTH_USERNAME": "root",
            "ETCD_AUTH_PASSWORD": "hunter2",
            "HF_TOKEN": "hunter2",
        }
        done = doctor(python="", **secrets)
    assert done.returncode == ExitCode.UNAVAILABLE
    assert "hunter2" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert f"error   etcd: etcd does not answer (http://127.0.0.1:{port}: connection refused)" in lines
    assert any(line.startswith("  fix:      start etcd on the head node") for line in lines)
    assert "2 errors" in lines[-1]
    assert "\x1b" not in done.stdout


def test_servers_that_never_answer_are_reported_in_time() -> None:
    with listening() as port:
        start = time.monotonic()
        done = doctor("--only", "services", "--timeout", "1", ETCD_ENDPOINTS=f"http://127.0.0.1:{port}")
    assert time.monotonic() - start < 8
    assert done.returncode == ExitCode.UNAVAILABLE
    assert "no answer in time" in done.stdout


def test_the_standard_library_is_enough() -> None:
    done = doctor("--output", "json", "--only", "python,mpi,services,environment", python="-S")
    found = {check["id"]: check for section in read(done)["sections"] for check in section["checks"]}
    assert found["mpi4py"]["status"] == found["library"]["status"] == "skipped"
    assert found["etcd"]["status"] == "warning"
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "mpi,nonsense"], "there is no section nonsense"),
        (["--only", ","], "names no section"),
        (["--timeout", "0"], "more than 0 seconds"),
        (["--timeout", "x"], "--timeout"),
        (["--output", "yaml"], "--output"),
    ],
)
def test_wrong_use_is_64(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err


def test_colours_on_request_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("DYN_SYSTEM_PORT", raising=False)
    assert main(["doctor", "--only", "ports"]) == 0
    assert "\x1b[2mskipped\x1b[0m system-port" in capsys.readouterr().out


# -- the examination --------------------------------------------------------------------------------------------------


def section(*questions: Probe) -> Section:
    return Section("some", questions)


def test_a_check_that_fails_is_an_error_of_doctor_itself() -> None:
    def fail(context: Context) -> Iterator[Check]:
        yield ok("first", "well")
        raise KeyError("what")

    def repeat(context: Context) -> Iterator[Check]:
        yield ok("twice", "well")
        raise UsageError("and then not")

    again = run_sections([section(Probe("twice", repeat))], Context.of({}, 10), "here")
    assert [check.id for check in again.checks] == ["twice", "twice-rest"]

    def refuse(context: Context) -> Iterator[Check]:
        raise UsageError("x is y", expected="z")

    report = run_sections([section(Probe("odd", fail), Probe("used", refuse))], Context.of({}, 10), "here")
    first, odd, used = report.checks
    assert first == ok("first", "well")
    assert (odd.id, odd.status, odd.code) == ("odd", Status.ERROR, ExitCode.ENGINE)
    assert "this check itself failed: KeyError: 'what'" in odd.found
    assert (used.found, used.expected, used.code) == ("x is y", "z", ExitCode.USAGE)
    assert report.exit_code == ExitCode.ENGINE


def test_a_check_that_hangs_is_a_warning_and_holds_nothing_up() -> None:
    released = threading.Event()

    def hang(context: Context) -> Iterator[Check]:
        released.wait(60)
        yield ok("late", "late")

    try:
        questions = [Probe(f"stuck {number}", hang) for number in range(3)]
        report = run_sections(
            [section(*questions, Probe("quick", lambda _: [ok("quick", "well")]))], Context.of({}, 0.3), "here"
        )
    finally:
        released.set()
    assert report.seconds < 5
    assert [check.status for check in report.checks] == [Status.WARNING] * 3 + [Status.OK]
    assert report.checks[0].found == "no answer within 0.3 s"
    assert report.exit_code == 0


def test_the_first_error_decides_the_code_and_the_text_has_cures() -> None:
    checks = [
        ok("a", "well"),
        warning("b", "one\ntwo", "three", "four"),
        error("c", "http://me:hunter2@h", "five", "six", ExitCode.NOT_AUTHORISED),
        error("d", "seven", "eight"),
        skipped("e", "nine"),
    ]
    report = run_sections([section(Probe("all", lambda _: checks))], Context.of({}, 10), "here")
    assert report.exit_code == ExitCode.NOT_AUTHORISED
    *lines, last = report.as_text().splitlines()
    assert lines[:9] == [
        "some:",
        "ok      a: well",
        "warning b: one",
        "          two",
        "  expected: three",
        "  fix:      four",
        "error   c: http://<redacted>@h",
        "  expected: five",
        "  fix:      six",
    ]
    assert last.startswith("here: 1 ok, 1 warning, 2 errors, 1 skipped, in ")
    assert report.as_json()["sections"][0]["checks"][2]["found"] == "http://<redacted>@h"


def test_further_sections_can_be_added() -> None:
    further = Section("probes", ())
    assert chosen(None, (further,)) == (*SECTIONS, further)
    assert chosen("probes,mpi", (further,)) == (SECTIONS[NAMES.index("mpi")], further)


def test_the_probes_are_a_section_of_their_own() -> None:
    finding = Finding(
        "V10",
        Severity.WARNING,
        "GPU 1 is held back",
        "hardware slowdown",
        "a GPU at its full clock",
        "see nvidia-smi -q",
    )
    here = LocalResult(
        {"gpu": {"read": 2}}, (finding,), ("gpu: 2 of 2 GPUs read", "fabric over NCCL 2.28.9: exchange near 256.0 GB/s")
    )
    found = list(checks_of(here))
    assert [(check.id, check.status) for check in found] == [
        ("gpu", Status.OK),
        ("fabric", Status.OK),
        ("V10", Status.WARNING),
    ]
    assert found[1].found == "fabric over NCCL 2.28.9: exchange near 256.0 GB/s"
    assert [check.status for check in checks_of(LocalResult({}, (), ("gpu: no GPU here",)))] == [Status.SKIPPED]


def test_probes_where_there_is_no_gpu() -> None:
    done = doctor("--probe", "--only", "probe", "--output", "json")
    report = read(done)
    assert (done.returncode, report["probe"]) == (0, {})
    (section,) = report["sections"]
    assert (section["name"], [check["status"] for check in section["checks"]]) == ("probe", ["skipped"])


def test_the_probes_take_no_time_from_the_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow() -> LocalResult:
        time.sleep(0.6)
        return LocalResult({}, (), ("gpu: no GPU here",))

    monkeypatch.setattr("dynamo_mpi.checks.local_check.check_this_host", slow)
    assert main(["doctor", "--probe", "--only", "probe,host", "--timeout", "0.5", "--output", "json"]) == 0
    found = [
        check["found"] for section in json.loads(capsys.readouterr().out)["sections"] for check in section["checks"]
    ]
    assert not [text for text in found if "no answer" in text]


def test_interrupted_it_leaves_nothing_behind(tmp_path: Any) -> None:
    fake = tmp_path / "srun"
    fake.write_text(f"#!/bin/sh\necho $$ >>{tmp_path}/pids\nexec sleep 300\n")
    fake.chmod(0o755)
    environment = {**mpi_environment(), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "dynamo_mpi.cli.main", "doctor", "--only", "slurm", "--timeout", "60"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=ROOT) as process:
        deadline = time.monotonic() + 30
        while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().split()) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    for pid in (tmp_path / "pids").read_text().split():
        while runs(pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def runs(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
