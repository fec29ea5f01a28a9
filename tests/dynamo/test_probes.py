# SPDX-License-Identifier: Apache-2.0
"""What probes, Prometheus and a supervisor see of real workers, from their first second to their end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dynamo_mpi.common.ports import free_port, is_free
from tests.conftest import ROOT
from tests.dynamo.running import (
    EtcdServer,
    RunningWorker,
    eventually,
    failure_in,
    http_get,
    running_frontend,
    system_port,
)
from tests.dynamo.test_worker_life import Stream

pytestmark = pytest.mark.dynamo
Start = Callable[..., RunningWorker]
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STANDIN = {
    "PYTHONPATH": os.pathsep.join(
        filter(None, (os.environ.get("PYTHONPATH"), str(ROOT / "tests/standins"), str(ROOT)))
    ),
    "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0.2",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture
def start(tmp_path: Path, etcd: EtcdServer, model_dir: Path) -> Iterator[Start]:
    """Start workers that answer probes on loopback; what is left of them is killed."""
    workers: list[RunningWorker] = []

    def begin(ranks: int, *flags: str, **environment: str) -> RunningWorker:
        variables = {"DYN_SYSTEM_HOST": "127.0.0.1", "TRACEPARENT": TRACE, **environment}
        workers.append(RunningWorker(tmp_path, etcd, model_dir, ranks, *flags, **variables))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[socket.socket]:
    """What systemd would listen at."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{tmp_path.name}-{os.getpid()}")
        listening.setblocking(False)
        yield listening


def place_of(supervisor: socket.socket) -> str:
    name: bytes = supervisor.getsockname()
    return "@" + name[1:].decode()


def notifications(supervisor: socket.socket) -> list[str]:
    """Return all notifications since the last call."""
    lines: list[str] = []
    with contextlib.suppress(BlockingIOError):
        while True:
            lines += supervisor.recv(4096).decode().splitlines()
    return lines


def probe(port: int, path: str) -> tuple[int, dict[str, Any]]:
    status, text = http_get(f"http://127.0.0.1:{port}{path}")
    return status, json.loads(text) if status else {}


def eventually_answers(status: int, port: int, path: str) -> dict[str, Any]:
    """Wait for an answer of this status, and return what is in it."""

    def read() -> dict[str, Any] | None:
        answered, body = probe(port, path)
        return body if answered == status else None

    return eventually(read, f"{path} is {status}", 20)


def numbers(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Read metrics as Prometheus does."""
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "a metric is described once"
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def of(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def answering(worker: RunningWorker) -> list[int]:
    """Return the node agents that answer health requests for ranks of this worker."""
    found = []
    for pid in worker.members():
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                if b"node agent on" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_probes_follow_the_world_through_its_life(
    start: Start, etcd: EtcdServer, tmp_path: Path, model_dir: Path, supervisor: socket.socket
) -> None:
    port, file = system_port(), tmp_path / "world.prom"
    worker = start(3, "--metrics-file", str(file), DYN_SYSTEM_PORT=str(port), NOTIFY_SOCKET=place_of(supervisor))
    eventually(lambda: probe(port, "/live")[0] == 200, "it is alive")
    status, body = probe(port, "/health")
    assert (status, body["status"]) == (503, "notready")
    assert body["phase"] in ("environment", "mpi_init", "preflight", "load")
    assert body["waits_for"]
    before = numbers(http_get(f"http://127.0.0.1:{port}/metrics")[1])
    assert before[of("dynamo_mpi_ready")] == 0
    assert before[of("dynamo_mpi_phase", phase="serve")] == 0
    assert not worker.ready_file.exists()

    ready = worker.ready()
    assert ready["system"] == f"http://127.0.0.1:{port}"
    body = eventually_answers(200, port, "/health")
    assert (body["status"], body["endpoints"], body["phase"]) == ("ready", {"generate": "ready"}, "serve")
    assert (body["rank"], body["model"], body["trace"]) == (0, model_dir.name, TRACE)
    assert body["pid"] == ready["pid"]
    (server,) = answering(worker)

    eventually(lambda: of("dynamo_mpi_ranks") in metrics(port), "what rank 0 knows of all ranks is published")
    seen = metrics(port)
    assert seen[of("dynamo_mpi_ready")] == 1
    assert seen[of("dynamo_mpi_ranks")] == 3
    spent = [seen[of("dynamo_mpi_phase_duration_seconds", phase="load", statistic=s)] for s in ("min", "median", "max")]
    assert 0 < spent[0] <= spent[1] <= spent[2]
    assert any(name == "dynamo_component_inflight_requests" for name, _ in seen), "Dynamo's own are there as well"

    with running_frontend(tmp_path, etcd) as frontend:
        eventually(lambda: model_dir.name in frontend.models(), "the model is listed")
        # the frontend has fetched these from the runtime itself; through our port they are the same
        (card,) = [value for key, value in etcd.written("v1/mdc/") if value]
        url = json.loads(card)["card_json"]["tokenizer"]["hf_tokenizer_json"]["path"]
        own = int(url.split("/")[2].rpartition(":")[2])
        assert own != port
        with urllib.request.urlopen(url.replace(f":{own}/", f":{port}/"), timeout=10) as reply:  # noqa: S310 - loopback
            assert reply.read() == (model_dir / "tokenizer.json").read_bytes()
        assert http_get(f"http://127.0.0.1:{port}/nowhere") == http_get(f"http://127.0.0.1:{own}/nowhere")
        events = Stream(frontend.port, model_dir.name, 60).events()
        next(events)
        os.kill(worker.rank_zero(), signal.SIGTERM)
        body = eventually_answers(503, port, "/health")
        assert (body["phase"], body["waits_for"]) == ("drain", "requests in flight to end")
        assert probe(port, "/live")[0] == 200, "that is no reason to kill it"
        assert list(events)[-1] == "[DONE]"
        assert worker.wait() == 0, worker.text()
    eventually(lambda: has_ended(server) and is_free(port), "nothing is left", 5)

    last = numbers(file.read_text())
    where = {"dynamo_namespace": "dynamo", "dynamo_component": "backend"}
    assert last[of("dynamo_mpi_exit_code", **where)] == last[of("dynamo_mpi_ready", **where)] == 0
    assert last[of("dynamo_mpi_phase", phase="exit", **where)] == 1
    assert file.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.glob(".world.prom*")] == []
    lines = notifications(supervisor)
    assert lines[lines.index("STATUS=mpi_init") + 1].startswith("EXTEND_TIMEOUT_USEC="), lines
    order = [
        lines.index(line)
        for line in ("STATUS=mpi_init", "STATUS=preflight", "STATUS=load", "READY=1", "STATUS=drain", "STOPPING=1")
    ]
    assert order == sorted(order), lines
    assert "Traceback" not in worker.text()


def metrics(port: int) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return numbers(http_get(f"http://127.0.0.1:{port}/metrics")[1])


def test_a_rank_that_dies_takes_the_answers_along(start: Start, tmp_path: Path, supervisor: socket.socket) -> None:
    port, file = system_port(), tmp_path / "world.prom"
    flags = ("--metrics-file", str(file), "--failure-dir", str(tmp_path / "failures"))
    worker = start(3, *flags, DYN_SYSTEM_PORT=str(port), NOTIFY_SOCKET=place_of(supervisor))
    worker.ready()
    (server,) = answering(worker)
    os.kill(worker.ranks()[2], signal.SIGKILL)
    assert worker.wait() != 0
    report = failure_in(tmp_path / "failures/backend-rank-0.json")
    assert f"-{report['trace_id']}-" in TRACE
    eventually(lambda: has_ended(server) and is_free(port), "nothing is left", 5)
    last = numbers(file.read_text())
    where = {"dynamo_namespace": "dynamo", "dynamo_component": "backend"}
    assert last[of("dynamo_mpi_failures_total", cause="disconnect", **where)] == 1
    assert last[of("dynamo_mpi_ready", **where)] == 0
    assert last[of("dynamo_mpi_exit_code", **where)] > 0
    assert any(line.startswith("STATUS=failed: error in serve: rank ") for line in notifications(supervisor))


def test_a_held_interpreter_is_alive_until_it_is_known_to_be_stuck(start: Start) -> None:
    port = system_port()
    fault = {"DYN_MPI_FAULT": "rank0:load:hang", "DYN_MPI_ALLOW_FAULTS": "1"}
    worker = start(3, "--heartbeat-timeout", "4", DYN_SYSTEM_PORT=str(port), TRACEPARENT="nonsense", **fault)
    eventually(lambda: "fault: hang in load" in worker.text(), "rank 0 holds its interpreter")
    assert probe(port, "/live")[0] == 200
    status, body = probe(port, "/health")
    assert (status, body["phase"], body["waits_for"][:30]) == (503, "load", "all ranks to load the model")
    assert "trace" not in body
    assert "warning: TRACEPARENT is 'nonsense', which names no trace" in worker.text()
    (server,) = answering(worker)
    body = eventually_answers(503, port, "/live")
    assert "the process is stopped or hung" in body["error"]
    # its node agent ends it, and that ends the answers
    assert worker.wait() == 124, worker.text()
    eventually(lambda: has_ended(server) and is_free(port), "nothing is left", 5)


def test_a_taken_port_is_refused_before_mpi_starts(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        worker = start(3, DYN_SYSTEM_PORT=str(port))
        assert worker.wait() == 64, worker.text()
    text = worker.text()
    assert f"/health, /live and /metrics can't be served at 127.0.0.1:{port}: process {os.getpid()} " in text
    assert "choose another DYN_SYSTEM_PORT" in text
    assert text.count("error") == 1, text


def test_a_port_that_is_none_is_refused(start: Start) -> None:
    worker = start(1, DYN_SYSTEM_PORT="http")
    assert worker.wait() == 64
    assert "DYN_SYSTEM_PORT is 'http'" in worker.text()


def test_the_childs_own_answers_are_behind_ours(start: Start, supervisor: socket.socket) -> None:
    """``dynamo.trtllm`` is a child of rank 0, and has a port of its own."""
    # the public one may be one that the runtime couldn't even read
    port = next(port for port in iter(free_port, 0) if port > 32767)
    flags = ("--engine", "trtllm", "--allow-no-gpu", "--max-seq-len", "512", "--max-batch-size", "2")
    worker = start(3, *flags, DYN_SYSTEM_PORT=str(port), NOTIFY_SOCKET=place_of(supervisor), **STANDIN)
    eventually(lambda: probe(port, "/live")[0] == 200, "it is alive")
    assert probe(port, "/health")[0] == 503
    worker.ready()
    body = eventually_answers(200, port, "/health")
    assert body["endpoints"]["generate"] == "ready"
    eventually(lambda: of("dynamo_mpi_ranks") in metrics(port), "what rank 0 knows of all ranks is published")
    names = {name for name, _ in metrics(port)}
    assert {"dynamo_mpi_ready", "dynamo_component_inflight_requests"} <= names
    words = subprocess.run(["pgrep", "-P", str(worker.rank_zero()), "-f", "dynamo.trtllm --model"], capture_output=True)
    environment = Path(f"/proc/{int(words.stdout)}/environ").read_bytes().decode().split("\0")
    assert f"TRACEPARENT={TRACE}" in environment
    assert not [word for word in environment if word.startswith("NOTIFY_SOCKET=")]
    (own,) = [int(word.rpartition("=")[2]) for word in environment if word.startswith("DYN_SYSTEM_PORT=")]
    assert own != port
    assert http_get(f"http://127.0.0.1:{port}/nowhere") == http_get(f"http://127.0.0.1:{own}/nowhere")
    os.kill(worker.rank_zero(), signal.SIGTERM)
    assert worker.wait() == 0, worker.text()
    eventually(lambda: is_free(port), "nothing is left", 5)
    assert "READY=1" in notifications(supervisor)
