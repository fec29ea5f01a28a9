# SPDX-License-Identifier: Apache-2.0
"""Another user on another host, without credentials: idle connections at every port of a deployment over two hosts while it starts, serves,
and loses a rank.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.common.credentials import SERVICES_FILE
from dynamo_mpi.ops.listeners import Found, Reach, find_listeners
from tests.conftest import ROOT, find_mpirun, mpi_environment
from tests.dynamo.running import eventually, pem_lines, started_with
from tests.unit.neighbour import NOBODY

from .conftest import MakeHosts
from .hosts import Hosts
from .test_networks import OUR_MODULES

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="no Python that another user may run"),
]

PROGRAM = ROOT / "tests/dynamo/programs/strangers.py"
FIRST, SECOND, THIRD = "h1", "h2", "h3"
CONNECTIONS = 200
REQUESTS = 20
START_SECONDS = 120.0
ASK = """
import json, sys, time, urllib.request
url, model, count = sys.argv[1:]
end = time.monotonic() + 60
while model not in str(json.load(urllib.request.urlopen(f"{url}/v1/models", timeout=30))) and time.monotonic() < end:
    time.sleep(0.1)  # the frontend finds it a moment after it has registered
body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4}
for _ in range(int(count)):
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    print(json.load(urllib.request.urlopen(request, timeout=60))["usage"]["completion_tokens"], flush=True)
"""


PROBE = """
import sys, urllib.request
for _ in range(int(sys.argv[1])):
    for host in sys.argv[2:]:
        print(urllib.request.urlopen(f"http://{host}:9345/live", timeout=10).status, flush=True)
"""


class Strangers:
    """Another user's process on the third host; it gets each port of the others as soon as it is open.

    Args:
        hosts: running.
    """

    def __init__(self, hosts: Hosts) -> None:
        self._hosts, self.seen = hosts, set[tuple[str, int]]()
        self.kinds = set[tuple[str, bool]]()
        words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "/usr/bin/python3", "-c"]
        words += [PROGRAM.read_text(), str(CONNECTIONS)]
        self._process = hosts.popen(THIRD, words, stdin=subprocess.PIPE)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def listeners(self) -> list[tuple[str, Found]]:
        """Return what listens on the other hosts, with the host's address."""
        return [
            (self._hosts.address(host), each)
            for host in (FIRST, SECOND)
            for each in find_listeners(self._hosts.pids(host))
        ]

    def end(self) -> dict[str, int]:
        """End it; return its numbers."""
        self._over.set()
        self._thread.join()
        out, err = self._process.communicate(timeout=30)
        assert out, err
        numbers: dict[str, int] = json.loads(out)
        return numbers

    def _look(self) -> None:
        while not self._over.wait(0.1):
            found = self.listeners()
            self.kinds |= {(each.kind, each.reach is Reach.EVERYWHERE) for _, each in found}
            places = set()
            for address, each in found:
                for place in each.places:
                    own, _, port = place.rpartition(":")
                    if not own.startswith(("127.", "[")):
                        places.add((address if each.reach is Reach.EVERYWHERE else own, int(port)))
            if new := places - self.seen:
                self.seen |= new
                assert self._process.stdin is not None
                self._process.stdin.write(f"{json.dumps(sorted(new))}\n")
                self._process.stdin.flush()


@contextmanager
def head_node(hosts: Hosts, run_dir: Path) -> Iterator[dict[str, Any]]:
    """Run a job's services on the first host; the value is what ``services.json`` says."""
    words = [sys.executable, "-m", "dynamo_mpi.head_node", "--run-dir", str(run_dir), "--address", hosts.address(FIRST)]
    log = run_dir.with_suffix(".log").open("wb")
    process = hosts.popen(FIRST, words, OUR_MODULES, stdout=log, stderr=log)
    try:
        file = run_dir / "services.json"
        eventually(file.exists, f"the services answer: {run_dir.with_suffix('.log')}", 90)
        content: dict[str, Any] = json.loads(file.read_text())
        yield content
    finally:
        process.end()


class Worker:
    """A worker with a rank on each of some hosts.

    Args:
        hosts: running.
        folder: for its files.
        model: the model's folder.
        services: the services file.
        role: of the worker.
        on: the hosts of its ranks.
    """

    def __init__(
        self, hosts: Hosts, folder: Path, model: Path, services: Path, *, role: str = "agg", on: Sequence[str]
    ) -> None:
        folder.mkdir()
        self._hosts, self._ready, self._log = hosts, folder / "ready.json", folder / "log"
        config = folder / "engine.yaml"
        config.write_text(f"tensor_parallel_size: 1\npipeline_parallel_size: {len(on)}\n")
        own = {
            **OUR_MODULES,
            SERVICES_FILE: str(services),
            "DYN_REQUEST_PLANE": "tcp",
            "DYN_LOG": "warn",
            "DYN_SYSTEM_PORT": "9345",
            "OMPI_MCA_mpi_yield_when_idle": "1",
        }
        placed = ("--host", ",".join(f"{host}:1" for host in on), "--map-by", "ppr:1:node")
        exported = [word for name in sorted(own) for word in ("-x", name)]
        worker = (sys.executable, "-m", "dynamo_mpi.worker", "--engine", "reference", "--role", role, "--model", model)
        files = ("--engine-config", config, "--ready-file", self._ready, "--failure-dir", folder / "failures")
        words = (find_mpirun(), "--prtemca", "plm_ssh_agent", hosts.agent, *placed, *exported, *worker, *files)
        with self._log.open("wb") as output:
            environment = {**mpi_environment(), **own}
            self.process = hosts.popen(on[0], [str(word) for word in words], environment, stdout=output, stderr=output)

    def text(self) -> str:
        return self._log.read_text(errors="replace")

    def ready(self) -> None:
        eventually(lambda: self._ready.exists() or self.process.poll() is not None, self.text(), START_SECONDS)
        assert self._ready.exists(), self.text()

    def rank(self, host: str) -> int:
        """Return the rank of a host, as this machine numbers it."""
        (pid,) = (
            pid
            for pid in self._hosts.pids(host)
            if b"dynamo_mpi.worker" in words_of(pid)
            and b"mpirun" not in words_of(pid)[0]
            and words_of(pid)[0].endswith(b"python")
        )
        return pid


def words_of(pid: int) -> Sequence[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return [b""]


def ask(hosts: Hosts, url: str, model: str) -> tuple[list[str], str]:
    """Return what each of `REQUESTS` requests has brought, and the client's errors."""
    done = hosts.run(FIRST, [sys.executable, "-S", "-c", ASK, url, model, str(REQUESTS)], timeout=150)
    return done.stdout.split(), done.stderr


def test_strangers_at_every_port_change_nothing(make_hosts: MakeHosts, tmp_path: Path, model_dir: Path) -> None:
    hosts = make_hosts(3)
    run_dir = tmp_path / "run"
    with head_node(hosts, run_dir) as services:
        strangers = Strangers(hosts)
        worker = Worker(hosts, tmp_path / "worker", model_dir, run_dir / "services.json", on=(FIRST, SECOND))
        try:
            worker.ready()
            tokens, problem = ask(hosts, services["url"], model_dir.name)
            assert tokens == ["4"] * REQUESTS, f"{problem}\n{worker.text()}"
            places = [hosts.address(FIRST), hosts.address(SECOND)]
            probed = hosts.run(FIRST, [sys.executable, "-S", "-c", PROBE, str(REQUESTS), *places])
            assert probed.stdout.split() == ["200"] * 2 * REQUESTS, probed.stderr

            found = strangers.listeners()
            assert [each for _, each in found if not each.rows] == []
            assert {each.kind for _, each in found} >= {"etcd", "NATS", "frontend", "rank", "node agent", "mpirun"}
            secrets = [services["environment"]["NATS_AUTH_PASSWORD"]]
            secrets += pem_lines(services["environment"]["ETCD_AUTH_CLIENT_KEY"])
            pids = [pid for host in (FIRST, SECOND) for pid in hosts.pids(host)]
            assert started_with(pids, secrets) == {}

            # rank 0's node agent deregisters it, by the services file
            os.kill(worker.rank(FIRST), signal.SIGKILL)
            assert worker.process.wait(60) != 0
            assert "rank 0" in worker.text()
            words = [sys.executable, "-m", "dynamo_mpi", "status", "--output", "json", "--run-dir", str(run_dir)]
            status = hosts.run(FIRST, words, OUR_MODULES)
            assert json.loads(status.stdout)["workers"] == [], status.stdout + status.stderr
        finally:
            worker.process.end()
            numbers = strangers.end()
        # it was there, as somebody else, also at ports that exist only during the start
        assert numbers["uid"] == NOBODY
        assert numbers["opened"] >= CONNECTIONS * len(strangers.seen) > 5 * CONNECTIONS
        assert {"etcd", "frontend", "rank", "node agent", "mpirun"} <= {kind for kind, _ in strangers.kinds}


@pytest.mark.full
def test_strangers_lose_no_request_of_a_pair(make_hosts: MakeHosts, tmp_path: Path, model_dir: Path) -> None:
    """Of those at the prefill worker's KV port, among others."""
    hosts = make_hosts(3)
    run_dir = tmp_path / "run"
    with head_node(hosts, run_dir) as services:
        strangers = Strangers(hosts)
        workers = [
            Worker(hosts, tmp_path / role, model_dir, run_dir / "services.json", role=role, on=(host,))
            for role, host in (("prefill", FIRST), ("decode", SECOND))
        ]
        try:
            for worker in workers:
                worker.ready()
            tokens, problem = ask(hosts, services["url"], model_dir.name)
            texts = "\n".join(worker.text() for worker in workers)
            assert tokens == ["4"] * REQUESTS, f"{problem}\n{texts}"
        finally:
            for worker in workers:
                worker.process.end()
            numbers = strangers.end()
        assert numbers["opened"] > 5 * CONNECTIONS
