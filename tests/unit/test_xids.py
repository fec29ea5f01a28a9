# SPDX-License-Identifier: Apache-2.0
"""Xids: which make a node unfit, how the node's agent hears of them, what a report says of them, and who is blamed."""

from __future__ import annotations

import json
import re
import selectors
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.common.failure import DetectedBy, Failure
from dynamo_mpi.common.xids import CAUSE_SECONDS, GpuError, meaning, needs_repair
from dynamo_mpi.deploy.blame import Evidence, RankReport, blame
from dynamo_mpi.supervisor.agent_failures import History, Report, with_gpu_errors
from dynamo_mpi.supervisor.xid_watch import XidWatch
from tests.conftest import ROOT

from .test_gpu_health import describe, nvml  # noqa: F401 - fixtures

NODES = ("n3", "n4")
LOST = GpuError(79, 3, "GPU-3", "n4", -0.4)
FAULT = GpuError(31, 0, "GPU-0", "n3", -0.1)


# NVIDIA's catalogue: a reset, a restart, or a mechanical check before anything else computes there
@pytest.mark.parametrize("xid", [46, 48, 54, 62, 64, 74, 79, 95, 119, 120, 140, 143, 158])
def test_a_gpu_that_must_be_reset_makes_its_node_unfit(xid: int) -> None:
    assert needs_repair(xid)


# applications' own faults, what the driver corrects, what a subcode decides, and what nobody knows
@pytest.mark.parametrize("xid", [13, 31, 43, 45, 63, 68, 92, 94, 109, 121, 144, 149, 154, 155, 999])
def test_an_application_s_fault_doesn_t(xid: int) -> None:
    assert not needs_repair(xid)


def test_the_guide_has_all_of_them() -> None:
    text = (ROOT / "docs" / "guides" / "recovery.md").read_text()
    listed = re.search(r"one of the last 15 minutes \(([\d, ]+)\)", text)
    assert listed is not None
    assert [int(number) for number in listed[1].split(", ")] == [xid for xid in range(1000) if needs_repair(xid)]


def test_what_xids_mean() -> None:
    assert str(LOST) == "Xid 79 (GPU has fallen off the bus) on GPU 3 (GPU-3)"
    assert str(GpuError(999, -1, "", "n4", 0.0)) == "Xid 999 (not in NVIDIA's catalogue of December 2026) on a GPU"
    assert meaning(31) == "GPU memory page fault"


def test_the_agent_hears_of_the_xids_of_the_ranks_gpus(describe: Callable[..., Path]) -> None:  # noqa: F811
    path = describe({}, {}, {})
    seen: list[dict[str, Any]] = []
    with selectors.DefaultSelector() as selector:
        XidWatch(selector, "n4", ["GPU-1", "GPU-2"], seen.append)
        content = json.loads(path.read_text()) | {"xids": [["GPU-0", 79], ["GPU-2", 48], ["GPU-1", 31]]}
        path.with_suffix(".new").write_text(json.dumps(content))
        path.with_suffix(".new").replace(path)
        end = time.monotonic() + 20
        while len(seen) < 2 and time.monotonic() < end:
            for key, _ in selector.select(0.2):
                key.data()
    # another job's GPU isn't listened to
    errors = [GpuError.of(each, time.monotonic()) for each in seen]
    assert [(one.xid, one.gpu, one.uuid, one.host) for one in errors] == [
        (48, 2, "GPU-2", "n4"),
        (31, 1, "GPU-1", "n4"),
    ]
    assert all(time.monotonic() - one.at < 20 for one in errors)


def test_what_follows_from_a_fault_doesn_t_push_it_out() -> None:
    history = History(4)
    now = time.monotonic()
    follows = [GpuError(45, 0, f"GPU-{number}", "n3", now) for number in range(20)]
    for each in (LOST, *follows, *follows):
        history.note_gpu_error(each.as_document(now))
    kept = [(each.xid, each.uuid) for each in history.gpu_errors]
    assert (79, LOST.uuid) in kept
    assert len(kept) == len(set(kept)) <= 8


def test_a_report_has_what_the_driver_said_before() -> None:
    now = time.monotonic()
    failure = Failure(1, 70, "NCCL error", DetectedBy.REPORT, "serve", now)
    report = Report(failure, "n3", "error in serve: NCCL error", (), 1, "n3")
    assert with_gpu_errors(report, ()) is report
    errors = [FAULT._replace(at=now - 0.1), LOST._replace(at=now - 0.4)]
    text = with_gpu_errors(report, errors).text
    assert text.splitlines()[1:] == [
        "  GPU errors by the driver:",
        "    Xid 79 (GPU has fallen off the bus) on GPU 3 (GPU-3) of n4, 0.4 s before",
        "    Xid 31 (GPU memory page fault) on GPU 0 (GPU-0) of n3, 0.1 s before",
    ]


def report(*errors: GpuError, code: int = 70, host: str = "n3") -> RankReport:
    content = {"rank": 0, "host": host, "phase": "serve", "cause": "report", "exit_code": code, "error": "NCCL error"}
    written = [error.as_document(0.0) for error in errors]
    return RankReport.of(
        {**content, "time": 1.0, "report": "NCCL error", **({"gpu_errors": written} if errors else {})}
    )


CASES: dict[str, tuple[Evidence, tuple[int, str, dict[str, str]]]] = {
    "a GPU of another node than the rank's that saw it first": (
        Evidence(70, NODES, (report(FAULT, LOST),)),
        (-1, "n4", {"n4": str(LOST)}),
    ),
    "a GPU of the rank's own node": (
        Evidence(70, NODES, (report(LOST, host="n4"),)),
        (0, "n4", {"n4": str(LOST)}),
    ),
    "the first of two": (
        Evidence(70, NODES, (report(LOST._replace(xid=48, host="n3", at=-9.0), LOST),)),
        (0, "n3", {"n3": str(LOST._replace(xid=48)), "n4": str(LOST)}),
    ),
    "an application's fault": (Evidence(70, NODES, (report(FAULT),)), (0, "n3", {})),
    "long ago": (Evidence(70, NODES, (report(LOST._replace(at=-CAUSE_SECONDS - 1)),)), (0, "n3", {})),
    "a mistake stays one": (Evidence(64, NODES, (report(LOST, code=64),)), (0, "n3", {})),
    "of a host that isn't the worker's": (Evidence(70, NODES, (report(LOST._replace(host="n9")),)), (0, "n3", {})),
}


@pytest.mark.parametrize("name", CASES)
def test_a_broken_gpu_s_node_is_blamed(name: str) -> None:
    evidence, (rank, host, unfit) = CASES[name]
    found = blame(evidence)
    assert (found.rank, found.host, found.unfit) == (rank, host, unfit)
    if unfit:
        assert found.error == unfit[host]
        assert found.cause.startswith("xid ")


def test_a_failure_file_whose_gpu_errors_make_no_sense_is_no_report() -> None:
    content = {"rank": 0, "host": "n3", "phase": "", "cause": "report", "exit_code": 70, "error": "", "time": 1.0}
    with pytest.raises((KeyError, TypeError, ValueError)):
        RankReport.of({**content, "gpu_errors": ["79"]})
