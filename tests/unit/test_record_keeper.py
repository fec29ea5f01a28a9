# SPDX-License-Identifier: Apache-2.0
"""What keeps the worker record, against real etcds that go, come back empty, and hang."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyetcd
import pytest

from dynamo_mpi.common.errors import DiscoveryError
from dynamo_mpi.discovery.etcd import EtcdAuth
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient
from dynamo_mpi.discovery.record_keeper import RecordKeeper
from dynamo_mpi.discovery.records import Progress, StoredRecord, WorkerRecord, list_workers
from tests.dynamo.running import eventually
from tests.servers import closed_port, listening, running_etcd
from tests.unit.recorded_log import RecordedLog
from tests.unit.worlds import world

pytestmark = pytest.mark.slow

SECONDS = 2
"""The shortest lease that etcd grants here."""
Keep = Callable[..., RecordKeeper]


class Kept:
    """Makes keepers, and has what they said."""

    def __init__(self) -> None:
        self.log = RecordedLog()
        self.keepers: list[RecordKeeper] = []

    def __call__(self, url: str, record: WorkerRecord, seconds: int = SECONDS) -> RecordKeeper:
        keeper = RecordKeeper(GrpcEtcdClient([url], EtcdAuth(), 2), record, seconds, self.log)
        self.keepers.append(keeper)
        return keeper

    def starts(self, url: str, record: WorkerRecord, seconds: int = SECONDS) -> RecordKeeper:
        keeper = self(url, record, seconds)
        keeper.publish()
        keeper.start()
        return keeper


@pytest.fixture
def kept(etcd: str) -> Iterator[Kept]:
    kept = Kept()
    yield kept
    for keeper in kept.keepers:
        keeper.unpublish()
    assert worlds(etcd) == []


def worlds(url: str) -> list[StoredRecord]:
    etcd = GrpcEtcdClient([url], EtcdAuth(), 5)
    try:
        return list_workers(etcd)[0]
    finally:
        etcd.close()


def test_it_is_there_says_the_phase_and_outlives_its_lease(etcd: str, kept: Kept) -> None:
    keeper = kept.starts(etcd, world())
    (first,) = worlds(etcd)
    assert first.record == world()
    keeper.set_phase("load")
    eventually(lambda: worlds(etcd)[0].record.phase == "load")
    since = worlds(etcd)[0].record.phase_since
    assert since is not None
    assert 0 <= time.time() - since < 20
    begin = time.monotonic()
    eventually(lambda: time.monotonic() - begin > 2 * SECONDS)
    (last,) = worlds(etcd)
    assert (last.key, last.create_revision) == (first.key, first.create_revision)
    keeper.unpublish()
    assert worlds(etcd) == []
    keeper.unpublish()
    assert kept.log.lines == []


def test_it_names_the_instance_once_that_is_known(etcd: str, kept: Kept) -> None:
    keeper = kept.starts(etcd, world(launch="x"), 60)
    assert worlds(etcd)[0].record.instance is None
    keeper.set_instance("694d9f8a")
    keeper.set_phase("serve")
    eventually(lambda: worlds(etcd)[0].record.phase == "serve")
    record = worlds(etcd)[0].record
    assert record == world(launch="x", instance="694d9f8a", phase="serve", phase_since=record.phase_since)


def test_without_being_started_it_is_withdrawn_too(etcd: str, kept: Kept) -> None:
    keeper = kept(etcd, world(), 60)
    keeper.publish()
    assert len(worlds(etcd)) == 1
    keeper.unpublish()
    assert worlds(etcd) == []


def test_withdraw_while_start_has_not_started_its_thread(
    etcd: str, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = kept(etcd, world(), 60)
    keeper.publish()
    real = threading.Thread.start

    def withdraw_first(thread: threading.Thread) -> None:
        # as a signal's thread does that runs between two lines of `start`
        monkeypatch.setattr(threading.Thread, "start", real)
        keeper.unpublish()
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", withdraw_first)
    keeper.start()
    assert worlds(etcd) == []


def test_what_was_never_published_is_withdrawn_at_once(etcd: str, kept: Kept) -> None:
    begin = time.monotonic()
    kept(etcd, world()).unpublish()
    assert time.monotonic() - begin < 1


def test_a_second_worker_sees_the_first(etcd: str, kept: Kept) -> None:
    assert kept(etcd, world()).publish() == []
    (first,) = kept(etcd, world("decode")).publish()
    assert first.record == world()
    assert kept(etcd, world("decode", model="other")).publish() == []
    assert kept(etcd, world("agg")).publish() == []


@pytest.mark.parametrize("turn", range(10))
def test_of_two_that_come_at_the_same_moment_exactly_one_sees_the_other(etcd: str, kept: Kept, turn: int) -> None:
    together = threading.Barrier(2)
    keepers = [kept(etcd, world("prefill")), kept(etcd, world("decode"))]

    def publish(keeper: RecordKeeper) -> list[StoredRecord]:
        together.wait()
        return keeper.publish()

    with ThreadPoolExecutor(2) as threads:
        seen = list(threads.map(publish, keepers))
    assert sorted(map(len, seen)) == [0, 1]


def test_peers_are_reported_once_each(etcd: str, kept: Kept) -> None:
    kept.starts(etcd, world())
    peer = kept(etcd, world("decode", {"kv_dtype": "bfloat16"}, job="7"))
    peer.publish()
    eventually(lambda: len(kept.log.lines) == 1)
    assert "decode worker on decode1, decode2 (job 7.0) has appeared, and does not fit: I1" in kept.log.lines[0]
    peer.unpublish()
    eventually(lambda: len(kept.log.lines) == 2)
    assert "has disappeared" in kept.log.lines[1]


def test_who_wants_to_hear_of_peers_does(etcd: str, kept: Kept) -> None:
    heard: list[tuple[list[str], list[str]]] = []
    keeper = RecordKeeper(
        GrpcEtcdClient([etcd], EtcdAuth(), 2),
        world(),
        SECONDS,
        kept.log,
        on_peers=lambda peers, news: heard.append(([peer.record.role for peer in peers], list(news))),
    )
    kept.keepers.append(keeper)
    keeper.publish()
    keeper.start()
    peer = kept(etcd, world("decode"))
    peer.publish()
    eventually(lambda: len(heard) == 1)
    peer.unpublish()
    eventually(lambda: len(heard) == 2)
    assert [roles for roles, _ in heard] == [["decode"], []]
    assert [line for _, news in heard for line in news] == kept.log.lines


def test_what_is_no_record_is_reported_once_and_left_out(etcd: str, kept: Kept) -> None:
    other = GrpcEtcdClient([etcd], EtcdAuth(), 5)
    lease = other.grant(60)
    other.put("dynamo_mpi/v1/worlds/dynamo/decode/garbled\n", b"\xff{", lease.id)
    other.put("dynamo_mpi/v1/worlds/other/decode/garbled", b"", lease.id)
    keeper = kept.starts(etcd, world())
    keeper.set_phase("load")
    eventually(lambda: worlds(etcd)[0].record.phase == "load")
    (line,) = kept.log.lines
    assert "garbled\\n' in etcd can't be read, and is ignored: no JSON" in line
    other.revoke(lease.id, 5)
    other.close()


def test_a_lease_that_was_lost_is_made_anew(etcd: str, kept: Kept) -> None:
    kept.starts(etcd, world())
    other = GrpcEtcdClient([etcd], EtcdAuth(), 5)
    (entry,) = other.get_prefix("dynamo_mpi/")
    other.revoke(entry.lease, 5)
    eventually(lambda: len(worlds(etcd)) == 1)
    assert worlds(etcd)[0].key != entry.key
    other.close()


class EtcdThatLosesAWrite(GrpcEtcdClient):
    """The real one, whose next write gets lost on its way when the test asks for it."""

    losing = False

    def put(self, key: str, value: bytes, lease: int) -> None:
        if self.losing:
            self.losing = False
            raise DiscoveryError("etcd does not answer: lost")
        super().put(key, value, lease)


def test_a_record_whose_new_lease_came_and_whose_write_did_not_is_written_in_the_end(etcd: str, kept: Kept) -> None:
    connection = EtcdThatLosesAWrite([etcd], EtcdAuth(), 2)
    keeper = RecordKeeper(connection, world(), SECONDS, kept.log)
    kept.keepers.append(keeper)
    keeper.publish()
    other = GrpcEtcdClient([etcd], EtcdAuth(), 5)
    other.revoke(other.get_prefix("dynamo_mpi/")[0].lease, 5)
    other.close()
    connection.losing = True
    keeper.start()
    eventually(lambda: len(kept.log.lines) == 2)
    assert kept.log.lines[1] == "the worker record is in etcd again"
    assert len(worlds(etcd)) == 1


def test_an_etcd_that_was_away_and_is_back_empty_has_the_record_again(kept: Kept) -> None:
    with running_etcd() as url:
        keeper = kept.starts(url, world())
    eventually(lambda: len(kept.log.lines) == 1)
    keeper.set_phase("serve")
    assert "can't be kept for now, the worker goes on" in kept.log.lines[0]
    with running_etcd(int(url.rpartition(":")[2])):
        eventually(lambda: len(worlds(url)) == 1)
        assert worlds(url)[0].record.phase == "serve"
        eventually(lambda: len(kept.log.lines) == 2)
        assert kept.log.lines[1] == "the worker record is in etcd again"
        keeper.unpublish()
        assert worlds(url) == []


def test_an_etcd_that_is_dead_does_not_hold_the_end_up(kept: Kept) -> None:
    with running_etcd() as url:
        keeper = kept.starts(url, world())
    begin = time.monotonic()
    keeper.unpublish()
    assert time.monotonic() - begin < 1.5


@pytest.mark.parametrize("started", [True, False])
def test_an_etcd_that_hangs_does_not_hold_the_end_up(kept: Kept, started: bool) -> None:
    with running_etcd() as url:
        keeper = kept(url, world())
        keeper.publish()
    with listening(port=int(url.rpartition(":")[2])):
        if started:
            keeper.start()
            keeper.set_phase("load")
        begin = time.monotonic()
        keeper.unpublish()
        assert 0.5 < time.monotonic() - begin < 1.5


def test_nothing_is_published_where_no_server_answers(kept: Kept) -> None:
    with closed_port() as port, pytest.raises(DiscoveryError):
        kept(f"http://127.0.0.1:{port}", world()).publish()


def test_an_update_is_there_within_about_a_second(etcd: str, kept: Kept) -> None:
    keeper = kept.starts(etcd, world(), 60)
    keeper.update(in_flight=3, system="http://h:1")
    eventually(lambda: worlds(etcd)[0].record.in_flight == 3, seconds=3)
    assert worlds(etcd)[0].record == world(in_flight=3, system="http://h:1")


def test_many_updates_cost_few_writes_and_the_last_one_counts(etcd: str, kept: Kept) -> None:
    keeper = kept.starts(etcd, world(), 60)
    before = versions(etcd)
    begin = time.monotonic()
    for count in range(20_000):
        keeper.update(in_flight=count)
    spent = time.monotonic() - begin
    eventually(lambda: worlds(etcd)[0].record.in_flight == 19_999, seconds=5)
    assert versions(etcd) - before <= 2 + spent
    assert spent < 2


def test_a_phase_does_not_wait_for_what_came_before_it(etcd: str, kept: Kept) -> None:
    keeper = kept.starts(etcd, world(), 60)
    progress = Progress(1, 8, 7, "n2", 0.5)
    keeper.set_phase("load")
    keeper.update(progress=progress)
    eventually(lambda: worlds(etcd)[0].record.progress == progress, seconds=3)
    begin = time.monotonic()
    keeper.update(in_flight=1, progress=progress)
    keeper.set_phase("warmup")
    eventually(lambda: worlds(etcd)[0].record.phase == "warmup", seconds=3)
    assert time.monotonic() - begin < 0.6
    record = worlds(etcd)[0].record
    assert (record.in_flight, record.progress) == (1, None)
    assert record.phase_since is not None
    assert abs(time.time() - record.phase_since) < 60


def test_an_update_may_come_from_a_signals_handler(etcd: str, kept: Kept) -> None:
    keeper = kept.starts(etcd, world(), 60)
    count = 0

    def handle(_: int, __: object) -> None:
        nonlocal count
        count += 1
        keeper.update(in_flight=count)

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            keeper.update(trace=f"t{count}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert count > 10
    eventually(lambda: worlds(etcd)[0].record.in_flight == count, seconds=5)


def versions(url: str) -> int:
    """Return how often the only record has been written."""
    with contextlib.closing(pyetcd.client(host="127.0.0.1", port=int(url.rpartition(":")[2]))) as client:
        ((_, meta),) = client.get_prefix("dynamo_mpi/v1/worlds/")
        return int(meta.version)
