# SPDX-License-Identifier: Apache-2.0
"""The dashboard's queries and the alerts' over what a real worker and a real frontend give."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dynamo_mpi.common.ports import free_port
from tests.dynamo.running import EtcdServer, RunningWorker, eventually, http_get, running_frontend, system_port
from tests.dynamo.test_worker_life import Stream
from tests.monitoring import FOLDER, program, queries, rules, selectors

pytestmark = pytest.mark.dynamo
# there once a world has ended, or with --stage
LATER = {
    "dynamo_mpi_exit_code",
    "dynamo_mpi_stage_bytes",
    "dynamo_mpi_compile_cache_files",
    "dynamo_mpi_compile_cache_seconds",
}
SCRAPED = {"job", "instance"}


@contextmanager
def served(tmp_path: Path, etcd: EtcdServer, model_dir: Path) -> Iterator[tuple[str, str]]:
    """A worker and a frontend that have answered; yields where their metrics are."""
    port = system_port()
    variables = {"DYN_SYSTEM_HOST": "127.0.0.1", "DYN_SYSTEM_PORT": str(port)}
    worker = RunningWorker(tmp_path, etcd, model_dir, 3, **variables)
    try:
        worker.ready()
        with running_frontend(tmp_path, etcd) as frontend:
            eventually(lambda: model_dir.name in frontend.models(), "the model is listed")
            assert list(Stream(frontend.port, model_dir.name, 8).events())[-1] == "[DONE]"
            places = f"127.0.0.1:{port}", f"127.0.0.1:{frontend.port}"
            eventually(lambda: "dynamo_mpi_ranks " in http_get(f"http://{places[0]}/metrics")[1], "rank 0's metrics")
            yield places
    finally:
        worker.stop()


def test_what_is_asked_for_is_there(tmp_path: Path, etcd: EtcdServer, model_dir: Path) -> None:
    there: dict[str, set[str]] = {"up": set()}
    with served(tmp_path, etcd, model_dir) as places:
        for place in places:
            for family in text_string_to_metric_families(http_get(f"http://{place}/metrics")[1]):
                for sample in family.samples:
                    there.setdefault(sample.name, set()).update(sample.labels)
    for query in (*queries().values(), *(rule["expr"] for rule in rules())):
        for name, labels in selectors(query):
            assert name in LATER or (name in there and labels <= there[name] | SCRAPED), query


@pytest.mark.full
def test_prometheus_answers_every_query_of_the_dashboard(tmp_path: Path, etcd: EtcdServer, model_dir: Path) -> None:
    prometheus, port = program("prometheus"), free_port()
    with served(tmp_path, etcd, model_dir) as (worker, frontend):
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
        config["global"]["scrape_interval"] = "1s"
        config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
        for scrape, place in zip(config["scrape_configs"], (worker, frontend), strict=True):
            scrape["static_configs"] = [{"targets": [place]}]
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        words = [prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
        with (tmp_path / "prometheus.log").open("wb") as log:
            child = subprocess.Popen([*words, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
            try:
                ask = Asker(f"http://127.0.0.1:{port}/api/v1")
                eventually(lambda: ask.results("count(up == 1)") == ["2"], "both are scraped")
                for place, query in queries().items():
                    if not any(name in LATER for name, _ in selectors(query)):
                        # a rate needs two scrapes
                        eventually(lambda query=query: ask.results(query), f"{place}: {query}", 30)  # type: ignore[misc]
                health = {one["name"]: one["health"] for one in ask.rules()}
                assert health == {rule["alert"]: "ok" for rule in rules()}
                firing = {one["name"] for one in ask.rules() if one["alerts"]}
                assert firing <= {"DynamoMpiPreflightWarnings"}
            finally:
                child.kill()
                child.wait()


class Asker:
    """Asks Prometheus' API.

    Args:
        url: up to its version.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def results(self, query: str) -> list[str]:
        """Return the values of a query; empty where it has none, or Prometheus isn't there yet."""
        data = self._get(f"query?{urllib.parse.urlencode({'query': query})}")
        return [one["value"][1] for one in data.get("result", ())]

    def rules(self) -> list[dict[str, Any]]:
        """Return the alert rules, once they were evaluated."""

        def read() -> list[dict[str, Any]]:
            found = [rule for group in self._get("rules")["groups"] for rule in group["rules"]]
            return found if all(rule["health"] != "unknown" for rule in found) else []

        return eventually(read, "the rules were evaluated", 90)

    def _get(self, path: str) -> dict[str, Any]:
        status, text = http_get(f"{self._url}/{path}")
        if status == 0 or status == 503:
            return {}
        answer = json.loads(text)
        assert answer["status"] == "success", f"{path}: {text}"
        data: dict[str, Any] = answer["data"]
        return data
