# SPDX-License-Identifier: Apache-2.0
"""Another user on the node, and another client on the network, against a deployment with credentials: both get nowhere."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.subprocess import session_members
from dynamo_mpi.deploy.certificates import make_certificates
from dynamo_mpi.discovery.etcd import EtcdAuth
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient
from dynamo_mpi.discovery.records import worlds_of
from dynamo_mpi.ops.listeners import Reach, find_listeners
from tests.dynamo.head_node_command import HeadNodeCommand
from tests.dynamo.running import RunningWorker, eventually, listening, pem_lines, started_with
from tests.dynamo.test_head_node import ask, check_nats
from tests.unit.neighbour import NOBODY, needs_root

pytestmark = [
    pytest.mark.dynamo,
    needs_root,
    pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="no Python that another user may run"),
]

NEIGHBOUR = Path(__file__).parent / "programs" / "neighbour.py"
RANKS = 3
MARKER = "a secret that anybody may read"


@dataclass(frozen=True)
class Deployment:
    """What the neighbour finds."""

    folder: Path
    head: HeadNodeCommand
    services: Mapping[str, Any]
    worker: RunningWorker

    @property
    def environment(self) -> dict[str, str]:
        """What workers get, the secrets among it."""
        return dict(self.services["environment"])

    @property
    def secrets(self) -> list[str]:
        """What no other user may see."""
        return [self.environment["NATS_AUTH_PASSWORD"], *pem_lines(self.environment["ETCD_AUTH_CLIENT_KEY"])]

    def keys(self) -> dict[str, tuple[int, int]]:
        """Return what stands in etcd: each key's revision and lease."""
        with contextlib.closing(
            GrpcEtcdClient([self.environment["ETCD_ENDPOINTS"]], EtcdAuth.from_env(self.environment), 5)
        ) as etcd:
            entries = [*etcd.get_prefix("v1/"), *etcd.get_prefix(worlds_of(""))]
        return {entry.key: (entry.create_revision, entry.lease) for entry in entries}

    def answers(self) -> bool:
        """Return whether a completion comes back."""
        answer = ask(str(self.services["url"]), "smollm2")
        return answer is not None and answer["usage"]["completion_tokens"] > 0


@pytest.fixture(scope="module")
def deployment(model_dir: Path) -> Iterator[Deployment]:
    """Services with credentials, and a worker of three ranks, in a folder that anybody may enter and write, as /tmp."""
    mask = os.umask(0)
    try:
        # the agent of a worker that is stopped may write its report while the folder is removed
        with tempfile.TemporaryDirectory(prefix="neighbour-", ignore_cleanup_errors=True) as text:
            folder = Path(text)
            folder.chmod(0o1777)
            (folder / "open.txt").write_text(MARKER)
            with HeadNodeCommand(folder, NATS_SERVER="") as head:
                services = head.services()
                shim: Any = _Endpoint(str(services["environment"]["ETCD_ENDPOINTS"]))
                worker = RunningWorker(
                    folder,
                    shim,
                    model_dir,
                    RANKS,
                    *("--served-model-name", "smollm2", "--failure-dir", str(folder / "failures")),
                    **services["environment"],
                )
                try:
                    worker.ready()
                    found = Deployment(folder, head, services, worker)
                    eventually(found.answers, "a completion", 30)
                    yield found
                finally:
                    worker.stop()
    finally:
        os.umask(mask)


@dataclass(frozen=True)
class _Endpoint:
    url: str


@pytest.fixture(scope="module")
def found(deployment: Deployment) -> dict[str, Any]:
    """What the neighbour got, with the worker as it was before."""
    keys = deployment.keys()
    ranks = deployment.worker.ranks()
    task = {
        "secrets": [*deployment.secrets, MARKER],
        "folders": [str(deployment.folder), "/dev/shm"],
        "pids": [*ranks, deployment.head.process.pid],
        "ports": sorted(listening(ranks)),
    }
    # where the neighbour may read it
    program = deployment.folder / "neighbour.py"
    shutil.copy(NEIGHBOUR, program)
    program.chmod(0o644)  # a checkout may be its owner's alone
    done = subprocess.run(
        ["/usr/bin/python3", str(program)],
        input=json.dumps(task),
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        env={},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert deployment.worker.process.poll() is None, deployment.worker.text()
    assert deployment.worker.ranks() == ranks
    assert deployment.keys() == keys
    assert deployment.answers()
    return result


def test_another_user_reads_no_secret(deployment: Deployment, found: dict[str, Any]) -> None:
    assert found["uid"] == NOBODY
    # it finds what may be read, so it would find the rest
    assert found["files"] == [str(deployment.folder / "open.txt")]
    assert found["environments"] == []
    assert found["command_lines"] == []


def test_no_secret_is_reported(deployment: Deployment) -> None:
    said = deployment.worker.text() + deployment.head.err + deployment.head.out
    assert [secret for secret in deployment.secrets if secret in said] == []


def test_ranks_take_a_users_variables_out_of_their_environment(deployment: Deployment) -> None:
    """The worker was started with the secrets as variables: its launcher shows them, its ranks and agents don't."""
    launcher, ranks = deployment.worker.process.pid, deployment.worker.ranks()
    children = {int(pid) for rank in ranks for pid in Path(f"/proc/{rank}/task/{rank}/children").read_text().split()}
    agents = [pid for pid in children if b"node agent on" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(agents) == 1
    assert launcher in started_with([launcher], deployment.secrets)
    assert started_with([*ranks, *agents], deployment.secrets) == {}


def test_another_user_ends_nothing(found: dict[str, Any]) -> None:
    assert found["signals"] == []
    # the socket at which the ranks of a node meet their agent: in a folder of this user's, or for this user alone
    assert found["agents"]
    assert set(found["agents"].values()) <= {
        "closed",
        "ConnectionResetError",
        "BrokenPipeError",
        "PermissionError",
        "FileNotFoundError",
    }


def test_no_process_without_the_token_becomes_a_rank(found: dict[str, Any]) -> None:
    # the listener is closed: all ranks have joined
    assert [answer for answer in found["ports"].values() if answer.startswith("liveness")] == []
    # the requests' port is Dynamo's: who reaches it may ask, so it must be one that only the cluster reaches
    assert found["ports"]


def test_etcd_refuses_clients_without_this_jobs_certificate(deployment: Deployment, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a stranger's certificate with")
    ours = deployment.environment
    stranger = make_certificates(tmp_path / "stranger", ("127.0.0.1",)).client_environment()
    own_pair = {name: stranger[name] for name in ("ETCD_AUTH_CLIENT_CERT", "ETCD_AUTH_CLIENT_KEY")}
    keys = deployment.keys()
    instance, (_, lease) = next((key, place) for key, place in keys.items() if key.startswith("v1/instances/"))
    for credentials in ({"ETCD_AUTH_CA": ours["ETCD_AUTH_CA"]}, {"ETCD_AUTH_CA": ours["ETCD_AUTH_CA"], **own_pair}):
        for url in (ours["ETCD_ENDPOINTS"], ours["ETCD_ENDPOINTS"].replace("https", "http")):
            with contextlib.closing(GrpcEtcdClient([url], EtcdAuth.from_env(credentials), 2)) as etcd:
                with pytest.raises(DynamoMpiError):
                    etcd.put(instance, b"{}", 0)
                with pytest.raises(DynamoMpiError):
                    etcd.revoke(lease, 2)
                with pytest.raises(DynamoMpiError):
                    etcd.get_prefix("v1/")
    assert deployment.keys() == keys


def test_nats_refuses_clients_without_this_jobs_password(deployment: Deployment) -> None:
    server, user = deployment.environment["NATS_SERVER"], deployment.environment["NATS_AUTH_USERNAME"]
    assert urlsplit(server).hostname == urlsplit(deployment.environment["ETCD_ENDPOINTS"]).hostname
    for name, password in ((None, None), (user, "guessed"), (user, "")):
        assert "Authorization Violation" in check_nats(server, name, password)


def test_the_table_of_listeners_is_what_listens(deployment: Deployment) -> None:
    worker = [*session_members(deployment.worker.process.pid), *deployment.worker.ranks()]
    found = find_listeners({*deployment.head.survivors(), *worker})
    assert {each.kind for each in found} == {"etcd", "NATS", "frontend", "rank", "mpirun"}
    assert {each.kind for each in found if each.reach is Reach.EVERYWHERE} == {"mpirun"}
    assert all(each.rows for each in found)
    # what the kernel says, read in another way
    ports = listening([pid for pid in worker if pid != deployment.worker.process.pid])
    places = {place for each in found if each.kind == "rank" for place in each.places}
    assert {f"{address}:{port}" for address, port in ports} == places
