# SPDX-License-Identifier: Apache-2.0
"""The world record as JSON: what was written is read, by other versions too, and everything else is refused in words."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.discovery.etcd import KeyValue
from dynamo_mpi.discovery.records import Progress, StoredRecord, WorkerRecord, list_workers, record_key, worlds_of
from tests.unit.worlds import world

if TYPE_CHECKING:
    from dynamo_mpi.discovery.etcd import EtcdClient


@pytest.mark.parametrize("role", ["agg", "prefill", "decode", "encode"])
def test_what_was_packed_is_unpacked(role: str) -> None:
    record = world(role, hosts=("n1", "nöde-2"), job=None, step=None, trtllm=None, instance="1a", launch="x-0")
    assert WorkerRecord.unpack(record.pack()) == record


def test_every_world_has_a_key_of_its_own_under_its_namespace() -> None:
    key = record_key(world(), 0x694D9F8A12B34C0E)
    assert key == "dynamo_mpi/v1/worlds/dynamo/prefill/694d9f8a12b34c0e"
    assert key.startswith(worlds_of("dynamo"))
    assert key.startswith(worlds_of(""))
    assert not key.startswith(worlds_of("dyn"))


def changed(**changes: Any) -> bytes:
    """Return a packed record with other values; ... takes a name away."""
    content = json.loads(world().pack())
    for path, value in changes.items():
        *parents, name = path.split("__")
        place = content
        for parent in parents:
            place = place[parent]
        if value is ...:
            del place[name]
        else:
            place[name] = value
    return json.dumps(content).encode()


def test_what_a_newer_version_adds_is_left_out() -> None:
    data = changed(future={"x": 1}, contract__future="x", layout__future=[1])
    assert WorkerRecord.unpack(data) == world()


def test_what_may_be_unknown_may_be_missing() -> None:
    record = WorkerRecord.unpack(changed(job=..., contract__kv_dtype=...))
    assert record.job is None
    assert record.contract is not None
    assert record.contract.kv_dtype is None
    assert WorkerRecord.unpack(changed(contract=...)).contract is None
    older = WorkerRecord.unpack(changed(instance=..., launch=...))
    assert (older.instance, older.launch) == (None, None)
    assert WorkerRecord.unpack(changed(attempt=...)).attempt == 1
    assert WorkerRecord.unpack(changed(attempt=3)).attempt == 3
    names = ("phase_since", "in_flight", "progress", "system", "trace")
    assert WorkerRecord.unpack(changed(**dict.fromkeys(names, ...))) == world()


def test_how_far_it_has_come_is_read_again() -> None:
    record = world(
        phase_since=2.5,
        in_flight=0,
        progress=Progress(1, 8, 7, "n2", 3.25),
        system="http://n1:9090",
        trace="00-ab-cd-01",
    )
    assert WorkerRecord.unpack(record.pack()) == record
    assert WorkerRecord.unpack(world(progress=Progress(8, 8, None, None, 1)).pack()).progress == Progress(
        8, 8, None, None, 1
    )


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100000, "no JSON"),
        (b"[]", "no JSON object"),
        (b"null", "no JSON object"),
        (b"{}", "schema None"),
        (changed(schema=2), "schema 2"),
        (changed(schema=True), "schema True"),
        (changed(schema="1"), "schema '1'"),
        (changed(role=...), "role"),
        (changed(role=1), "role is not a text"),
        (changed(pid="1"), "pid is not an integer"),
        (changed(pid=True), "pid is not an integer"),
        (changed(pid=1.5), "pid is not an integer"),
        (changed(started="now"), "started is not a number"),
        (changed(hosts="n1"), "hosts is not a list of texts"),
        (changed(instance=1), "instance is not a text"),
        (changed(launch="a\nb"), "launch is no text that can be displayed"),
        (changed(hosts=["n1", 2]), "hosts is not a list of texts"),
        (changed(in_flight="3"), "in_flight is not an integer"),
        (changed(phase_since="now"), "phase_since is not a number"),
        (changed(progress=[]), "Progress is not an object"),
        (changed(progress={"done": 1}), "ranks"),
        (changed(system="http://\x1b[2J"), "system is no text"),
        (changed(layout=None), "layout is missing"),
        (changed(layout=[]), "RecordedLayout is not an object"),
        (changed(layout__tp_size=...), "tp_size"),
        (changed(layout__attention_dp=0), "attention_dp is not true or false"),
        (changed(contract=[]), "Contract is not an object"),
        (changed(contract__num_layers="32"), "num_layers is not an integer"),
        (changed(phase="serve\ndynamo_mpi: all is well"), "phase is no text"),
        (changed(hosts=["\x1b[2J"]), "hosts is no text"),
        (changed(model="M" * 5000), "model is no text"),
    ],
)
def test_what_is_no_record_is_refused_in_words(data: bytes, word: str) -> None:
    with pytest.raises(ValueError, match=r"^[ -~]*$") as caught:
        WorkerRecord.unpack(data)
    assert word in str(caught.value)


class Stored:
    """An etcd with these records of namespace ``dynamo``, component ``prefill``."""

    def __init__(self, *values: bytes) -> None:
        self._entries = [
            KeyValue(f"{worlds_of('dynamo')}prefill/{number:x}", value, number, 7)
            for number, value in enumerate(values)
        ]

    def get_prefix(self, prefix: str) -> list[KeyValue]:
        return [entry for entry in self._entries if entry.key.startswith(prefix)]


def listed(*values: bytes, problems: dict[str, list[str]] | None = None) -> tuple[list[StoredRecord], dict[str, str]]:
    return list_workers(cast("EtcdClient", Stored(*values)), "dynamo", problems)


@pytest.mark.parametrize("tolerant", [False, True])
def test_record_under_another_workers_key_is_left_out(tolerant: bool) -> None:
    found, unreadable = listed(world().pack(), world("decode").pack(), problems={} if tolerant else None)
    assert [(stored.record, stored.create_revision, stored.lease) for stored in found] == [(world(), 0, 7)]
    (reason,) = unreadable.values()
    assert reason == "of dynamo/backend, under the key of another worker"


def test_strict_reader_leaves_out_what_a_tolerant_one_lists() -> None:
    data = changed(started="now", layout__tp_size=..., hosts=["n\x1b[2J"], contract=[])
    assert listed(data)[0] == []
    problems: dict[str, list[str]] = {}
    (stored,), unreadable = listed(data, problems=problems)
    assert unreadable == {}
    assert problems == {stored.key: ["contract is not an object", "started is not a number"]}
    record = stored.record
    assert (record.started, record.hosts, record.contract, record.layout.is_known) == (0.0, ("n\\x1b[2J",), None, False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(sorted(json.loads(world().pack())))


@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_value_is_read_or_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        WorkerRecord.unpack(data)


@given(NAMES, JSON)
def test_any_value_of_one_name_is_read_or_refused(name: str, value: Any) -> None:
    try:
        record = WorkerRecord.unpack(changed(**{name: value}))
    except ValueError:
        return
    # NaN is not equal to itself
    assert repr(WorkerRecord.unpack(record.pack())) == repr(record)
