# SPDX-License-Identifier: Apache-2.0
"""A real etcd and a real worker under mpirun, for tests that need to hurt them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dynamo_mpi.common.ports import free_port, is_free
from dynamo_mpi.common.subprocess import LoggedProcess, session_members
from dynamo_mpi.deploy.programs import find_etcd, find_nats_server
from dynamo_mpi.deploy.services import Etcd, Frontend, Nats
from dynamo_mpi.discovery.records import WorkerRecord, worlds_of
from tests.conftest import ROOT, find_mpirun, mpi_environment

T = TypeVar("T")
_LISTEN = "0A"  # a state in /proc/net/tcp


def eventually(read: Callable[[], T | None], what: str = "what the test waits for", seconds: float = 60) -> T:
    """Wait until ``read`` returns something true, and return it."""
    end = time.monotonic() + seconds
    while True:
        value = read()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what}; last seen: {value!r}")
        time.sleep(0.02)


def failure_in(path: Path) -> dict[str, Any]:
    """Return what a failure file says: it follows the log by milliseconds, and the launcher may have ended before it is there."""
    eventually(path.exists, f"{path} is there", 10)
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def shared_memory_of(pids: Sequence[int]) -> set[str]:
    """Return the files in /dev/shm that these processes have mapped."""
    names: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            names.update(re.findall(r"(/dev/shm/\S+)$", Path(f"/proc/{pid}/maps").read_text(), re.M))
    return names


def listening(pids: Sequence[int]) -> set[tuple[str, int]]:
    """Return the IPv4 addresses and ports that these processes listen at."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(descriptor))
    places = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == _LISTEN and f"socket:[{fields[9]}]" in sockets:
            address, _, port = fields[1].partition(":")
            places.add((socket.inet_ntoa(bytes.fromhex(address)[::-1]), int(port, 16)))
    return places


class Server:
    """A real server on loopback that can be stopped and started again on the same port.

    Args:
        service: it.
        folder: for its log.
    """

    def __init__(self, service: Etcd | Nats, folder: Path) -> None:
        self.service, self.folder = service, folder
        self.child: LoggedProcess | None = None

    @property
    def url(self) -> str:
        return self.service.url

    def start(self) -> None:
        """Start it and wait until it answers."""
        name, command = self.service.name, self.service.command()
        self.child = LoggedProcess(name, command, environment=os.environ, log=self.folder / f"{name}.log")
        eventually(self.service.answers, f"{name} answers")

    def stop(self) -> None:
        """Kill it."""
        if self.child is not None:
            self.child.kill()
            self.child = None


class NatsServer(Server):
    """A NATS, which starts with nothing in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Nats(find_nats_server(), free_port(), folder / "nats"), folder)

    def start(self) -> None:
        """Start it and wait until it answers."""
        shutil.rmtree(self.folder / "nats", ignore_errors=True)
        super().start()


class EtcdServer(Server):
    """An etcd that can be frozen, too."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Etcd(find_etcd(), free_port(), folder / "etcd"), folder)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let it answer no client until the block ends."""
        assert self.child is not None
        os.kill(self.child.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.child.pid, signal.SIGCONT)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Have it away until the block ends, and back with what it had."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def forget(self) -> None:
        """Start it again with nothing in it."""
        self.stop()
        shutil.rmtree(self.folder / "etcd")
        self.start()

    def delete(self, prefix: str) -> None:
        """Delete keys, as somebody else might."""
        import pyetcd

        with contextlib.closing(pyetcd.client(host="127.0.0.1", port=self.service.port)) as client:
            client.delete_prefix(prefix)

    def keys(self, prefix: str = "v1/") -> list[str]:
        """Return the keys under ``prefix``."""
        import pyetcd

        with contextlib.closing(pyetcd.client(host="127.0.0.1", port=self.service.port)) as client:
            return sorted(meta.key.decode() for _, meta in client.get_prefix(prefix))

    def worlds(self) -> list[WorkerRecord]:
        """Return the world records that are there now."""
        import pyetcd

        with contextlib.closing(pyetcd.client(host="127.0.0.1", port=self.service.port)) as client:
            return [WorkerRecord.unpack(value) for value, _ in client.get_prefix(worlds_of(""))]

    def put(self, key: str, value: bytes) -> None:
        """Write a value, as somebody else might."""
        import pyetcd

        with contextlib.closing(pyetcd.client(host="127.0.0.1", port=self.service.port)) as client:
            client.put(key, value)

    def written(self, prefix: str, since: int = 0) -> list[tuple[str, bytes | None]]:
        """Return every change under ``prefix`` after a revision, in its order: the key, and the value or None for a deletion."""
        import pyetcd

        changes: list[tuple[str, bytes | None]] = []
        with contextlib.closing(pyetcd.client(host="127.0.0.1", port=self.service.port)) as client:
            events, cancel = client.watch("\0", range_end="\0", start_revision=since + 1)
            # as soon as this one comes, everything before it has come
            client.put("tests/end-of-history", b"")
            for event in events:
                key = event.key.decode()
                if key == "tests/end-of-history":
                    break
                if key.startswith(prefix):
                    changes.append((key, event.value if isinstance(event, pyetcd.events.PutEvent) else None))
            cancel()
        return changes

    def lease_lifetimes(self) -> set[int]:
        """Return the lifetimes, in seconds, of the leases of all keys that there are."""
        import pyetcd

        with contextlib.closing(pyetcd.client(host="127.0.0.1", port=self.service.port)) as client:
            leases = {meta.lease_id for _, meta in client.get_all()}
            return {client.get_lease_info(lease).grantedTTL for lease in leases}

    def revoke_leases(self) -> None:
        """Take all leases away, as if none had been renewed."""
        import pyetcd

        with contextlib.closing(pyetcd.client(host="127.0.0.1", port=self.service.port)) as client:
            for lease in {meta.lease_id for _, meta in client.get_prefix("v1/")}:
                client.revoke_lease(lease)

    def revision(self) -> int:
        """Return the store's revision: it grows with every write."""
        import pyetcd

        with contextlib.closing(pyetcd.client(host="127.0.0.1", port=self.service.port)) as client:
            return int(client.get_response("x").header.revision)


class RunningWorker:
    """``mpirun -n N python -m dynamo_mpi.worker`` with its output in a file."""

    def __init__(
        self,
        folder: Path,
        etcd: EtcdServer,
        model: Path,
        ranks: int,
        *flags: str,
        name: str = "worker",
        before: Sequence[str] = (),
        **environment: str,
    ) -> None:
        self.ready_file = folder / ("ready.json" if name == "worker" else f"{name}.json")
        self.log = folder / f"{name}.log"
        words = [
            "--model",
            str(model),
            "--tensor-parallel-size",
            str(ranks),
            "--ready-file",
            str(self.ready_file),
            *flags,
        ]
        command = [*before, find_mpirun(), "-n", str(ranks), sys.executable, "-m", "dynamo_mpi.worker", *words]
        # gone with this object; short, for the unix sockets in it
        self._scratch = tempfile.TemporaryDirectory(prefix="mpi-", ignore_cleanup_errors=True)
        own = {"TMPDIR": self._scratch.name, "TRTLLM_CACHE_DIR": self._scratch.name}
        extra = {"ETCD_ENDPOINTS": etcd.url, "DYN_LOG": "error", **own, **environment}
        variables = mpi_environment(extra)
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def text(self) -> str:
        """Return what the ranks have printed."""
        return self.log.read_text(errors="replace")

    def ready(self, seconds: float = 90) -> dict[str, Any]:
        """Wait for the ready file and return what is in it."""

        def read() -> dict[str, Any] | None:
            if self.process.poll() is not None:
                raise AssertionError(f"the worker ended with {self.process.returncode}:\n{self.text()}")
            with contextlib.suppress(FileNotFoundError):
                content: dict[str, Any] = json.loads(self.ready_file.read_text())
                return content
            return None

        return eventually(read, f"ready\n{self.text()}", seconds)

    def rank_zero(self) -> int:
        """Return rank 0's pid."""
        return int(self.ready()["pid"])

    def ranks(self) -> list[int]:
        """Return the pids of all ranks, rank 0 first."""
        leader = self.rank_zero()
        return [leader, *(pid for pid in self.members() if pid != leader)]

    def members(self) -> list[int]:
        """Return the pids of the ranks that are there now, in no order of theirs."""
        found = []
        for pid in session_members(self.process.pid):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"dynamo_mpi.worker" in words and words[0].endswith(b"python"):
                    found.append(pid)
        return sorted(pid for pid in found if pid != self.process.pid)

    def wait(self, seconds: float = 60) -> int:
        """Wait for mpirun to end and return its exit code."""
        return self.process.wait(seconds)

    def stop(self) -> None:
        """End it and everything it started, and the memory that an mpirun which is killed leaves."""
        members = session_members(self.process.pid)
        shared = shared_memory_of(members)
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for path in shared:
            if "_segment." in path:  # Open MPI's
                Path(path).unlink(missing_ok=True)


UNBOUND = {"PRTE_MCA_hwloc_default_binding_policy": "none"}
ENGINE_WORDS = {
    "reference": ("--engine", "reference", "--tensor-parallel-size", "1", "--pipeline-parallel-size", "2"),
    "trtllm": ("--engine", "trtllm", "--allow-no-gpu", "--max-seq-len", "512", "--max-batch-size", "2"),
}


@contextmanager
def worker_starter(
    folder: Path, etcd: EtcdServer, model: Path, temporary: Path, **usual: str
) -> Iterator[Callable[..., RunningWorker]]:
    """Provide a function that starts workers: two ranks of the reference engine, three of the stand-in of TensorRT-LLM. What is left
    of them is killed.

    Args:
        folder: for their output and ready files.
        etcd: their etcd.
        model: their model, unless the call names another.
        temporary: their TMPDIR; short, as a unix socket's name holds 107 bytes.
        usual: variables of all of them.
    """
    workers: list[RunningWorker] = []
    paths = [os.environ.get("PYTHONPATH"), str(ROOT / "tests/standins"), str(ROOT)]
    own = {
        **UNBOUND,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0.2",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(temporary),
        "ETCD_ENDPOINTS": etcd.url,
        **usual,
    }

    def begin(
        *flags: str, role: str = "agg", engine: str = "reference", model: Path = model, **more: str
    ) -> RunningWorker:
        words = ("--role", role, *ENGINE_WORDS[engine], *flags)
        name, ranks = f"{len(workers)}-{role}", 2 if engine == "reference" else 3
        workers.append(RunningWorker(folder, etcd, model, ranks, *words, name=name, **{**own, **more}))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


def terminate(worker: RunningWorker) -> None:
    """End a worker by SIGTERM, in order."""
    os.kill(worker.rank_zero(), signal.SIGTERM)
    assert worker.wait() == 0, worker.text()


def pem_lines(key: str) -> list[str]:
    """Return the lines of a private key that are secret."""
    return key.splitlines()[1:-1]


def started_with(pids: Iterable[int], secrets: Iterable[str]) -> dict[int, str]:
    """Return the command lines of the processes that were started with one of the secrets in their environment."""
    texts, found = [secret.encode() for secret in secrets], {}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            if any(text in environment for text in texts):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def system_port() -> int:
    """Return a free port that ``DYN_SYSTEM_PORT`` can hold: the runtime reads it as a signed 16-bit number."""
    # at random, as several processes of pytest look for one at the same time
    for port in random.sample(range(20000, 32000), 100):
        if is_free(port):
            return port
    raise AssertionError("no free port below 32768")


@contextmanager
def running_frontend(
    folder: Path, etcd: EtcdServer, request_plane: str = "tcp", *, hidden: Sequence[Path] = (), **variables: str
) -> Iterator[Frontend]:
    """Run the real frontend on loopback; as on another host, it doesn't see what is in the ``hidden`` folders."""
    discovery = {"ETCD_ENDPOINTS": etcd.url, "DYN_REQUEST_PLANE": request_plane, **variables}
    # a home of its own: it copies tokenizers to ~/.cache
    frontend = Frontend(free_port(), discovery, folder)
    environment = os.environ | frontend.environment() | {"DYN_LOG": "error"}
    command = frontend.command()
    if hidden:
        hide = " && ".join(f"mount -t tmpfs none {shlex.quote(str(each))}" for each in hidden)
        command = ("unshare", "--mount", "sh", "-c", f'{hide} && exec "$@"', "sh", *command)
    child = LoggedProcess("frontend", command, environment=environment, log=folder / "frontend.log")
    try:
        eventually(frontend.answers, "the frontend answers")
        yield frontend
    finally:
        child.kill()


def http_get(url: str) -> tuple[int, str]:
    """Return status and body; status 0 without an answer."""
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:  # noqa: S310 - the tests' own loopback addresses
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)
