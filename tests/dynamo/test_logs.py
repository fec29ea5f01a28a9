# SPDX-License-Identifier: Apache-2.0
"""What a real worker says while it loads, and what it never says."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, mpi_environment
from tests.dynamo.running import EtcdServer, RunningWorker, eventually, failure_in

pytestmark = pytest.mark.dynamo
SHIMS = Path(__file__).parent / "programs" / "shims"
HOST = os.uname().nodename
SLOW_SECONDS = 4


def log_lines(text: str) -> list[dict[str, Any]]:
    """Return our lines of JSON; mpirun may have put its own words between the lines."""
    return [json.loads(line) for line in text.splitlines() if '"target":"dynamo_mpi"' in line]


def moment(line: dict[str, Any]) -> float:
    """Return when something was said, in seconds."""
    return datetime.fromisoformat(line["time"].replace("Z", "+00:00")).timestamp()


def test_a_slow_rank_is_named_in_lines_of_json_and_in_log_files(
    tmp_path: Path, etcd: EtcdServer, model_dir: Path
) -> None:
    logs = tmp_path / "logs"
    words = ("--progress-interval", "0.4", "--log-dir", str(logs))
    faults = {"DYN_MPI_ALLOW_FAULTS": "1", "DYN_MPI_FAULT": f"rank2:load:slow={SLOW_SECONDS}"}
    worker = RunningWorker(tmp_path, etcd, model_dir, 3, *words, DYN_LOGGING_JSONL="1", **faults)
    try:
        worker.ready()
        os.kill(worker.rank_zero(), 15)
        assert worker.wait() == 0, worker.text()
    finally:
        worker.stop()
    assert "dynamo_mpi: " not in worker.text()
    lines = log_lines(worker.text())
    for line in lines:
        assert line["host"] == HOST
        assert not re.search(rf"rank \d+ on {HOST}", line["message"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["time"])
    said = {line["message"].partition(":")[0]: line for line in lines}
    assert (said["warning"]["level"], said["ready"]["level"], said["fault"]["rank"]) == ("WARN", "INFO", 2)
    progress = [line for line in lines if line.get("phase") == "load"]
    # rank 2 sleeps, and the others wait for it inside MPI
    stopped_at = moment(said["fault"])
    meanwhile = [line for line in progress if 0 < moment(line) - stopped_at < SLOW_SECONDS]
    assert len(meanwhile) >= 2, progress
    for line in meanwhile:
        assert (line["done"], line["ranks"], line["slowest_rank"], line["slowest_host"]) == (0, 3, 2, HOST)
        assert re.match(
            rf"load 0/3 ranks, slowest {HOST} \(rank 2\) \d+ s, [\d.]+ MB of [\d.]+ MB read", line["message"]
        )
        # all ranks have imported Python at least
        assert line["read_bytes"] > line["slowest_read_bytes"] > 0
    first, second, *_ = progress
    assert 0.7 < moment(second) - moment(first) < SLOW_SECONDS
    assert sorted(path.name for path in logs.iterdir()) == [
        "backend-rank-0.log",
        "backend-rank-2.log",
        *(["backend-rank-1.log"] if (logs / "backend-rank-1.log").exists() else []),
    ]
    assert log_lines((logs / "backend-rank-0.log").read_text()) == [line for line in lines if line["rank"] == 0]
    assert [line["message"] for line in log_lines((logs / "backend-rank-2.log").read_text())] == [
        f"fault: slow {SLOW_SECONDS} in load"
    ]


SECRETS = {
    "HF_TOKEN": "hf_abcdefghijABCDEFGHIJ0123456789abcd",
    "NATS_AUTH_PASSWORD": "correct-horse",
    "WANDB_API_KEY": "battery staple",
    "MY_TOKEN": "q7!",
}
TALE = (
    "token hf_abcdefghijABCDEFGHIJ0123456789abcd, correct-horse, battery staple, q7!, https://me:pass-in-url@hub/x, "
    "Authorization: Bearer abc.def.ghi, nvapi-0123456789abcdef0123"
)
NEVER = (*SECRETS.values(), "pass-in-url", "abc.def.ghi", "nvapi-0123456789abcdef0123")


def test_secrets_are_in_no_report_log_or_failure_file(tmp_path: Path, etcd: EtcdServer, model_dir: Path) -> None:
    logs, failures = tmp_path / "logs", tmp_path / "failures"
    words = ("--log-dir", str(logs), "--failure-dir", str(failures))
    shims = {"PYTHONPATH": f"{SHIMS}{os.pathsep}{ROOT}", "SHIM_TELLTALE": "1", "SHIM_SECRETS": TALE}
    worker = RunningWorker(tmp_path, etcd, model_dir, 3, *words, **shims, **SECRETS)
    try:
        assert worker.wait() == 70, worker.text()
    finally:
        worker.stop()
    for rank in (0, 1):
        failure_in(failures / f"backend-rank-{rank}.json")
    files = [*logs.iterdir(), *failures.iterdir()]
    assert {path.name for path in files} >= {"backend-rank-0.log", "backend-rank-0.json", "backend-rank-1.json"}
    for text in (worker.text(), *(path.read_text() for path in files)):
        for secret in NEVER:
            assert secret not in text
    for text in (
        worker.text(),
        (failures / "backend-rank-1.json").read_text(),
        (logs / "backend-rank-0.log").read_text(),
    ):
        assert "no weights there: token <redacted>, <redacted>, " in text
        assert "https://<redacted>@hub/x" in text
    # what an engine writes itself stays as it is
    assert worker.text().count("the engine's own words") == 1


def test_on_a_terminal_there_is_a_table_that_goes(tmp_path: Path, etcd: EtcdServer, model_dir: Path) -> None:
    ready = tmp_path / "ready.json"
    command = [sys.executable, "-m", "dynamo_mpi.worker", "--model", str(model_dir), "--ready-file", str(ready)]
    faults = {"DYN_MPI_ALLOW_FAULTS": "1", "DYN_MPI_FAULT": "rank0:load+0.1:slow=4"}
    environment = mpi_environment({"ETCD_ENDPOINTS": etcd.url, "DYN_LOG": "error", **faults})
    ours, its = pty.openpty()
    os.set_blocking(ours, False)
    data = bytearray()

    def read() -> bool:
        with contextlib.suppress(OSError):  # nothing now, or no process writes any more
            data.extend(os.read(ours, 65536))
        return ready.exists() and b"ready: " in data

    with subprocess.Popen(command, env=environment, stderr=its, stdout=subprocess.DEVNULL) as process:
        os.close(its)
        try:
            eventually(read, "ready")
            process.terminate()
            eventually(lambda: process.poll() is not None, "its end")
        finally:
            process.kill()
    os.close(ours)
    assert process.returncode == 0, data.decode()
    text = data.decode().replace("\r\n", "\n")
    drawn = re.findall(
        rf"(?:load|warmup) +ranks +slowest +seconds +read\n{HOST} +0/1 +rank 0 +\d+ s +[\d.]+ [MG]B\n", text
    )
    assert len(drawn) >= 2, text
    # each is taken away, by as many lines as it had
    assert text.count("\x1b[2A\r\x1b[J") == len(drawn)
    assert text.rfind("\x1b[2A\r\x1b[J") < text.find("ready: ")
