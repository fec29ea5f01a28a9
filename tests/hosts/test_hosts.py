# SPDX-License-Identifier: Apache-2.0
"""The hosts themselves: what each has of its own, how they reach each other, and that nothing of them stays."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.dynamo.running import eventually
from tests.namespaces.anchor import remove_leftovers
from tests.namespaces.processes import ProcessIdentity

from .conftest import FindLauncher, MakeHosts
from .hosts import Hosts
from .launchers import NAMES

pytestmark = pytest.mark.hosts
REACH = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5).close()"
LISTEN = """
import socket, sys
with socket.create_server((sys.argv[1], 7000)) as server:
    print("listens", flush=True)
    server.accept()
"""
# one write for each line, as some launchers don't keep several together
RANK = """
import os, socket
from mpi4py import MPI
os.write(1, f"{MPI.COMM_WORLD.rank} {socket.gethostname()} {MPI.COMM_WORLD.allreduce(1)}\\n".encode())
"""
KEPT = """
import json, sys, time
from tests.hosts.hosts import Hosts
hosts = Hosts(2)
hosts.start()
hosts.popen("h2", ["sleep", "1000"])
print(json.dumps([str(hosts.settings.state), hosts.init_pid("h1"), *hosts.pids("h2"), hosts.init_pid("h2")]), flush=True)
time.sleep(1000)
"""


def reaches(hosts: Hosts, name: str, network: int = 0) -> bool:
    """Return whether h1 reaches h2 by a name or an address, where h2 listens at its address in a network."""
    with hosts.popen("h2", [sys.executable, "-c", LISTEN, hosts.address("h2", network)]) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "listens\n"
        reached = hosts.run("h1", [sys.executable, "-c", REACH, name, "7000"]).returncode == 0
        server.end()
    return reached


def test_each_host_has_its_own_name_memory_and_temporary_folder(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "shared").touch()
    for host in hosts.names:
        line = f"hostname; touch /tmp/{host} /dev/shm/{host}; ls /tmp /dev/shm; ls {tmp_path}"
        words = hosts.run(host, ["sh", "-c", line]).stdout.split()
        assert words[0] == host
        assert "shared" in words
        assert words.count(host) == 3
        assert not {"h1", "h2"} - {host} & set(words)
        hosts.run(host, ["rm", f"/tmp/{host}", f"/dev/shm/{host}"])


@pytest.mark.full
def test_hosts_reach_each_other_by_name_and_no_other_host(hosts: Hosts) -> None:
    assert reaches(hosts, "h2")
    assert hosts.run("h1", ["ip", "route", "show", "default"]).stdout == ""


def test_a_closed_network_has_addresses_without_names(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(2, resolvable=False)
    assert hosts.run("h1", ["getent", "hosts", "h1", "h2"]).stdout == ""
    assert reaches(hosts, hosts.address("h2"))


@pytest.mark.full
def test_a_second_network_is_slower(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(2, second_rate="100mbit")
    assert reaches(hosts, hosts.address("h2", 1), 1)
    assert "rate 100Mbit" in hosts.run("h2", ["tc", "qdisc", "show", "dev", "eth1"]).stdout


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_each_launcher_starts_ranks_on_both_hosts(name: str, hosts: Hosts, find: FindLauncher) -> None:
    launcher = find(name)
    variables = launcher.rank_environment()
    command = launcher.command(hosts, hosts.names, 1, list(variables), [sys.executable, "-c", RANK])
    done = hosts.run("h1", command, {**variables, **launcher.environment(hosts)})
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(["0", "h1", "2", "1", "h2", "2"])


@pytest.mark.full
def test_all_goes_with_the_process_that_made_them(hosts: Hosts) -> None:
    with subprocess.Popen([sys.executable, "-c", KEPT], cwd=ROOT, text=True, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        state, *pids = json.loads(owner.stdout.readline())
        started = [ProcessIdentity.of(pid) for pid in pids]
        assert len(started) >= 3
        assert all(process and process.is_alive() for process in started)
        owner.send_signal(signal.SIGKILL)
    eventually(lambda: not any(process and process.is_alive() for process in started), "they are gone", 10)
    remove_leftovers()
    assert not Path(state).exists()
