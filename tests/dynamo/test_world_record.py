# SPDX-License-Identifier: Apache-2.0
"""The worker record of real workers: there from the preflight on, gone with the worker, and in the way of a partner that doesn't fit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.discovery.etcd import EtcdAuth
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient
from dynamo_mpi.discovery.records import WorkerRecord, list_workers
from dynamo_mpi.engines.reference.weights import WEIGHTS_NAME
from tests.certificates import certificates, without_certificate
from tests.dynamo.running import EtcdServer, RunningWorker, eventually, terminate, worker_starter
from tests.etcd_users import PASSWORDS, add_users
from tests.servers import running_secured_etcd

pytestmark = pytest.mark.dynamo
WORLDS = "dynamo_mpi/v1/worlds/"
BLOCKS = ("--override-engine-args", '{"kv_cache_config": {"tokens_per_block": 64}}')
KV_NETWORK = ("--kv-network", "127.0.0.1")
TRANSCEIVER = ("--trtllm.cache_transceiver_config.backend", "DEFAULT")
BLOCKS_TRTLLM = ("--trtllm.kv_cache_config.tokens_per_block", "64")
# from launch to the end, on two busy cores; a load alone takes longer with three
REFUSAL_SECONDS = 8.0
Start = Callable[..., RunningWorker]


@pytest.fixture
def start(tmp_path: Path, etcd: EtcdServer, small_model_dir: Path, temporary: Path) -> Iterator[Start]:
    """Start workers that transfer KV on this host."""
    with worker_starter(tmp_path, etcd, small_model_dir, temporary) as begin:

        def begin_role(role: str, *flags: str, engine: str = "reference", **more: Any) -> RunningWorker:
            own = KV_NETWORK if engine == "reference" else () if role == "agg" else TRANSCEIVER
            return begin(*own, *flags, role=role, engine=engine, **more)

        yield begin_role


def phases(etcd: EtcdServer) -> list[str | None]:
    """Return what a world's only record has said, in its order; None for its end."""
    changes = etcd.written(WORLDS)
    assert len({key for key, _ in changes}) == 1, "it stays where it is"
    said = [None if value is None else WorkerRecord.unpack(value).phase for _, value in changes]
    # the record also changes within a phase: when Dynamo's instance is known
    return [phase for phase, _ in groupby(said)]


@pytest.mark.landing("trtllm")
@pytest.mark.parametrize("engine", ["reference", "trtllm"])
def test_it_is_there_from_the_preflight_to_the_end(
    engine: str, etcd: EtcdServer, start: Start, small_model_dir: Path
) -> None:
    worker = start("prefill", engine=engine, SLURM_JOB_ID="4711", SLURM_STEP_ID="2", DYN_MPI_LAUNCH="x-0")
    pid = worker.rank_zero()
    eventually(lambda: etcd.worlds()[0].phase == "serve", "it serves")
    (record,) = etcd.worlds()
    assert (record.role, record.engine, record.model) == ("prefill", engine, small_model_dir.name)
    assert record.endpoint == "dyn://dynamo.prefill.generate"
    assert (record.pid, record.job, record.step) == (pid, "4711", "2")
    assert record.launch == "x-0"
    (instance,) = {key.rpartition("/")[2] for key in etcd.keys("v1/instances/")}
    assert record.instance == instance
    assert record.layout.ranks == record.layout.tp_size * record.layout.pp_size
    assert record.contract is not None
    assert record.contract.num_layers == 3
    assert 0 < time.time() - record.started < 120
    assert record.phase_since is not None
    assert record.started < record.phase_since <= time.time()
    eventually(
        lambda: etcd.worlds()[0].in_flight == (0 if engine == "reference" else None), "no request is in flight", 5
    )
    terminate(worker)
    assert etcd.worlds() == [], "its lease would have lasted for half a minute"
    said = phases(etcd)
    assert said[:2] == ["preflight", "load"]
    assert said[-1] is None
    assert [phase for phase in said if phase in ("load", "warmup", "serve", "drain")] == [
        "load",
        "warmup",
        "serve",
        "drain",
    ]
    assert etcd.keys() == []


def test_an_aggregated_worker_has_one_and_no_peers(etcd: EtcdServer, start: Start) -> None:
    decode = start("decode")
    decode.ready()
    worker = start("agg", *BLOCKS)
    worker.ready()
    (record,) = [record for record in etcd.worlds() if record.role == "agg"]
    assert record.contract is None
    for each in (worker, decode):
        terminate(each)
    assert "peer" not in worker.text() + decode.text()
    assert etcd.worlds() == []


@pytest.mark.landing("prefill-decode-reference", "decode-prefill-trtllm")
@pytest.mark.parametrize("engine", ["reference", "trtllm"])
@pytest.mark.parametrize(("first", "second"), [("prefill", "decode"), ("decode", "prefill")])
def test_a_second_worker_that_does_not_fit_is_refused_before_it_loads(
    engine: str, first: str, second: str, etcd: EtcdServer, start: Start
) -> None:
    earlier = start(first, engine=engine)
    earlier.ready()
    dynamo = etcd.keys("v1/instances/")
    before = etcd.revision()
    begin = time.monotonic()
    other = start(second, *(BLOCKS if engine == "reference" else BLOCKS_TRTLLM), engine=engine)
    assert other.wait() == 78, other.text()
    assert time.monotonic() - begin < REFUSAL_SECONDS
    text = other.text()
    assert "error I1: prefill and decode differ in tokens per KV block" in text
    values = {first: 32, second: 64}
    assert f"found:    prefill {values['prefill']}, decode {values['decode']}\n" in text
    assert f"this {second} worker does not fit the {first} worker on {os.uname().nodename}" in text
    assert f"(pid {earlier.rank_zero()})" in text
    assert "Traceback" not in text
    changes = etcd.written(WORLDS, before)
    own = [(key, value) for key, value in changes if f"/{'prefill' if second == 'prefill' else 'backend'}/" in key]
    (phase, end) = [value if value is None else WorkerRecord.unpack(value).phase for _, value in own]
    assert (phase, end) == ("preflight", None), "it never came to load, and took its record away"
    (left,) = etcd.keys("dynamo_mpi/v1/failures/")
    assert own[0][0] == left.replace("/failures/", "/worlds/")
    assert etcd.keys("v1/instances/") == dynamo, "Dynamo never heard of it"
    assert [record.role for record in etcd.worlds()] == [first]
    terminate(earlier)


def test_two_engines_make_no_pair(etcd: EtcdServer, start: Start) -> None:
    earlier = start("prefill")
    earlier.ready()
    other = start("decode", engine="trtllm")
    assert other.wait() == 78, other.text()
    assert "error P5:" in other.text()
    assert "found:    prefill reference, decode trtllm" in other.text()
    terminate(earlier)


def test_of_two_that_start_together_one_serves(etcd: EtcdServer, start: Start) -> None:
    pair = [start("prefill"), start("decode", *BLOCKS)]

    def over() -> list[RunningWorker]:
        return [worker for worker in pair if worker.process.poll() is not None]

    (refused,) = eventually(over, "one is refused")
    assert refused.wait() == 78, refused.text()
    (winner,) = [worker for worker in pair if worker is not refused]
    winner.ready()
    terminate(winner)
    assert etcd.worlds() == []


def test_a_peer_that_fits_is_named_when_it_appears_and_leaves(etcd: EtcdServer, start: Start) -> None:
    prefill = start("prefill", ETCD_LEASE_TTL="3")
    prefill.ready()
    decode = start("decode", ETCD_LEASE_TTL="3")
    decode.ready()
    assert "preflight: fits the prefill worker on " in decode.text()
    eventually(lambda: "peer: a decode worker on " in prefill.text(), "it has come")
    assert f"(pid {decode.rank_zero()}) has appeared\n" in prefill.text()
    os.kill(decode.rank_zero(), signal.SIGKILL)
    eventually(lambda: "has disappeared" in prefill.text(), "it has gone", 20)
    terminate(prefill)


def test_the_check_can_be_left_out_and_is_not_silent_then(etcd: EtcdServer, start: Start) -> None:
    prefill = start("prefill", ETCD_LEASE_TTL="3")
    prefill.ready()
    decode = start("decode", *BLOCKS, "--no-peer-check")
    decode.ready()
    assert "preflight: does not fit the prefill worker" in decode.text()
    eventually(lambda: "has appeared, and does not fit: I1" in prefill.text(), "the first one reports it")
    for worker in (decode, prefill):
        terminate(worker)


def test_a_preflight_alone_writes_nothing(etcd: EtcdServer, start: Start) -> None:
    before = etcd.revision()
    worker = start("prefill", "--preflight-only")
    assert worker.wait() == 0, worker.text()
    assert etcd.revision() == before


@pytest.mark.full
def test_a_load_that_fails_takes_it_away(etcd: EtcdServer, start: Start, tmp_path: Path, model_dir: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken, ignore=shutil.ignore_patterns(WEIGHTS_NAME))
    (broken / WEIGHTS_NAME).write_bytes(bytes(2**20))
    worker = start("agg", model=broken)
    assert worker.wait() in (66, 70), worker.text()
    assert phases(etcd) == ["preflight", "load", None]


def test_a_proof_that_fails_takes_it_away(etcd: EtcdServer, start: Start) -> None:
    worker = start("agg", "--warmup-timeout", "0")
    assert worker.wait() == 124, worker.text()
    assert phases(etcd)[-1] is None


@pytest.mark.full
@pytest.mark.parametrize(("fault", "code"), [("raise:0", 70), ("raise:2", 70), ("fail:1", 70)])
def test_a_rank_of_tensorrt_llm_that_fails_takes_it_away(fault: str, code: int, etcd: EtcdServer, start: Start) -> None:
    worker = start("agg", engine="trtllm", STANDIN_TRTLLM_FAULT=fault)
    assert worker.wait() == code, worker.text()
    assert phases(etcd)[-1] is None


@pytest.mark.landing("reference-")
@pytest.mark.parametrize(("engine", "fault"), [("reference", ""), ("trtllm", "slow:60")])
def test_a_signal_while_it_loads_takes_it_away(
    engine: str, fault: str, etcd: EtcdServer, start: Start, model_dir: Path
) -> None:
    worker = start("agg", engine=engine, model=model_dir, STANDIN_TRTLLM_FAULT=fault)
    (record,) = eventually(etcd.worlds, "the record is there")
    os.kill(record.pid, signal.SIGTERM)
    assert worker.wait() == 143, worker.text()
    assert phases(etcd)[-1] is None
    assert not worker.ready_file.exists()


def test_all_leases_live_as_long_as_documented(etcd: EtcdServer, start: Start) -> None:
    """By itself, the runtime of ai-dynamo 1.4.2 takes 10 s, that of 1.6.1 takes 30 s."""
    worker = start("agg", ETCD_LEASE_TTL="")
    worker.ready()
    assert etcd.lease_lifetimes() == {30}
    terminate(worker)


def test_in_an_etcd_that_is_back_empty_no_record_outlives_the_worker(etcd: EtcdServer, start: Start) -> None:
    """The record alone could be had again; the worker's own lease can't."""
    worker = start("agg", ETCD_LEASE_TTL="9")
    worker.ready()
    etcd.stop()
    eventually(lambda: "can't be kept for now" in worker.text(), "it is reported", 20)
    shutil.rmtree(etcd.service.data)
    etcd.start()
    assert worker.wait() == 75, worker.text()
    assert worker.text().count("can't be kept for now") == 1
    assert etcd.worlds() == []


def test_what_somebody_else_has_written_is_left_out(etcd: EtcdServer, start: Start) -> None:
    etcd.put(f"{WORLDS}dynamo/backend/zz", b"{not json")
    etcd.put(f"{WORLDS}dynamo/backend/yy", json.dumps({"schema": 99}).encode())
    worker = start("prefill")
    worker.ready()
    assert "backend/zz' in etcd can't be read, and is ignored: no JSON" in worker.text()
    assert "backend/yy' in etcd can't be read, and is ignored: of schema 99" in worker.text()
    assert "Traceback" not in worker.text()
    terminate(worker)


@pytest.mark.landing("trtllm")
@pytest.mark.parametrize("engine", ["reference", "trtllm"])
def test_over_tls_in_both_directions_dynamo_and_the_record_are_there(engine: str, start: Start, tmp_path: Path) -> None:
    files = certificates(tmp_path / "tls")
    variables = files.client_environment()
    with running_secured_etcd(files) as url:
        stranger = start("agg", engine=engine, ETCD_ENDPOINTS=url, **without_certificate(files))
        assert stranger.wait() == 77, stranger.text()
        assert "etcd refuses a worker without a certificate" in stranger.text()

        worker = start("agg", engine=engine, ETCD_ENDPOINTS=url, **variables)
        worker.ready()
        client = GrpcEtcdClient([url], EtcdAuth.from_env(variables), 5)
        (stored,) = list_workers(client)[0]
        assert (stored.record.role, stored.record.engine) == ("agg", engine)
        assert len(client.get_prefix("v1/instances/dynamo/backend/generate/")) == 1
        assert client.get_prefix("v1/mdc/dynamo/backend/generate/")
        terminate(worker)
        assert client.get_prefix("dynamo_mpi/") == client.get_prefix("v1/") == [], stored.key
        client.close()
        assert "BEGIN" not in worker.text() + stranger.text()


def test_a_password_is_enough_and_rights_that_lack_are_named(etcd: EtcdServer, start: Start) -> None:
    add_users(etcd.url, ["v1/"])
    who = {"ETCD_AUTH_USERNAME": "worker", "ETCD_AUTH_PASSWORD": PASSWORDS["worker"]}
    refused = start("prefill", **who)
    assert refused.wait() == 77, refused.text()
    assert "grant-permission ROLE --prefix=true readwrite dynamo_mpi/" in refused.text()
    worker = start("prefill", "--no-peer-check", **who)
    worker.ready()
    assert "warning: no worker record: etcd refuses us" in worker.text()
    assert "warning: Dynamo's runtime does not renew its token for etcd's user worker" in worker.text()
    terminate(worker)
    assert PASSWORDS["worker"] not in refused.text() + worker.text()


def test_with_a_password_the_record_is_there(etcd: EtcdServer, start: Start) -> None:
    add_users(etcd.url, ["v1/", "dynamo_mpi/"])
    worker = start("prefill", ETCD_AUTH_USERNAME="worker", ETCD_AUTH_PASSWORD=PASSWORDS["worker"])
    worker.ready()
    client = GrpcEtcdClient([etcd.url], EtcdAuth(username="root", password=PASSWORDS["root"]), 5)
    assert [posted.record.role for posted in list_workers(client)[0]] == ["prefill"]
    terminate(worker)
    assert client.get_prefix("dynamo_mpi/") == []
    client.close()


def test_what_dynamos_runtime_would_try_for_two_minutes_is_refused_before_the_load(
    etcd: EtcdServer, start: Start
) -> None:
    """Also where nothing hangs on the record."""
    needless = start("agg", ETCD_AUTH_USERNAME="worker", ETCD_AUTH_PASSWORD=PASSWORDS["worker"])
    assert needless.wait() == 64, needless.text()
    assert "this etcd has no users" in needless.text()
    assert etcd.worlds() == []
    add_users(etcd.url, ["v1/", "dynamo_mpi/"])
    wrong = start("agg", ETCD_AUTH_USERNAME="worker", ETCD_AUTH_PASSWORD=PASSWORDS["root"])
    assert wrong.wait() == 77, wrong.text()
    assert "etcd refuses user worker" in wrong.text()
    assert PASSWORDS["root"] not in wrong.text()


@pytest.mark.landing("reference")
@pytest.mark.parametrize("engine", ["reference", "trtllm"])
def test_what_the_probes_have_measured_stands_in_it(engine: str, etcd: EtcdServer, start: Start) -> None:
    worker = start("agg", "--probe", "fabric", engine=engine)
    worker.ready()
    (record,) = etcd.worlds()
    assert record.probe is not None
    assert list(record.probe) == ["fabric", "seconds"]
    assert record.probe["fabric"]["over"] == "mpi"
    assert min(record.probe["fabric"]["kinds"]["exchange near"]["gbps"]) > 0
    assert "probe: " in worker.text()
    terminate(worker)
    assert phases(etcd)[:3] == ["preflight", "hardware_check", "load"]
