# SPDX-License-Identifier: Apache-2.0
"""A worker of three ranks against a real etcd: what is registered serves, and what ends says why."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynamo_mpi.engines.reference.weights import WEIGHTS_NAME
from tests.conftest import ROOT
from tests.dynamo.running import EtcdServer, RunningWorker, eventually, http_get, running_frontend, system_port

pytestmark = pytest.mark.dynamo
Start = Callable[..., RunningWorker]


@pytest.fixture
def start(tmp_path: Path, etcd: EtcdServer, model_dir: Path) -> Iterator[Start]:
    """Start workers; what is left of them is killed."""
    workers: list[RunningWorker] = []

    def begin(ranks: int, *flags: str, model: Path = model_dir, **environment: str) -> RunningWorker:
        workers.append(RunningWorker(tmp_path, etcd, model, ranks, *flags, **environment))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


class Stream:
    """One streamed completion, read event by event."""

    def __init__(self, port: int, model: str, max_tokens: int) -> None:
        body = {"model": model, "prompt": "The capital of France is", "max_tokens": max_tokens, "ignore_eos": True}
        self._body = json.dumps(body | {"stream": True})
        self._port = port
        # a frontend may list a model a moment before it routes to it
        eventually(lambda: self._ask() != 404, "the model is routed to", 10)
        assert self._reply.status == 200, self._reply.read()

    def _ask(self) -> int:
        self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        self._connection.request("POST", "/v1/completions", self._body, {"Content-Type": "application/json"})
        self._reply = self._connection.getresponse()
        return self._reply.status

    def events(self) -> Iterator[str]:
        """Yield the data of each event."""
        for line in self._reply:
            if line.startswith(b"data: "):
                yield line.decode().removeprefix("data: ").strip()
        self._connection.close()


def test_sigterm_drains_deregisters_and_ends_with_zero(
    etcd: EtcdServer, start: Start, tmp_path: Path, model_dir: Path
) -> None:
    # on a busy machine the tokens take longer than the drain's default limit
    worker = start(3, "--drain-timeout", "90")
    worker.ready()
    with running_frontend(tmp_path, etcd) as frontend:
        eventually(lambda: model_dir.name in frontend.models(), "the model is listed")
        events = Stream(frontend.port, model_dir.name, 60).events()
        next(events)
        os.kill(worker.rank_zero(), signal.SIGTERM)
        eventually(lambda: not etcd.keys(), "the keys are gone", 10)
        rest = list(events)
        assert rest[-1] == "[DONE]", "the request in flight was finished"
        last = json.loads(rest[-2])
        ends = [choice["finish_reason"] for choice in last.get("choices", [])]
        assert ends == ["length"], f"{last}\n{worker.text()}"
        assert worker.wait() == 0, worker.text()
    assert not worker.ready_file.exists()
    assert "drain: deregistered, 1 request in flight" in worker.text()


@pytest.mark.full
def test_signal_to_all_ranks_at_once_still_drains(etcd: EtcdServer, start: Start) -> None:
    worker = start(3)
    worker.ready()
    for pid in worker.ranks():
        os.kill(pid, signal.SIGTERM)
    assert worker.wait() == 0, worker.text()
    assert etcd.keys() == []


def test_health_follows_the_engine(start: Start) -> None:
    port = system_port()
    worker = start(1, DYN_SYSTEM_PORT=str(port), DYN_SYSTEM_HOST="127.0.0.1")
    worker.ready()
    health = f"http://127.0.0.1:{port}/health"
    eventually(lambda: http_get(health)[0] == 200, "/health is 200", 20)
    assert "ready" in http_get(health)[1]
    assert http_get(f"http://127.0.0.1:{port}/live")[0] == 200


def test_nothing_is_registered_when_a_rank_cannot_load(
    etcd: EtcdServer, start: Start, tmp_path: Path, model_dir: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken, ignore=shutil.ignore_patterns(WEIGHTS_NAME))
    with (model_dir / WEIGHTS_NAME).open("rb") as weights:
        (broken / WEIGHTS_NAME).write_bytes(weights.read(2**24))
    before = etcd.revision()
    worker = start(3, model=broken)
    code = worker.wait()
    assert code in (66, 70), worker.text()
    assert "error in load: ranks" in worker.text()
    assert "Traceback" not in worker.text()
    assert etcd.written("v1/", before) == [], "not even for a moment"


@pytest.mark.full
def test_killed_follower_ends_the_world(start: Start) -> None:
    worker = start(3)
    worker.ready()
    os.kill(worker.ranks()[2], signal.SIGKILL)
    assert worker.wait() != 0


def test_nothing_is_registered_before_the_proof(etcd: EtcdServer, start: Start) -> None:
    before = etcd.revision()
    worker = start(3, "--warmup-timeout", "0")
    assert worker.wait() == 124, worker.text()
    assert "the first completion took more than 0 s" in worker.text()
    assert etcd.written("v1/", before) == [], "not even for a moment"


def test_what_does_not_end_in_time_is_cut_off_with_an_error(
    etcd: EtcdServer, start: Start, tmp_path: Path, model_dir: Path
) -> None:
    worker = start(3, "--drain-timeout", "0.1")
    worker.ready()
    with running_frontend(tmp_path, etcd) as frontend:
        eventually(lambda: model_dir.name in frontend.models(), "the model is listed")
        events = Stream(frontend.port, model_dir.name, 1500).events()
        next(events)
        os.kill(worker.rank_zero(), signal.SIGTERM)
        began = time.monotonic()
        assert worker.wait() == 0, worker.text()
        assert time.monotonic() - began < 6
        rest = [json.loads(event) for event in events if event != "[DONE]"]
    # Dynamo's frontend would make "stop", the end of a whole answer, of "cancelled"
    assert not [choice for event in rest for choice in event.get("choices", ()) if choice.get("finish_reason")], rest
    assert "error" in rest[-1], rest
    assert "requests cut off at the end of the drain: 1" in worker.text()
    # the runtime logs each error that it sends to a frontend
    assert worker.text().count("Traceback") == 1, worker.text()


def test_a_rank_that_lacks_a_package_does_not_hang_the_others(start: Start, tmp_path: Path) -> None:
    shim = tmp_path / "shim"
    shim.mkdir()
    (shim / "numpy.py").write_text(
        "import os\nif os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n    raise ImportError('no numpy here')\n"
        "import sys\nsys.path.remove(os.path.dirname(__file__))\ndel sys.modules['numpy']\nimport numpy\n"
    )
    worker = start(3, PYTHONPATH=f"{shim}{os.pathsep}{ROOT}")
    assert worker.wait() == 70, worker.text()
    assert "error in load: rank 1 on" in worker.text()
    assert "no numpy here" in worker.text()


def test_a_follower_that_hangs_does_not_hold_the_end_up(etcd: EtcdServer, start: Start) -> None:
    worker = start(3)
    worker.ready()
    os.kill(worker.ranks()[1], signal.SIGSTOP)
    os.kill(worker.rank_zero(), signal.SIGTERM)
    assert worker.wait(60) == 124, worker.text()
    assert "did not stop within" in worker.text()
    assert re.search(r"where the ranks are:\nrank [12] on \S+: no answer", worker.text()), worker.text()
    assert etcd.keys() == []


def test_a_port_that_is_taken_is_no_reason_to_start_again(start: Start) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:  # noqa: S104 - the runtime binds all addresses, too
        worker = start(1, DYN_TCP_RPC_PORT=str(taken.getsockname()[1]))
        assert worker.wait() == 64, worker.text()
    assert "can't bind its port" in worker.text()
    assert "ready:" not in worker.text()


@pytest.mark.landing("config.json-65-architectures")
@pytest.mark.parametrize(
    ("broken", "code", "word"), [("tokenizer.json", 66, "tokenizer"), ("config.json", 65, "architectures")]
)
def test_a_model_that_the_frontend_cannot_serve_is_not_registered(
    etcd: EtcdServer, start: Start, tmp_path: Path, model_dir: Path, broken: str, code: int, word: str
) -> None:
    folder = tmp_path / "incomplete"
    folder.mkdir()
    for file in model_dir.iterdir():
        if file.name != broken:
            (folder / file.name).symlink_to(file)
    if broken == "config.json":
        (folder / broken).write_text("{}")
    before = etcd.revision()
    worker = start(1, model=folder)
    assert worker.wait() == code, worker.text()
    assert word in worker.text()
    assert etcd.revision() == before
