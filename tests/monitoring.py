# SPDX-License-Identifier: Apache-2.0
"""monitoring/: the alert rules and the dashboard as data, and Prometheus' programs."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.slurm.cluster.packages import install, why_not_installable

FOLDER = ROOT / "monitoring"
PACKAGE = "prometheus"
REQUIRES = ("CI", "DYN_MPI_REQUIRE_SLURM")
# as the dashboard's user leaves them: all
_VARIABLES = {"$job": ".*", "$instance": ".*", "$model": ".*", "$__rate_interval": "1m"}
_SELECTOR = re.compile(r"\b((?:dynamo|node)_\w+|up)\b(?:\{([^}]*)\})?")
_LABEL = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')


def rules() -> list[dict[str, Any]]:
    """Return the alert rules."""
    (group,) = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def dashboard() -> dict[str, Any]:
    """Return the Grafana dashboard."""
    found: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
    return found


def queries() -> dict[str, str]:
    """Return every query of the dashboard with its variables filled in, by panel and its place there."""
    found = {}
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"]
            for name, value in _VARIABLES.items():
                query = query.replace(name, value)
            found[f"{panel['title']}, {target['refId']}"] = query
    return found


def selectors(query: str) -> list[tuple[str, set[str]]]:
    """Return the metrics that a query selects, each with the labels by which it does."""
    return [(name, set(_LABEL.findall(labels))) for name, labels in _SELECTOR.findall(query)]


def program(name: str) -> str:
    """Return Prometheus' program of that name; where one is required and this is Debian, install it, else skip the test."""
    found = shutil.which(name)
    if found is None and any(os.environ.get(variable) in ("1", "true") for variable in REQUIRES):
        reason = why_not_installable() or ("not root" if os.geteuid() else "")
        assert not reason, f"no {name}, and it can't be installed: {reason}"
        install([PACKAGE])
        found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on PATH (Debian's package {PACKAGE})")
    return str(Path(found))
