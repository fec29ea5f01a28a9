# SPDX-License-Identifier: Apache-2.0
"""Where the ranks of a node meet their agent, with other users of the node who want to be there first."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_mpi.config.sources import EarlySettings
from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo
from dynamo_mpi.runtime.agent_process import AgentStarter
from dynamo_mpi.supervisor.agent_client import NodeAgentClient
from dynamo_mpi.supervisor.agent_socket import agent_addresses, connect_to_agent, listen_for_ranks, remove_address
from dynamo_mpi.telemetry.health_address import HealthAddress, HealthEndpoint
from tests.unit.neighbour import NOBODY, become_neighbour, needs_root

TWO = LaunchInfo(Launcher.OPEN_MPI, size=2)


def world(tmp_path: Path | None = None) -> dict[str, str]:
    """Return the variables of a world that no other test has."""
    variables = {"PMIX_NAMESPACE": f"prterun-test-{os.getpid()}-{time.monotonic_ns()}@1"}
    return variables if tmp_path is None else {**variables, "PMIX_SERVER_TMPDIR": str(tmp_path)}


@contextlib.contextmanager
def squatter(addresses: tuple[str, ...]) -> Iterator[None]:
    """Another user listens at these addresses, and accepts nothing. Its backlog is full."""
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        try:
            become_neighbour()
            listeners = [listen_for_ranks((address,), 0) for address in addresses]
            crowd = [connect_to_agent((address,)) for address in addresses for _ in range(2)]
            os.write(ready[1], b"x")
            os.read(done[0], 1)
            del listeners, crowd
        finally:
            os._exit(0)
    os.close(ready[1])
    assert os.read(ready[0], 1) == b"x", "the other user could not listen"
    try:
        yield
    finally:
        os.write(done[1], b"x")
        os.waitpid(pid, 0)
        for end in (ready[0], *done):
            os.close(end)


def test_worlds_that_share_a_node_do_not_share_an_address() -> None:
    step = LaunchInfo(Launcher.SLURM_PMIX, size=2, job_id="7", step_id="1")
    addresses = [
        agent_addresses(
            TWO, {"PMIX_NAMESPACE": "prterun-host-7@1", "PMIX_SERVER_URI4": "pmix.0;tcp4://127.0.0.1:4001"}
        ),
        # another container with a pid namespace of its own, and this network
        agent_addresses(
            TWO, {"PMIX_NAMESPACE": "prterun-host-7@1", "PMIX_SERVER_URI4": "pmix.0;tcp4://127.0.0.1:4002"}
        ),
        agent_addresses(step, {}),
        agent_addresses(step._replace(step_id="2"), {}),
        agent_addresses(TWO, {"PMIX_NAMESPACE": "prterun-" + "very-long-name." * 20 + "@1"}),
    ]
    names = [name for each in addresses for name in each]
    assert len(set(names)) == len(names)
    assert all(name.startswith("\0dynamo_mpi ") and len(name) <= 107 for name in names)


def test_a_rank_that_is_alone_or_in_an_unknown_world_has_none() -> None:
    alone = LaunchInfo(Launcher.SLURM_PMIX, size=1, job_id="7", step_id="1")
    assert agent_addresses(alone, {"PMIX_NAMESPACE": "x"}) == ()
    assert agent_addresses(LaunchInfo(Launcher.HYDRA, size=2), {}) == ()


def test_the_launchers_private_folder_comes_first(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir(mode=0o700)
    addresses = agent_addresses(TWO, world(folder))
    listener = listen_for_ranks(addresses, 8)
    (file,) = folder.iterdir()
    assert stat.S_ISSOCK(file.stat().st_mode)
    assert connect_to_agent(addresses) is not None
    # a successor of an agent that was killed
    listener.close()
    assert connect_to_agent(addresses) is None
    with contextlib.closing(listen_for_ranks(addresses, 8)):
        assert connect_to_agent(addresses) is not None
    remove_address(addresses)
    assert list(folder.iterdir()) == []


@needs_root
@pytest.mark.parametrize(("mode", "owner"), [(0o777, 0), (0o720, 0), (0o700, NOBODY)])
def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path, mode: int, owner: int) -> None:
    tmp_path.chmod(mode)
    os.chown(tmp_path, owner, -1)
    assert all(address.startswith("\0") for address in agent_addresses(TWO, world(tmp_path)))


def test_a_launcher_removes_its_folder_and_ranks_still_meet(tmp_path: Path) -> None:
    folder = tmp_path / "session"
    folder.mkdir(mode=0o700)
    addresses = agent_addresses(TWO, world(folder))
    folder.rmdir()
    with contextlib.closing(listen_for_ranks(addresses, 8)):
        assert connect_to_agent(addresses) is not None


@needs_root
@pytest.mark.slow
def test_another_user_who_is_there_first_holds_no_rank_up() -> None:
    variables = world()
    addresses = agent_addresses(TWO, variables)
    with squatter(addresses[:1]):
        start = time.monotonic()
        assert connect_to_agent(addresses) is None
        assert time.monotonic() - start < 0.5
        with contextlib.closing(listen_for_ranks(addresses, 8)) as listener:
            assert listener.getsockname() == addresses[1].encode()
            client = NodeAgentClient(TWO, variables, None)
            assert client.connected
            client.detach()


@needs_root
@pytest.mark.slow
def test_another_user_who_takes_all_names_costs_a_second_at_most() -> None:
    variables = world()
    addresses = agent_addresses(TWO, variables)
    with squatter(addresses):
        start = time.monotonic()
        client = NodeAgentClient(TWO, variables, None)
        assert time.monotonic() - start < 2
        assert not client.connected
        client.detach()
        with pytest.raises(OSError, match="in use"):
            listen_for_ranks(addresses, 8)


def test_an_agent_that_cannot_listen_says_what_to_do(capfd: pytest.CaptureFixture[str]) -> None:
    variables = world()
    addresses = agent_addresses(TWO, variables)
    with contextlib.ExitStack() as stack:
        for address in addresses:
            stack.enter_context(contextlib.closing(listen_for_ranks((address,), 0)))
        assert AgentStarter(TWO, "n1", EarlySettings(), variables)._listen_or_warn() is None
    said = capfd.readouterr().err
    assert "the node agent watches rank 0 alone: the other ranks of this node are watched by rank 0 only" in said
    assert "ss -xlp | grep dynamo_mpi" in said


@pytest.mark.parametrize("serves_health", [False, True])
def test_no_agent_means_no_health_either(
    serves_health: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    listener = socket.socket()
    health = HealthEndpoint(HealthAddress("127.0.0.1", 0), listener) if serves_health else None
    assert AgentStarter(TWO, "n1", EarlySettings(), world(), health).spawn() is None
    said = capfd.readouterr().err
    assert "no node agent watches the ranks of this node" in said
    assert ("/health, /live and /metrics are not served here" in said) == serves_health
    assert (listener.fileno() == -1) == serves_health
    listener.close()
