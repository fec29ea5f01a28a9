# SPDX-License-Identifier: Apache-2.0
"""Pods that are one worker: what may be started in one, who may come in, and what mpirun is given."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dynamo_mpi.common.errors import AuthorizationError, DynamoMpiError, PhaseTimeoutError, UsageError
from dynamo_mpi.common.ports import free_port
from dynamo_mpi.common.subprocess import session_members
from dynamo_mpi.deploy.kubernetes.agent import read_agent_words, refuse_other_than_daemon
from dynamo_mpi.deploy.kubernetes.leader_pod import LeaderPod, mpirun_environment
from dynamo_mpi.deploy.kubernetes.settings import JoinSettings, LeadSettings, load_join, load_lead
from dynamo_mpi.deploy.kubernetes.wire import Channel, accept, enable_keepalive, join
from dynamo_mpi.deploy.kubernetes.worker_pod import WorkerPod

SECRET = b"0123456789abcdef"
# as mpirun of Open MPI 5.0.11 and 4.1.4 gave them, shortened
OPEN_MPI_5 = (
    "lws-0-1",
    "PRTE_PREFIX=/opt/m;export PRTE_PREFIX;LD_LIBRARY_PATH=/opt/m/lib:$LD_LIBRARY_PATH;export LD_LIBRARY_PATH;/opt/m/bin/prted"
    ' --leave-session-attached --prtemca ess "env" --prtemca ess_base_nspace "prterun-lws-0-7@0" --prtemca ess_base_vpid 1'
    ' --prtemca prte_hnp_uri "prterun-lws-0-7@0.0;tcp://10.0.0.1:45471:24;tcp6://[fd00::2]:50865:64"'
    ' --prtemca plm_ssh_agent "/usr/bin/python3 -m dynamo_mpi.deploy.kubernetes.agent"'
    ' --prtemca prte_local_tmpdir_base "/tmp/x" --prtemca plm "ssh"',
)
OPEN_MPI_4 = (
    *("-x", "-o", "ConnectionAttempts=10", "lws-0-2"),
    '    PATH=/opt/m/bin:$PATH ; export PATH ;   /opt/m/bin/orted --leave-session-attached -mca ess "env" -mca ess_base_vpid 2'
    ' -mca orte_node_regex "lws-[1:0],lws-[1:0]-1@0(2)" -mca orte_hnp_uri "23.0;tcp://10.0.0.1:39192" -mca plm_rsh_agent "python"',
)


def test_of_what_mpirun_says_the_daemon_and_its_arguments_remain() -> None:
    five = read_agent_words(OPEN_MPI_5)
    assert (five.host, five.daemon) == ("lws-0-1", "prted")
    assert five.arguments[:4] == ("--leave-session-attached", "--prtemca", "ess", "env")
    assert "prterun-lws-0-7@0.0;tcp://10.0.0.1:45471:24;tcp6://[fd00::2]:50865:64" in five.arguments
    assert five.arguments[-3:] == ("--prtemca", "plm", "ssh")
    assert not {"plm_ssh_agent", "prte_local_tmpdir_base"} & set(five.arguments)
    four = read_agent_words(OPEN_MPI_4)
    assert (four.host, four.daemon) == ("lws-0-2", "orted")
    assert four.arguments[-3:] == ("-mca", "orte_hnp_uri", "23.0;tcp://10.0.0.1:39192")
    for command in (five, four):
        assert refuse_other_than_daemon(command.daemon, list(command.arguments)) == command[1:]


@pytest.mark.parametrize("words", [(), ("host",), ("-x", "host"), ("host", 'prted "')])
def test_what_is_no_command_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"command|quotation"):
        read_agent_words(words)


@pytest.mark.parametrize(
    ("daemon", "arguments"),
    [
        ("bash", ["-c", "id"]),
        ("/tmp/orted", []),
        (["orted"], []),
        ("orted", "-mca ess env"),
        ("orted", ["; id"]),
        ("orted", ["-mca", "ess"]),
        ("orted", ["-mca", "mca_base_component_path", "/tmp"]),
        ("prted", ["--prtemca", "prte_launch_agent", "/tmp/x"]),
        ("prted", ["--prtemca", "odls_base_fork_agent", "/tmp/x"]),
        ("prted", ["--prtemca", "a b", "c"]),
        ("prted", ["--debug-daemons"]),
        ("prted", ["--prtemca", "ess", "a\0b"]),
        ("prted", ["--prtemca", "ess", 1]),
        ("prted", ["--prtemca", "ess", "env"] * 100),
        ("prted", ["--prtemca", "ess", "x" * 10_000]),
    ],
)
def test_a_pod_starts_nothing_but_a_daemon(daemon: object, arguments: object) -> None:
    with pytest.raises(ValueError, match=r"daemon|argument"):
        refuse_other_than_daemon(daemon, arguments)


async def _connect_pair(theirs: bytes, index: int = 1) -> tuple[object, object, Channel | None, Channel | None]:
    let_in: asyncio.Future[tuple[Channel, int, str] | None] = asyncio.get_running_loop().create_future()

    async def admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found = await accept(reader, writer, SECRET)
        let_in.set_result(found)
        if found is None:
            writer.close()

    server = await asyncio.start_server(admit, "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        refused: object = None
        mine = None
        try:
            mine = await join(reader, writer, theirs, index, "lws-0-1")
        except AuthorizationError as error:
            refused = error
        found = await let_in
        if mine is not None and found is not None:
            mine.send({"stop": 15})
            found[0].send({"end": 3})
            said = (await found[0].receive(), await mine.receive())
            await mine.close()
            await found[0].close()
            return said, found[1:], mine, found[0]
        writer.close()
        return refused, None, None, None


def test_who_knows_the_secret_comes_in_and_both_hear_each_other() -> None:
    said, who, _, _ = asyncio.run(asyncio.wait_for(_connect_pair(SECRET), 20))
    assert said == ({"stop": 15}, {"end": 3})
    assert who == (1, "lws-0-1")


def test_who_does_not_is_refused_on_both_sides() -> None:
    refused, who, _, _ = asyncio.run(asyncio.wait_for(_connect_pair(b"another secret, as long"), 20))
    assert isinstance(refused, AuthorizationError)
    assert who is None


@pytest.mark.parametrize("proof", ["\ud800", "\u00e9", "x"])
def test_a_stranger_that_sends_no_text_is_refused_without_a_traceback(proof: str) -> None:
    async def stranger() -> object:
        reader = asyncio.StreamReader()
        said = {"index": 1, "host": "h", "nonce": "n", "proof": proof}
        reader.feed_data(json.dumps(said).encode() + b"\n")
        writer = type("Writer", (), {"write": lambda *_: None})()
        return await accept(reader, writer, SECRET)

    assert asyncio.run(stranger()) is None


def lead_settings(mpirun: str, pods: int, timeout: float) -> LeadSettings:
    return LeadSettings(pods, 1, "127.0.0.1", mpirun, SECRET, free_port(), timeout, ("true",))


async def _end_of(settings: LeadSettings, folder: Path, ready: Callable[[], object] = lambda: None) -> list[object]:
    """Return how the leader ends, and what a pod that has joined receives; ``ready`` is called once that has."""
    joined = asyncio.Event()
    leading = asyncio.ensure_future(
        LeaderPod(settings, folder, lambda text: joined.set() if "joined: " in text else None).run()
    )
    channel = None
    while channel is None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", settings.port)
        except OSError:
            await asyncio.sleep(0.01)
            continue
        enable_keepalive(writer)
        channel = await join(reader, writer, SECRET, 1, "lws-0-1")
    await joined.wait()
    ready()
    try:
        ended: object = await leading
    except DynamoMpiError as error:
        ended = error
    message = await channel.receive()
    await channel.close()
    return [ended, message]


@pytest.mark.parametrize(
    ("mpirun", "pods", "kind", "code"), [("/nowhere/mpirun", 2, UsageError, 64), ("mpirun", 3, PhaseTimeoutError, 124)]
)
def test_the_others_leave_with_the_code_of_what_keeps_the_leader_from_starting(
    mpirun: str, pods: int, kind: type[DynamoMpiError], code: int, tmp_path: Path
) -> None:
    ended, message = asyncio.run(asyncio.wait_for(_end_of(lead_settings(mpirun, pods, 0.5), tmp_path), 20))
    assert isinstance(ended, kind)
    assert ended.exit_code == code
    assert message == {"end": code}


def test_a_pod_joins_beside_hundreds_of_idle_connections(tmp_path: Path) -> None:
    async def joined_in_a_crowd() -> tuple[bool, list[str]]:
        settings = lead_settings("mpirun", 3, 5)
        printed: list[str] = []
        crowd: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        leading = asyncio.ensure_future(LeaderPod(settings, tmp_path, printed.append).run())
        while len(crowd) < 300:
            try:
                crowd.append(await asyncio.open_connection("127.0.0.1", settings.port))
            except OSError:
                await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection("127.0.0.1", settings.port)
        channel = await join(reader, writer, SECRET, 1, "lws-0-1")
        for _, stranger in crowd:
            stranger.close()
        if channel is not None:
            await channel.close()
        leading.cancel()
        await asyncio.wait([leading])
        return channel is not None, [line for line in printed if "rejected" in line]

    is_in, rejections = asyncio.run(asyncio.wait_for(joined_in_a_crowd(), 20))
    assert is_in
    assert len(rejections) == 1, "the others are counted, not logged"


def test_a_signal_that_comes_while_mpirun_starts_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = asyncio.create_subprocess_exec

    async def slowly(*words: str, **options: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)  # the loop takes note of it
        return await start(*words, **options)  # type: ignore[arg-type] # handed on as they came

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slowly)
    endless = f"{sys.executable} -c 'import time; time.sleep(60)'"
    ended, message = asyncio.run(asyncio.wait_for(_end_of(lead_settings(endless, 2, 10), tmp_path), 20))
    assert (ended, message) == (143, {"end": 143})


def test_ranks_of_a_daemon_that_was_killed_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # like Open MPI's: each in a process group of its own
    daemon = tmp_path / "orted"
    rank = "import os, time; os.setpgid(0, 0); print(os.getpid(), flush=True); time.sleep(60)"
    daemon.write_text(
        f"#!{sys.executable}\nimport os, subprocess\nsubprocess.Popen({[sys.executable, '-c', rank]!r}).wait()\n"
    )
    daemon.chmod(0o755)

    async def end() -> None:
        joiner = WorkerPod(JoinSettings("127.0.0.1", 1, SECRET, 1, 1.0), "lws-0-1", tmp_path, lambda _: None)
        assert await joiner._start("orted", []) == {"started": True}
        process = joiner._daemon
        assert process is not None
        while len(session_members(process.pid)) < 2:
            await asyncio.sleep(0.02)
        process.kill()
        await joiner._end_daemon()
        while session_members(process.pid):
            await asyncio.sleep(0.02)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    asyncio.run(asyncio.wait_for(end(), 20))


def test_a_folder_whose_path_is_too_long_for_a_socket_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 110)
    folder.mkdir()
    with pytest.raises(UsageError, match="TMPDIR"):
        asyncio.run(LeaderPod(lead_settings("mpirun", 1, 1), folder, lambda _: None).run())


def test_a_message_that_was_altered_or_comes_again_ends_the_connection() -> None:
    async def hear(*lines: bytes) -> list[object]:
        reader = asyncio.StreamReader()
        channel = Channel(reader, None, b"key", "lead", "pod")  # type: ignore[arg-type]  # nothing is sent
        for line in lines:
            reader.feed_data(line)
        reader.feed_eof()
        return [await channel.receive() for _ in lines]

    sent: list[bytes] = []

    class Writer:
        def write(self, data: bytes) -> None:
            sent.append(data)

    sender = Channel(None, Writer(), b"key", "pod", "lead")  # type: ignore[arg-type]  # a writer that keeps what it gets
    sender.send({"stop": 2})
    assert asyncio.run(hear(sent[0])) == [{"stop": 2}]
    assert asyncio.run(hear(sent[0], sent[0])) == [{"stop": 2}, None]
    assert asyncio.run(hear(sent[0].replace(b"2}", b"9}"))) == [None]
    assert asyncio.run(hear(b"\xff {}\n")) == [None]


def test_mpirun_gets_our_agent_and_not_the_operators_settings(tmp_path: Path) -> None:
    environ = {
        "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
        "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
        "OMPI_MCA_orte_set_default_slots": "8",
        "OMPI_MCA_btl": "tcp,self",
        "MODEL_PATH": "/models/M",
    }
    found = mpirun_environment(environ, tmp_path)
    assert found["OMPI_MCA_plm_rsh_agent"] == found["PRTE_MCA_plm_ssh_agent"]
    assert found["OMPI_MCA_plm_rsh_agent"].endswith("-m dynamo_mpi.deploy.kubernetes.agent")
    assert set(environ) & set(found) == {"OMPI_MCA_btl", "MODEL_PATH"}


def test_a_pod_knows_its_place_by_lws_or_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SECRET + b"\n")
    environ = {"DYN_MPI_PODS_SECRET_FILE": str(tmp_path / "secret"), "LWS_LEADER_ADDRESS": "lws-0.lws"}
    assert load_join([], environ | {"LWS_WORKER_INDEX": "3"}, "x").index == 3
    found = load_join([], environ, "job-worker-7")
    assert (found.index, found.leader, found.secret) == (7, "lws-0.lws", SECRET)
    with pytest.raises(UsageError, match="doesn't end with a number"):
        load_join([], environ, "pod")
    leader = load_lead(["--ranks-per-pod", "8", "--", "id", "-u"], environ | {"LWS_GROUP_SIZE": "2"})
    assert (leader.pods, leader.ranks_per_pod, leader.command) == (2, 8, ("id", "-u"))


@pytest.mark.parametrize(
    ("words", "content", "said"),
    [
        (["--leader", "x"], None, "no secret was given"),
        (["--leader", "x"], b"short", "has 5 bytes"),
        ([], SECRET, "the leader wasn't given"),
        (["--leader", "x", "--port", "0"], SECRET, "flag --port is '0'"),
        (["--leader", "x", "--nonsense"], SECRET, "Unrecognized arguments: --nonsense"),
    ],
)
def test_what_a_pod_cannot_do_without_is_reported(
    words: list[str], content: bytes | None, said: str, tmp_path: Path
) -> None:
    environ = {}
    if content is not None:
        (tmp_path / "secret").write_bytes(content)
        environ["DYN_MPI_PODS_SECRET_FILE"] = str(tmp_path / "secret")
    with pytest.raises(UsageError, match=said):
        load_join(words, environ, "pod-1")
