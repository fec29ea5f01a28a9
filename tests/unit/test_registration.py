# SPDX-License-Identifier: Apache-2.0
"""The watch over a registration against a real etcd, which holds what Dynamo's runtime would write there."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_mpi.common.errors import ExitCode, RetryableError
from dynamo_mpi.discovery.etcd import EtcdAuth, Lease
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient
from dynamo_mpi.discovery.registration_monitor import RegistrationMonitor
from tests.dynamo.running import EtcdServer, eventually
from tests.etcd_users import PASSWORDS, add_users
from tests.servers import closed_port, listening, running_etcd
from tests.unit.recorded_log import RecordedLog

pytestmark = pytest.mark.slow

SECONDS = 3
ENDPOINT = "dyn://dynamo.backend.generate"
PATH = "dynamo/backend/generate"


class Registered:
    """A worker's keys under a lease that is kept alive as long as one asks for it."""

    def __init__(self, url: str, seconds: int = 60) -> None:
        self.etcd = GrpcEtcdClient([url], EtcdAuth(), 5)
        self.lease: Lease = self.etcd.grant(seconds)
        self.keys = [f"v1/{what}/{PATH}/{self.lease.id:x}" for what in ("instances", "mdc")]
        for key in (*self.keys, f"{self.keys[1]}/an-adapter", f"v1/event_channels/{PATH}/{self.lease.id:x}"):
            self.etcd.put(key, key.encode(), self.lease.id)

    def delete(self, *keys: str) -> None:
        from pyetcd import etcdrpc

        for key in keys:
            request = etcdrpc.DeleteRangeRequest(key=key.encode())
            self.etcd._call("KV", "DeleteRange", request)

    def there(self) -> set[str]:
        return {entry.key for entry in self.etcd.get_prefix("v1/") if entry.lease == self.lease.id}


class WatchedRegistrations:
    """Makes watches, and has what they logged and reported."""

    def __init__(self) -> None:
        self.log = RecordedLog()
        self.lost: queue.SimpleQueue[RetryableError] = queue.SimpleQueue()
        self._watches: list[RegistrationMonitor] = []

    def __call__(self, url: str, instance: int, *, pauses: bool = False, **environ: str) -> RegistrationMonitor:
        variables = {"ETCD_ENDPOINTS": url, "ETCD_LEASE_TTL": str(SECONDS), **environ}
        watch = RegistrationMonitor(ENDPOINT, variables, 1, self.log, pauses=pauses)
        self._watches.append(watch)
        watch.start(instance, self.lost.put)
        return watch

    def close(self) -> None:
        for watch in self._watches:
            watch.stop()


@pytest.fixture
def watched() -> Iterator[WatchedRegistrations]:
    watched = WatchedRegistrations()
    yield watched
    watched.close()


def test_what_somebody_deletes_is_written_again_as_it_was(etcd: str, watched: WatchedRegistrations) -> None:
    worker = Registered(etcd, SECONDS)
    watched(etcd, worker.lease.id)

    def kept() -> bool:
        worker.etcd.keep_alive(worker.lease.id)
        return worker.there() >= set(worker.keys)

    # known before it goes
    begin = time.monotonic()
    eventually(lambda: kept() and time.monotonic() > begin + SECONDS)
    adapter = f"{worker.keys[1]}/an-adapter"
    worker.delete(*worker.keys, adapter)
    eventually(kept)
    assert {entry.key: entry.value for entry in worker.etcd.get_prefix("v1/") if entry.key in worker.keys} == {
        key: key.encode() for key in worker.keys
    }
    assert adapter not in worker.there(), "that is dynamo.trtllm's own to load and unload"
    assert watched.log.lines == ["this worker's keys in etcd had been deleted; they are written again"]


def test_a_worker_that_pauses_takes_itself_out(etcd: str, watched: WatchedRegistrations) -> None:
    worker = Registered(etcd, SECONDS)
    watched(etcd, worker.lease.id, pauses=True)
    begin = time.monotonic()

    def later(seconds: float) -> bool:
        worker.etcd.keep_alive(worker.lease.id)
        return time.monotonic() > begin + seconds

    eventually(lambda: later(SECONDS))
    worker.delete(worker.keys[0])
    eventually(lambda: later(3 * SECONDS))
    assert worker.keys[0] not in worker.there()
    # both, it never deletes itself
    worker.delete(worker.keys[1])
    eventually(lambda: later(0) and worker.there() >= set(worker.keys))
    assert watched.lost.empty()


def test_after_its_stop_nothing_is_written(etcd: str, watched: WatchedRegistrations) -> None:
    worker = Registered(etcd)
    watch = watched(etcd, worker.lease.id)
    begin = time.monotonic()
    eventually(lambda: time.monotonic() > begin + SECONDS)
    watch.stop()
    worker.delete(*worker.keys)
    assert not set(worker.keys) & worker.there()
    worker.etcd.revoke(worker.lease.id, 5)
    assert watched.lost.empty()
    assert "no longer has the lease" in watch.lost_lease_reason()


def test_a_lease_that_is_lost_is_reported_once(etcd: str, watched: WatchedRegistrations) -> None:
    worker = Registered(etcd, SECONDS)
    watch = watched(etcd, worker.lease.id)
    assert watch.lost_lease_reason() == ""
    worker.etcd.revoke(worker.lease.id, 5)
    error = watched.lost.get(timeout=20)
    assert error.exit_code == ExitCode.TEMPORARY
    assert "etcd has lost this worker's lease" in error.problem
    with pytest.raises(queue.Empty):
        watched.lost.get(timeout=2 * SECONDS)


def test_a_lease_that_is_revoked_because_of_a_failure_is_not_lost(etcd: str) -> None:
    """Rank 0 revokes it as soon as it sees a rank die; that must not begin a drain while the report is written."""
    worker, lost = Registered(etcd, SECONDS), queue.SimpleQueue[RetryableError]()
    variables = {"ETCD_ENDPOINTS": etcd, "ETCD_LEASE_TTL": str(SECONDS)}
    failed = threading.Event()
    monitor = RegistrationMonitor(ENDPOINT, variables, 1, RecordedLog(), has_failed=failed.is_set)
    monitor.start(worker.lease.id, lost.put)
    failed.set()
    worker.etcd.revoke(worker.lease.id, 5)
    assert monitor._thread is not None
    # it ends when it has seen that the lease is gone
    monitor._thread.join(20)
    assert not monitor._thread.is_alive()
    assert lost.empty()


@pytest.mark.parametrize("silent", [True, False], ids=["hangs", "is away"])
def test_an_etcd_that_does_not_answer_is_waited_for_as_long_as_the_lease_lives(
    watched: WatchedRegistrations, silent: bool
) -> None:
    with listening() if silent else closed_port() as port:
        begin = time.monotonic()
        watch = watched(f"http://127.0.0.1:{port}", 7)
        error = watched.lost.get(timeout=30)
        assert time.monotonic() - begin >= SECONDS
        assert "longer than this worker's lease lives (3 s)" in error.problem
        assert "etcd was away for longer" in watch.lost_lease_reason()


# begins, prints it, and prints what it receives
WATCHING = f"""
import sys, time
from functools import partial
from dynamo_mpi.discovery.registration_monitor import RegistrationMonitor
from dynamo_mpi.common.log import RankLogger
say, environ = partial(print, flush=True), {{"ETCD_ENDPOINTS": sys.argv[1], "ETCD_LEASE_TTL": "{SECONDS}"}}
class Log(RankLogger):
    info = staticmethod(say)
RegistrationMonitor({ENDPOINT!r}, environ, 1, Log(0, "here")).start(int(sys.argv[2]), say)
say("watches")
time.sleep(600)
"""


def test_a_process_that_stood_still_does_not_take_it_for_etcds_silence(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path)
    server.start()
    try:
        worker = Registered(server.url, 3 * SECONDS)

        def later(seconds: float) -> bool:
            worker.etcd.keep_alive(worker.lease.id)
            return time.monotonic() > begin + seconds

        with subprocess.Popen(
            [sys.executable, "-c", WATCHING, server.url, str(worker.lease.id)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            try:
                with server.frozen():
                    assert process.stdout.readline() == "watches\n"
                    # its first question is on its way
                    time.sleep(0.5)
                    process.send_signal(signal.SIGSTOP)
                begin = time.monotonic()
                eventually(lambda: later(2 * SECONDS))
                process.send_signal(signal.SIGCONT)
                begin = time.monotonic()
                eventually(lambda: later(2 * SECONDS))
                worker.delete(*worker.keys)
                assert process.stdout.readline().startswith("this worker's keys in etcd had been deleted")
            finally:
                process.kill()
    finally:
        server.stop()


def test_an_etcd_that_refuses_to_say_is_warned_of_once(watched: WatchedRegistrations) -> None:
    with running_etcd() as url:
        worker = Registered(url)
        add_users(url, ["dynamo_mpi/"])
        watched(url, worker.lease.id, ETCD_AUTH_USERNAME="worker", ETCD_AUTH_PASSWORD=PASSWORDS["worker"])
        eventually(lambda: len(watched.log.lines) == 1)
        begin = time.monotonic()
        eventually(lambda: time.monotonic() > begin + 2 * SECONDS)
    (line,) = watched.log.lines
    assert "whether this worker is still registered can't be checked: etcd refuses us" in line
    assert watched.lost.empty()
