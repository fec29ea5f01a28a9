# SPDX-License-Identifier: Apache-2.0
"""What a worker publishes of itself before, while and without being in a real etcd."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.common.errors import AuthorizationError, UsageError
from dynamo_mpi.common.log import RankLogger
from dynamo_mpi.common.phases import PhaseProgress
from dynamo_mpi.config.sources import WorkerSources
from dynamo_mpi.config.worker import Settings, load_settings
from dynamo_mpi.discovery.etcd import EtcdAuth
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient
from dynamo_mpi.discovery.model_cards import PlannedCard
from dynamo_mpi.discovery.record_publisher import RecordPublisher
from dynamo_mpi.discovery.records import Progress, WorkerRecord, list_workers
from tests.etcd_users import PASSWORDS, add_users
from tests.servers import closed_port, running_etcd
from tests.unit.worlds import world


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(WorkerSources(["--model", str(tmp_path), "--probe-timeout", "1"], {}))


@pytest.fixture
def presence() -> Iterator[RecordPublisher]:
    presence = RecordPublisher(
        RankLogger(0, "n1"),
        replace(world("agg", engine="reference"), system="http://n1:9090", trace="00-ab-cd-01"),
        lambda _: None,
    )
    yield presence
    presence.unpublish()


def record_at(url: str) -> WorkerRecord:
    etcd = GrpcEtcdClient([url], EtcdAuth(), 5)
    try:
        (stored,) = list_workers(etcd)[0]
        return stored.record
    finally:
        etcd.close()


def publish(presence: RecordPublisher) -> None:
    presence.on_requests_in_flight(2)
    presence.on_progress(PhaseProgress("preflight", 1, 8, 3, "n2", 0.5))


def said(record: WorkerRecord) -> tuple[Any, ...]:
    return record.in_flight, record.progress, record.system, record.trace


ALL = (2, Progress(1, 8, 3, "n2", 0.5), "http://n1:9090", "00-ab-cd-01")


def test_what_is_published_later_is_there_soon(etcd: str, settings: Settings, presence: RecordPublisher) -> None:
    presence.publish(settings, {"ETCD_ENDPOINTS": etcd})
    assert said(record_at(etcd)) == (None, None, "http://n1:9090", "00-ab-cd-01")
    publish(presence)
    end = time.monotonic() + 5
    while said(record_at(etcd)) != ALL:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_without_etcd_it_may_be_given_as_an_option(settings: Settings, presence: RecordPublisher) -> None:
    with closed_port() as port:
        presence.publish(settings, {"ETCD_ENDPOINTS": f"http://127.0.0.1:{port}"})
    publish(presence)
    presence.on_phase("load")
    presence.unpublish()


def test_a_password_is_refused_where_none_is_asked_for_or_it_is_wrong(
    settings: Settings, presence: RecordPublisher, capfd: pytest.CaptureFixture[str]
) -> None:
    with running_etcd() as url:
        who = {"ETCD_ENDPOINTS": url, "ETCD_AUTH_USERNAME": "worker", "ETCD_AUTH_PASSWORD": PASSWORDS["root"]}
        with pytest.raises(UsageError, match="this etcd has no users"):
            presence.publish(settings, who)
        client = GrpcEtcdClient([url], EtcdAuth(), 5)
        assert client.get_prefix("dynamo_mpi/") == []
        client.close()
        add_users(url, ["dynamo_mpi/"])
        with pytest.raises(AuthorizationError, match="etcd refuses user worker"):
            presence.publish(settings, who)
        presence.publish(settings, {**who, "ETCD_AUTH_PASSWORD": PASSWORDS["worker"]})
        presence.unpublish()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("role", "refused"), [("agg", False), ("prefill", True)])
def test_a_record_stays_where_model_cards_cannot_be_read(
    role: str, refused: bool, settings: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ours = RecordPublisher(RankLogger(0, "n1"), world(role, engine="reference"), lambda _: None)
    card = PlannedCard("m", "aggregated", tmp_path)
    with running_etcd() as url:
        add_users(url, ["dynamo_mpi/"])
        who = {"ETCD_ENDPOINTS": url, "ETCD_AUTH_USERNAME": "worker", "ETCD_AUTH_PASSWORD": PASSWORDS["worker"]}
        root = GrpcEtcdClient([url], EtcdAuth(username="root", password=PASSWORDS["root"]), 5)
        try:
            if refused:
                with pytest.raises(AuthorizationError, match="readwrite dynamo_mpi/, also for v1/"):
                    ours.publish(replace(settings, role=role), who, card)
            else:
                ours.publish(settings, who, card)
                warning = capfd.readouterr().err
                assert "warning: the model card isn't compared with those of other workers: etcd refuses us" in warning
                assert "no worker record" not in warning
                assert "readwrite dynamo_mpi/, also for v1/" in warning
                assert len(list_workers(root)[0]) == 1
        finally:
            root.close()
            ours.unpublish()


@pytest.mark.parametrize(("engine", "done"), [("reference", 1), ("trtllm", None)])
def test_progress_of_a_phase_that_is_over_is_left_out(
    engine: str, done: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = RecordPublisher(RankLogger(0, "n1"), world("agg", engine=engine), lambda _: None)
    updates: list[Any] = []
    monkeypatch.setattr(ours, "_update", lambda progress: updates.append(progress))
    late = PhaseProgress("load", 1, 2, 1, "n2", 3.0)
    ours.on_phase("load")
    ours.on_progress(late)
    ours.on_phase("serve")
    ours.on_progress(late)
    assert [(one.done, one.slowest_host) for one in updates] == [(done, "n2")]
