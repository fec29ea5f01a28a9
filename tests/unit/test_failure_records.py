# SPDX-License-Identifier: Apache-2.0
"""What a worker leaves in etcd when it fails: its text, and who writes it, reads it and takes it away in a real etcd."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest

from dynamo_mpi.common.failure import DetectedBy, Failure
from dynamo_mpi.common.hooks import WorkerHooks, WorldFailure
from dynamo_mpi.discovery.etcd import EtcdAuth
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient
from dynamo_mpi.discovery.failure_records import (
    TTL_SECONDS,
    FailureRecord,
    FailureRecordStore,
    WorkerIdentity,
    create_if_absent,
    failure_key,
    failure_record,
    failures_of,
    is_successor,
)
from dynamo_mpi.supervisor.leases import LeaseRevoker, encode_leases
from tests.dynamo.running import eventually
from tests.servers import listening, running_etcd
from tests.unit.worlds import world

ORIGIN = WorkerIdentity.of(world("decode", launch="x-0"))
FAILURE = Failure(3, 70, "it broke\n  fix:      repair it", DetectedBy.DISCONNECT, "serve", 0.0)
ENDED = WorldFailure((FAILURE,), "n2", "report")


def left(report: str = "error in serve: it broke", **changes: Any) -> FailureRecord:
    return failure_record(ORIGIN, FAILURE._replace(**changes), "n2", report)


def test_it_says_whose_what_where_and_when() -> None:
    content = json.loads(left(at=time.monotonic() - 5).pack())
    assert 4 < time.time() - content.pop("time") < 30
    assert content == {
        "schema": 1,
        "role": "decode",
        "component": "backend",
        "namespace": "dynamo",
        "endpoint": "dyn://dynamo.backend.generate",
        "model": "M",
        "launch": "x-0",
        "job": "12",
        "step": "0",
        "attempt": 1,
        "rank": 3,
        "host": "n2",
        "phase": "serve",
        "cause": "disconnect",
        "exit_code": 70,
        "error": "it broke",
        "report": "error in serve: it broke",
    }


def test_of_a_traceback_the_line_that_names_the_error_counts() -> None:
    assert (
        left(text='Traceback (most recent call last):\n  File "x"\nValueError: no\x1b[2J').error == "ValueError: no [2J"
    )
    assert left(text="").error == ""


@pytest.mark.parametrize("report", ["", "é" * 10_000, "\ud800" * 9000, "a" * 8192])
def test_a_report_is_clipped_to_what_may_stand_there(report: str) -> None:
    failure = left(report)
    assert len(failure.report.encode()) <= 8192
    assert FailureRecord.unpack(failure.pack()) == failure
    if len(report.encode("utf-8", "replace")) > 8192:
        assert failure.report.endswith("…")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"{", "no JSON"),
        (b"[]", "no JSON object"),
        (b'{"schema": 2}', "schema 2"),
        (b'{"schema": true}', "schema True"),
        (b'{"schema": 1}', "report"),
        (json.dumps({**json.loads(left().pack()), "report": "x" * 9000}).encode(), "8 KiB"),
        (json.dumps({**json.loads(left().pack()), "host": "\x1b"}).encode(), "host is no text"),
        (json.dumps({**json.loads(left().pack()), "rank": None}).encode(), "rank is missing"),
    ],
)
def test_what_is_none_is_refused_in_words(data: bytes, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        FailureRecord.unpack(data)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"launch": "x-1"}, False),
        ({"launch": None}, False),
        ({"role": "agg"}, False),
        ({"attempt": 2, "job": "13"}, True),
    ],
)
def test_a_launch_is_succeeded_by_its_own_next_start(changes: dict[str, Any], expected: bool) -> None:
    assert is_successor(replace(ORIGIN, **changes), left()) is expected


@pytest.mark.parametrize(("job", "step", "expected"), [("12", "0", True), ("12", "1", False), (None, None, False)])
def test_without_a_launch_the_job_step_decides(job: str | None, step: str | None, expected: bool) -> None:
    failure = replace(left(), launch=None, job=job and "12", step=job and "0")
    assert is_successor(replace(ORIGIN, launch=None, job=job, step=step), failure) is expected


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_etcd() as url:
        yield url


@pytest.fixture
def etcd(url: str) -> Iterator[GrpcEtcdClient]:
    etcd = GrpcEtcdClient([url], EtcdAuth(), 5)
    yield etcd
    for entry in etcd.get_prefix(failures_of()):
        etcd.revoke(entry.lease, 5)
    etcd.close()


def store(url: str, record: int = 0x1A, origin: WorkerIdentity = ORIGIN) -> FailureRecordStore:
    return FailureRecordStore(origin, {"ETCD_ENDPOINTS": url}, lambda: record)


def test_rank_0_leaves_it_for_an_hour_under_its_records_name(url: str, etcd: GrpcEtcdClient) -> None:
    store(url).on_failure(ENDED)
    ((key, value, _, lease),) = etcd.get_prefix(failures_of("dynamo"))
    assert key == failure_key(ORIGIN, 0x1A) == "dynamo_mpi/v1/failures/dynamo/backend/1a"
    assert FailureRecord.unpack(value).report == "report"
    assert etcd.lease_ttl(lease) == TTL_SECONDS
    store(url, record=0).on_failure(ENDED)
    assert len(etcd.get_prefix(failures_of("dynamo", "backend"))) == 2


def test_a_later_start_that_serves_removes_it_and_no_other(url: str, etcd: GrpcEtcdClient) -> None:
    other = replace(ORIGIN, launch="y")
    store(url).on_failure(ENDED)
    store(url, 0x2B, other).on_failure(ENDED)
    garbled = etcd.grant(60).id
    etcd.put(f"{failures_of('dynamo', 'backend')}zz", b"{", garbled)
    store(url, 0x3C).on_ready()
    eventually(lambda: len(etcd.get_prefix(failures_of())) == 2)
    assert failure_key(other, 0x2B) in [entry.key for entry in etcd.get_prefix(failures_of())]


def test_an_agent_writes_only_what_no_other_has_written(url: str, etcd: GrpcEtcdClient) -> None:
    assert create_if_absent(etcd, left("the first"), 0x1A)
    assert not create_if_absent(etcd, left("the second"), 0x1A)
    (entry,) = etcd.get_prefix(failures_of())
    assert FailureRecord.unpack(entry.value).report == "the first"
    store(url).on_failure(ENDED._replace(report="rank 0's own"))
    assert [FailureRecord.unpack(entry.value).report for entry in etcd.get_prefix(failures_of())] == ["rank 0's own"]


def test_an_agent_records_a_failure_once_and_no_orderly_end(url: str, etcd: GrpcEtcdClient) -> None:
    will = encode_leases({"record": 0x1A}, {"ETCD_ENDPOINTS": url}, asdict(ORIGIN), 0x1A)
    renouncing, revoker = LeaseRevoker(), LeaseRevoker()
    renouncing.set_leases(will)
    renouncing.clear()
    renouncing.record_failure(FAILURE, "n1", "report")
    assert etcd.get_prefix(failures_of()) == []
    revoker.set_leases(will)
    revoker.revoke()
    revoker.record_failure(FAILURE, "n1", "report")
    (entry,) = etcd.get_prefix(failures_of())
    assert FailureRecord.unpack(entry.value).host == "n1"
    etcd.revoke(entry.lease, 5)
    revoker.record_failure(FAILURE, "n1", "again")
    assert etcd.get_prefix(failures_of()) == []


@pytest.mark.parametrize(
    "will", [encode_leases({"record": 1}, {}), '{"leases": [1], "environ": {}}', "{", '{"leases": 1}']
)
def test_an_older_will_or_none_leaves_no_word(url: str, etcd: GrpcEtcdClient, will: str) -> None:
    revoker = LeaseRevoker()
    revoker.set_leases(will.replace('"environ": {}', f'"environ": {{"ETCD_ENDPOINTS": "{url}"}}'))
    revoker.record_failure(FAILURE, "n1", "report")
    assert etcd.get_prefix(failures_of()) == []


@pytest.mark.parametrize("environ", [{"ETCD_AUTH_USERNAME": "half a pair"}, {"ETCD_ENDPOINTS": "http://127.0.0.1:1"}])
def test_whatever_is_wrong_with_etcd_nothing_raises(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def unsuitable(_: object) -> None:
        raise TypeError("Descriptors cannot be created directly.")

    monkeypatch.setattr(GrpcEtcdClient, "_connected", unsuitable)
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    ours = FailureRecordStore(ORIGIN, environ, lambda: 0)
    ours.on_failure(ENDED)
    ours.on_ready()
    eventually(lambda: "failure records" not in [thread.name for thread in threading.enumerate()])
    assert raised == []


def test_an_etcd_that_hangs_delays_nothing() -> None:
    hooks = WorkerHooks()
    with listening() as port:
        hooks.add(store(f"http://127.0.0.1:{port}"))
        begin = time.monotonic()
        hooks.on_failure(ENDED)
        hooks.wait(begin + 1)
        assert time.monotonic() - begin < 1.5
