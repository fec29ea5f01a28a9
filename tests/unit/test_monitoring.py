# SPDX-License-Identifier: Apache-2.0
"""monitoring/: alert rules by promtool, and what both they and the dashboard name."""

from __future__ import annotations

import itertools
import re
import subprocess
from typing import Any

import pytest
import yaml

from dynamo_mpi.common.failure import DetectedBy
from dynamo_mpi.common.phases import PHASES, PhaseProgress, RankTimings
from dynamo_mpi.layout.finding import Severity
from dynamo_mpi.telemetry.health_state import HealthState, world_metrics
from dynamo_mpi.telemetry.metrics import WorldNumbers, metrics_of_world
from tests.conftest import ROOT
from tests.monitoring import FOLDER, dashboard, program, queries, rules, selectors
from tests.unit.test_docs_links import broken

STATE = HealthState(0, "n1", 7, 1000.5, 10.0, attempt=2, phase="load", since=1002.0)
TESTS: list[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts.test.yml").read_text(encoding="utf-8"))["tests"]


def our_metrics() -> set[str]:
    numbers = WorldNumbers((RankTimings(0, "n0", 0.0, ()),), PhaseProgress("serve", 1, 1, None, None, 0.0))
    return {metric.name for metric in (*metrics_of_world(numbers), *world_metrics(STATE, ready=True))}


@pytest.mark.parametrize("query", [*queries().values(), *(rule["expr"] for rule in rules())])
def test_a_query_names_metrics_that_we_have(query: str) -> None:
    names = {name for name, _ in selectors(query)}
    assert names
    ours = {name for name in names if name.startswith("dynamo_mpi_")}
    assert ours <= our_metrics()
    assert all(name in ours or name == "up" or name.startswith("dynamo_frontend_") for name in names)


def test_every_metric_of_ours_is_in_a_panel_or_an_alert() -> None:
    used = {
        name for query in (*queries().values(), *(rule["expr"] for rule in rules())) for name, _ in selectors(query)
    }
    assert our_metrics() <= used


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_to_do_and_has_cases_of_both_kinds(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert broken(ROOT / "README.md", f"[page]({rule['annotations']['runbook']})") == []
    mine = [case for test in TESTS for case in test["alert_rule_test"] if case["alertname"] == rule["alert"]]
    assert sorted(bool(case["exp_alerts"]) for case in mine) == [False, True]


def test_the_dashboard_s_panels_have_places_and_queries_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["type"] == "row" or panel["targets"] for panel in panels)
    for one, other in itertools.combinations((panel["gridPos"] for panel in panels), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    variables = {variable["name"] for variable in dashboard()["templating"]["list"]} | {"__rate_interval"}
    texts = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert {name for text in texts for name in re.findall(r"\$(\w+)", text)} <= variables


@pytest.mark.full
def test_promtool_takes_the_rules_and_their_tests_pass() -> None:
    promtool = program("promtool")
    for words in (
        ("check", "rules", "alerts.yml"),
        ("check", "config", "prometheus.yml"),
        ("test", "rules", "alerts.test.yml"),
    ):
        done = subprocess.run([promtool, *words], cwd=FOLDER, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "SUCCESS" in done.stdout


def test_labels_have_values_that_exist() -> None:
    known = {
        "phase": set(PHASES),
        "cause": {cause.name.lower() for cause in DetectedBy},
        "severity": {severity.value for severity in Severity},
        "statistic": {"rank0", "min", "median", "max"},
    }
    for query in (*queries().values(), *(rule["expr"] for rule in rules())):
        for label, values in re.findall(r'(phase|cause|severity|statistic)[!=]~?"([^"]*)"', query):
            assert set(values.split("|")) <= known[label], query
