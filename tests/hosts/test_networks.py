# SPDX-License-Identifier: Apache-2.0
"""Workers over two hosts of a closed network: no default route, and names that stand for nothing."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.deploy.programs import find_etcd
from dynamo_mpi.deploy.services import Etcd, Frontend
from tests.conftest import ROOT, find_mpirun, mpi_environment
from tests.dynamo.running import eventually
from tests.namespaces.commands import InsideProcess

from .conftest import MakeHosts
from .hosts import Hosts

pytestmark = pytest.mark.hosts

FIRST, SECOND = "h1", "h2"
# the hosts' networks are their own: no port of them is taken
ETCD_PORT, FRONTEND_PORT = 2379, 8000
OUR_MODULES = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
ASK = """
import json, sys, time, urllib.request
url, model = sys.argv[1:]
body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4}
end = time.monotonic() + 60
while True:
    try:
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        print(json.load(urllib.request.urlopen(request, timeout=60))["usage"]["completion_tokens"])
        break
    except OSError:
        if time.monotonic() > end:
            raise
        time.sleep(0.1)
"""


class Closed:
    """Two hosts, with etcd and the frontend on the first.

    Args:
        hosts: running.
        folder: that they see.
        model: the model's folder, which they see.
    """

    def __init__(self, hosts: Hosts, folder: Path, model: Path) -> None:
        self.hosts, self._folder, self._model = hosts, folder, model
        self.etcd = Etcd(find_etcd(), ETCD_PORT, folder / "etcd", host=hosts.address(FIRST))
        self.discovery = {"ETCD_ENDPOINTS": self.etcd.url, "DYN_REQUEST_PLANE": "tcp", "DYN_LOG": "warn"}
        self.frontend = Frontend(
            FRONTEND_PORT, self.discovery, folder, host=hosts.address(FIRST), reach=hosts.address(FIRST)
        )
        self._count = 0

    def serve(self, services: ExitStack) -> None:
        """Start etcd and the frontend."""
        for service, path in ((self.etcd, "/health"), (self.frontend, "/live")):
            log = (self._folder / f"{service.name}.log").open("wb")
            environment = {**OUR_MODULES, **self.discovery, **service.environment()}
            process = self.hosts.popen(FIRST, service.command(), environment, stdout=log, stderr=log)
            services.callback(process.end)
            eventually(lambda url=service.url + path: self._answers(url), f"{service.name} answers", 60)  # type: ignore[misc]

    def begin(self, *flags: str) -> tuple[InsideProcess, Path, Path]:
        """Start a worker with one rank on each host; returns it, its ready file, and its log."""
        self._count += 1
        folder = self._folder / f"worker-{self._count}"
        folder.mkdir()
        ready, log, config = folder / "ready.json", folder / "log", folder / "engine.yaml"
        config.write_text("tensor_parallel_size: 1\npipeline_parallel_size: 2\n")
        # Open MPI itself takes Docker's network, and the like, for one
        mpi = {"OMPI_MCA_mpi_yield_when_idle": "1", "OMPI_MCA_btl_tcp_if_exclude": "lo,net9"}
        own = {**OUR_MODULES, **self.discovery, **mpi}
        worker = (sys.executable, "-m", "dynamo_mpi.worker", "--role", "agg", "--engine", "reference")
        files = ("--model", self._model, "--engine-config", config, "--ready-file", ready)
        placed = ("--host", f"{FIRST}:1,{SECOND}:1", "--map-by", "ppr:1:node")
        exported = [word for name in sorted(own) for word in ("-x", name)]
        launched = (find_mpirun(), "--prtemca", "plm_ssh_agent", self.hosts.agent, *placed, *exported)
        with log.open("wb") as output:
            words = [str(word) for word in (*launched, *worker, *files, *flags)]
            process = self.hosts.popen(FIRST, words, {**mpi_environment(), **own}, stdout=output, stderr=output)
        return process, ready, log

    def answer(self) -> str:
        """Return how many tokens the frontend's answer has."""
        words = [sys.executable, "-S", "-c", ASK, self.frontend.url, self._model.name]
        done = self.hosts.run(FIRST, words, timeout=90)
        return done.stdout.strip() or done.stderr

    def published(self) -> str:
        """Return what the instance's key says of its address."""
        program = (
            "import json, sys, urllib.request; "
            "urlopen = urllib.request.urlopen; "
            'body = json.dumps({"key": "djEv", "range_end": "djEw"}).encode(); '  # v1/ to v10
            "print(urlopen(sys.argv[1] + '/v3/kv/range', body).read().decode())"
        )
        done = self.hosts.run(FIRST, [sys.executable, "-S", "-c", program, self.etcd.url])
        values: list[Any] = [
            json.loads(base64.b64decode(entry["value"])) for entry in json.loads(done.stdout).get("kvs", ())
        ]
        found = [value["transport"]["tcp"] for value in values if "tcp" in (value.get("transport") or {})]
        return str(found[0]).partition(":")[0] if found else done.stdout + done.stderr

    def _answers(self, url: str) -> bool:
        program = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)"
        return self.hosts.run(FIRST, [sys.executable, "-S", "-c", program, url]).returncode == 0


@contextmanager
def closed_hosts(make_hosts: MakeHosts, folder: Path, model: Path, second_rate: str = "") -> Iterator[Closed]:
    """Build two hosts whose names stand for nothing, with the services on the first."""
    with ExitStack() as services:
        closed = Closed(make_hosts(2, resolvable=False, second_rate=second_rate), folder, model)
        closed.serve(services)
        yield closed


@pytest.fixture(scope="module")
def closed(make_hosts: MakeHosts, tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Closed]:
    """Two hosts with one network between them."""
    with closed_hosts(make_hosts, tmp_path_factory.mktemp("closed"), model_dir) as found:
        yield found


@pytest.fixture(scope="module")
def closed_twice(make_hosts: MakeHosts, tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Closed]:
    """Two hosts with two networks between them, and what looks like a third, Docker's: each host has it for itself."""
    with closed_hosts(make_hosts, tmp_path_factory.mktemp("closed-twice"), model_dir, "1gbit") as found:
        for host in found.hosts.names:
            for words in (
                "ip link add net9 type veth peer name net9-end",
                "ip address add 172.30.0.1/16 dev net9",
                "ip link set net9 up",
                "ip link set net9-end up",
            ):
                assert found.hosts.run(host, words.split()).returncode == 0
        yield found


def serves(closed: Closed, flags: Sequence[str], address: str) -> str:
    """Start a worker, have it answer, end it, and return what it has said."""
    worker, ready, log = closed.begin(*flags)
    try:
        eventually(lambda: ready.exists() or worker.poll() is not None, "the ready file", 90)
        assert ready.exists(), log.read_text()
        assert closed.answer() == "4"
        assert closed.published() == address
    finally:
        worker.end()
    return log.read_text()


def refused(closed: Closed, *flags: str) -> str:
    """Start a worker that is to be refused, and return what it has said."""
    worker, ready, log = closed.begin(*flags)
    try:
        eventually(lambda: worker.poll() is not None, "its end", 60)
    finally:
        worker.end()
    assert worker.returncode == 64, log.read_text()
    assert not ready.exists()
    return log.read_text()


def test_a_worker_over_hosts_whose_names_stand_for_nothing(closed: Closed) -> None:
    said = serves(closed, (), closed.hosts.address(FIRST))
    assert "network: 10.213.78.0/24 (eth0, 10 Gb/s), which all hosts share" in said
    assert "127.0.0.1" not in said


@pytest.mark.full
def test_of_two_networks_one_is_chosen_and_named(closed_twice: Closed) -> None:
    said = serves(closed_twice, (), closed_twice.hosts.address(FIRST))
    assert "network: 10.213.78.0/24 (eth0, 10 Gb/s) of 2 that all hosts share; --liveness-network chooses" in said


def test_the_user_chooses_another_network(closed_twice: Closed) -> None:
    # etcd is in the first one, and so are the clients of this worker
    said = serves(closed_twice, ("--liveness-network", "10.213.79.0/24"), closed_twice.hosts.address(FIRST))
    assert "network: 10.213.79.0/24, rank 0 at 10.213.79.1" in said


@pytest.mark.landing("eth1-1 of 2 hosts have no address by eth1: h2")
@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ("eth1", "1 of 2 hosts have no address by eth1: h2"),
        ("10.99.0.0/16", "rank 0's host h1 has no address by 10.99.0.0/16"),
        ("lo", "rank 0's host h1 has no address by lo"),
        ("net9", "net9 is not one network: h1 and h2 both have 172.30.0.1"),
    ],
)
def test_a_network_that_not_all_hosts_have_is_refused(closed_twice: Closed, choice: str, says: str) -> None:
    own = f"{closed_twice.hosts.address(SECOND, 1)}/24"
    if choice == "eth1":
        assert closed_twice.hosts.run(SECOND, ["ip", "address", "delete", own, "dev", "eth1"]).returncode == 0
    try:
        said = refused(closed_twice, "--liveness-network", choice)
    finally:
        if choice == "eth1":
            closed_twice.hosts.run(SECOND, ["ip", "address", "add", own, "dev", "eth1"])
    assert says in said
    assert said.count("error:") == 1
    assert "preflight: ok" not in said
