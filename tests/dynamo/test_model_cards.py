# SPDX-License-Identifier: Apache-2.0
"""Two workers of one name whose model cards differ, beside a real frontend: the second is refused before it loads, or warned."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import mpi_environment
from tests.dynamo.running import EtcdServer, RunningWorker, eventually, running_frontend

pytestmark = pytest.mark.dynamo
Start = Callable[..., RunningWorker]


@pytest.fixture
def start(tmp_path: Path, etcd: EtcdServer, tiny_model_dir: Path) -> Iterator[Start]:
    """Start workers of one rank."""
    workers: list[RunningWorker] = []

    def begin(*flags: str, model: Path = tiny_model_dir) -> RunningWorker:
        words = ("--engine", "reference", "--served-model-name", "tiny", *flags)
        workers.append(
            RunningWorker(tmp_path, etcd, model, 1, *words, name=f"worker-{len(workers)}", OMP_NUM_THREADS="1")
        )
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


def call(etcd: EtcdServer, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a verb of `dynamo-mpi` that reads etcd."""
    command = [sys.executable, "-m", "dynamo_mpi", *words, "--output", "json"]
    environment = mpi_environment({"ETCD_ENDPOINTS": etcd.url})
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)


def status(etcd: EtcdServer) -> list[str]:
    """Return the warnings of `dynamo-mpi status`."""
    warnings: list[str] = json.loads(call(etcd, "status").stdout)["warnings"]
    return warnings


def test_a_worker_with_another_card_is_refused_before_it_loads(
    etcd: EtcdServer, start: Start, tmp_path: Path, tiny_model_dir: Path
) -> None:
    first = start("--max-seq-len", "256")
    first.ready()
    (card,) = etcd.keys("v1/mdc/")
    there = "/".join(card.split("/")[-3::2])
    with running_frontend(tmp_path, etcd) as frontend:
        eventually(lambda: "tiny" in frontend.models(), "the model is listed")
        second = start("--max-seq-len", "128")
        assert second.wait() == 78, second.text()
        assert f"    {there}: context length 128 here, 256 there\n" in second.text()
        assert "--allow-unlike-card" in second.text()
        assert "Traceback" not in second.text()
        # another template: a prompt would be made by the first one's
        other = tmp_path / "other"
        shutil.copytree(tiny_model_dir, other)
        config = json.loads((other / "tokenizer_config.json").read_text())
        (other / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
        third = start("--max-seq-len", "256", model=other)
        assert third.wait() == 78, third.text()
        assert re.search(
            rf"    {there}: tokenizer_config\.json \w{{8}} \(\d+ bytes\) here, \w{{8}} \(\d+ bytes\) there\n",
            third.text(),
        )
        (other / "tokenizer_config.json").write_text(json.dumps(config))
        (other / "chat_template.jinja").write_text("{{ messages }}")
        fourth = start("--max-seq-len", "256", model=other)
        assert fourth.wait() == 78, fourth.text()
        assert "chat_template.jinja " in fourth.text()
        assert "here, missing there" in fourth.text()
        assert etcd.keys("v1/mdc/") == [card]
        assert status(etcd) == []
        assert len(etcd.worlds()) == 1


def test_a_rolling_change_is_allowed_and_named(etcd: EtcdServer, start: Start) -> None:
    first = start("--max-seq-len", "256")
    first.ready()
    second = start("--max-seq-len", "128", "--allow-unlike-card")
    second.ready()
    assert (
        second.text().count("warning: the model card of tiny differs from that of workers that serve it already") == 2
    )
    assert "context length 128 here, 256 there" in second.text()
    (warning,) = status(etcd)
    assert "the cards of tiny in dynamo differ, and frontends take one for all" in warning
    assert re.search(r": context length 256 at \S+/\S+, 128 at \S+/\S+$", warning), warning
    waited = call(etcd, "wait", "--timeout", "1")
    assert waited.returncode == 78, waited.stderr
    assert f"tiny: {warning}" in waited.stderr
    # an equal one fits the second, and is still refused for the first
    third = start("--max-seq-len", "128")
    assert third.wait() == 78, third.text()
    os.kill(first.rank_zero(), 15)
    assert first.wait() == 0, first.text()
    assert status(etcd) == []
    assert call(etcd, "wait", "--timeout", "10").returncode == 0
    fourth = start("--max-seq-len", "128")
    fourth.ready()
    assert "warning: the model card" not in fourth.text()
