# SPDX-License-Identifier: Apache-2.0
"""The GPU check: what is read of a GPU, over a stand-in for nvidia-ml-py, the wait for memory, the rules, and what is probed at all."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from dynamo_mpi.checks.gpu_check import figures_of, judge
from dynamo_mpi.checks.gpu_facts import GpuFacts
from dynamo_mpi.checks.gpu_health import GpuHealth, health_of_node, health_of_rank, no_health
from dynamo_mpi.checks.gpu_rules import is_busy
from dynamo_mpi.checks.hardware import (
    EvaluationInput,
    HardwareCheckPlan,
    chosen_checks,
    memory_is_awaited,
    obsolete,
    plan_hardware_checks,
    skipped_checks,
)
from dynamo_mpi.checks.local_check import check_this_host
from dynamo_mpi.checks.run_hardware_checks import Report, allowed_seconds
from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.config.sources import WorkerSources
from dynamo_mpi.config.worker import load_settings
from dynamo_mpi.layout.finding import Severity
from tests.conftest import ROOT
from tests.gpu_nodes import gpu_node, write_whole

GIB = 2**30
SIZE = 80 * GIB
Describe = Callable[..., Path]


class Place(NamedTuple):
    host: str


def standin() -> ModuleType:
    """Load the stand-in, without what stands beside it."""
    spec = importlib.util.spec_from_file_location("pynvml", ROOT / "tests" / "standins" / "pynvml" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = standin()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


@pytest.fixture
def describe(nvml: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Describe:
    """Describe a node's GPUs, each by what it has of its own."""
    path = tmp_path / "node.json"
    monkeypatch.setenv("PYNVML_STANDIN", str(path))

    def write(*gpus: dict[str, Any]) -> Path:
        write_whole(path, gpu_node(*gpus))
        return path

    return write


def test_a_rank_reads_the_gpu_that_the_engine_gives_it(describe: Describe) -> None:
    describe(
        {},
        {
            "clocks": {"1": 1755, "2": 2619},
            "nvlinks": [1, 0, 1],
            "pcie": [4, 8],
            "remapped": [0, 0, 1, 0],
            "reasons": 0x48,
        },
    )
    for rank in (1, 3):
        health = health_of_rank(rank, {}, is_busy, 0.0)
        assert (health.facts.uuid, health.driver, health.problem) == ("GPU-1", "580.1", "")
        assert (health.sm_mhz, health.memory_mhz, health.power_limit) == (1755, 2619, 700000)
        assert (health.links_up, health.links) == (2, 3)
        assert (health.pcie_generation, health.pcie_width) == (4, 8)
        assert (health.remap_pending, health.remap_failed, health.uncorrected, health.recovery_action) == (1, 0, 0, 0)
        assert (health.slow_reasons, health.compute_mode, health.ecc_on) == (0x48, 0, 1)
    assert health_of_rank(1, {"CUDA_VISIBLE_DEVICES": "0"}, is_busy, 0.0).facts.uuid == "GPU-0"


def test_what_a_driver_does_not_know_is_unknown_and_no_error(
    describe: Describe, nvml: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NVMLError_NotSupported(nvml.NVMLError):  # type: ignore[misc, name-defined] # a module's class
        pass

    def refuse(*_: object) -> None:
        raise NVMLError_NotSupported

    describe({})
    for name in dir(nvml):
        if name.startswith("nvmlDeviceGet") and name not in (
            "nvmlDeviceGetCount",
            "nvmlDeviceGetHandleByIndex",
            "nvmlDeviceGetUUID",
            "nvmlDeviceGetName",
            "nvmlDeviceGetCudaComputeCapability",
            "nvmlDeviceGetMemoryInfo",
        ):
            monkeypatch.setattr(nvml, name, refuse)
    # the name that it had before; the stand-in refuses to be asked for it
    monkeypatch.setitem(vars(nvml), "nvmlDeviceGetCurrentClocksThrottleReasons", refuse)
    health = health_of_rank(0, {}, is_busy, 0.0)
    assert health == GpuHealth(health.facts, "580.1", links_up=0, links=0)
    assert rules(health, health) == []


def test_a_blind_rank_and_no_nvml_are_problems(describe: Describe, monkeypatch: pytest.MonkeyPatch) -> None:
    describe({})
    assert health_of_rank(0, {"CUDA_VISIBLE_DEVICES": ""}, is_busy, 0.0).problem == "this rank sees no GPU"
    monkeypatch.setenv("PYNVML_STANDIN", "")
    assert health_of_rank(0, {}, is_busy, 0.0).problem == "Driver Not Loaded"
    assert health_of_node() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pynvml" in health_of_rank(0, {}, is_busy, 0.0).problem
    assert check_this_host({}).figures == {}


def test_memory_of_an_earlier_step_is_waited_for(describe: Describe) -> None:
    held = {"free": SIZE - 20 * GIB, "used": 20 * GIB, "processes": [[42, 20 * GIB]]}
    describe(held)
    began = time.monotonic()
    timer = threading.Timer(0.4, describe, ({},))
    timer.start()
    health = health_of_rank(0, {}, is_busy, began + 10)
    timer.join()
    assert 0.3 < health.waited < 5
    assert health.facts.used_bytes == 0


def test_memory_that_is_not_given_back_is_reported_with_its_holder(describe: Describe) -> None:
    describe({}, {"free": SIZE - 20 * GIB, "used": 20 * GIB, "processes": [[42, 20 * GIB]]})
    reported = [health_of_rank(rank, {}, is_busy, time.monotonic() + 0.1).pack() for rank in (0, 1)]
    plan = HardwareCheckPlan(("gpu",), 1.0, "nccl")
    outcome = judge(reported, EvaluationInput(plan, [Place("n1")] * 2, "h100", (10 * GIB, 10 * GIB)))
    (found,) = outcome.findings
    assert (found.rule, found.severity) == ("V2", Severity.WARNING)
    assert "rank 1 on n1, GPU 1: 60.0 GiB of 80.0 GiB free; pid 42 holds 20.0 GiB" in found.found
    (full,) = judge(reported, EvaluationInput(plan, [Place("n1")] * 2, "h100", (10 * GIB, 70 * GIB))).findings
    assert (full.rule, full.severity) == ("V2", Severity.ERROR)
    assert outcome.figures["free_mib"] == [60 * 1024, 80 * 1024]


@pytest.mark.parametrize(
    ("name", "links", "bridged"),
    [
        ("NVIDIA H100 80GB HBM3", 18, False),
        ("NVIDIA A100 80GB PCIe", 12, True),
        ("NVIDIA H200 NVL", 18, True),
        ("NVIDIA H100 PCIe", 0, False),
    ],
)
def test_cards_that_bridges_join_are_distinguished_from_a_switch(name: str, links: int, bridged: bool) -> None:
    """Of those, some pairs have no NVLink between them."""
    health = GpuHealth(GpuFacts(0, "GPU-0", name, 90), links_up=links, links=links)
    assert figures_of([health, health]).get("bridged", False) is bridged


def test_health_travels_as_texts(describe: Describe) -> None:
    describe({"processes": [[42, 7], [43, 0]]})
    health = health_of_rank(0, {}, is_busy, 0.0)
    for one in (health, no_health("a problem, with a comma"), health._replace(ecc_on=None, links=None, waited=1.5)):
        assert GpuHealth.unpack(one.pack()) == one


# the rules

WELL = GpuHealth(
    GpuFacts(0, "GPU-0", "NVIDIA H100 80GB HBM3", 90, SIZE, SIZE),
    "580.1",
    "",
    0.0,
    *(0, 1, 0, 0, 0, 1, 18, 18, 0, 1980, 2619, 700000, 5, 16),
)


def rules(*reported: GpuHealth) -> list[tuple[str, str, str]]:
    places = [Place(f"n{at // 2 + 1}") for at in range(len(reported))]
    findings = judge(
        [one.pack() for one in reported], EvaluationInput(HardwareCheckPlan(("gpu",), 1.0), places)
    ).findings
    return [(found.severity.value, found.rule, found.message) for found in findings]


def test_gpus_that_are_well_and_alike_are_no_finding() -> None:
    assert rules(*[WELL] * 4) == []
    idle_and_capped = WELL._replace(slow_reasons=0x1 | 0x4)
    assert rules(WELL, idle_and_capped) == []


@pytest.mark.parametrize(
    ("change", "rule", "severity"),
    [
        ({"recovery_action": 2}, "V9", "warning"),
        ({"recovery_action": 99}, "V9", "warning"),
        ({"uncorrected": 3}, "V10", "warning"),
        ({"remap_pending": 1}, "V10", "warning"),
        ({"remap_failed": 1}, "V10", "warning"),
        ({"slow_reasons": 0x8}, "V11", "warning"),
        ({"slow_reasons": 0x40}, "V11", "warning"),
        ({"slow_reasons": 0x80}, "V11", "warning"),
        ({"links_up": 17}, "V12", "warning"),
        ({"links_up": 0, "links": 18}, "V12", "warning"),
        ({"compute_mode": 2}, "V13", "error"),
        ({"compute_mode": 3}, "V13", "warning"),
        ({"sm_mhz": 1755}, "V14", "warning"),
        ({"power_limit": 500000}, "V14", "warning"),
        ({"pcie_width": 8}, "V14", "warning"),
        ({"ecc_on": 0}, "V14", "warning"),
        ({"problem": "GPU is lost"}, "V15", "warning"),
    ],
)
def test_the_gpu_that_is_not_well_or_unlike_the_others_is_named(
    change: dict[str, Any], rule: str, severity: str
) -> None:
    ((found_severity, found_rule, message),) = rules(WELL, WELL, WELL._replace(**change), WELL)
    assert (found_severity, found_rule) == (severity, rule)
    assert message.endswith("rank 2 on n2")


def test_where_there_is_no_nvlink_none_is_missed() -> None:
    assert rules(*[WELL._replace(links=0, links_up=0)] * 2) == []
    assert rules(*[WELL._replace(links=4, links_up=0)] * 2) == []


# what is probed, and what becomes of it


def test_what_is_probed_depends_on_the_engine_and_on_what_is_asked() -> None:
    reference, trtllm = ("--model", "/m", "--engine", "reference"), ("--model", "/m", "--engine", "trtllm")
    for flags, size, wanted in (
        (reference, 4, ()),
        (trtllm, 4, ("gpu", "fabric")),
        (trtllm, 1, ("gpu",)),
        ((*trtllm, "--allow-no-gpu"), 4, ()),
        ((*trtllm, "--probe", "none"), 4, ()),
        ((*trtllm, "--probe", "fabric"), 4, ("fabric",)),
        ((*reference, "--probe", "Fabric, gpu"), 4, ("gpu", "fabric")),
        ((*reference, "--probe", "fabric"), 1, ()),
    ):
        assert chosen_checks(load_settings(WorkerSources(flags, {})), size) == wanted
    assert memory_is_awaited(load_settings(WorkerSources(trtllm, {})))
    for flags in ((*trtllm, "--preflight-only"), (*trtllm, "--probe", "fabric"), reference):
        assert not memory_is_awaited(load_settings(WorkerSources(flags, {})))


def test_a_plan_has_the_groups_of_the_layout() -> None:
    from dynamo_mpi.layout.layout import Layout

    settings = load_settings(WorkerSources(("--model", "/m", "--engine", "trtllm", "--probe-seconds", "9"), {}))
    layout = Layout(tp_size=2, pp_size=2, moe_ep_size=2)
    plan = plan_hardware_checks(settings, layout, {"n1": [0, 1], "n2": [2, 3]})
    assert plan is not None
    assert (plan.seconds, plan.over) == (9, "nccl")
    assert dict(plan.groups) == {
        "node": ((0, 1), (2, 3)),
        "tp": ((0, 1), (2, 3)),
        "moe_ep": ((0, 1), (2, 3)),
        "pp": ((0, 2), (1, 3)),
    }
    assert (
        plan_hardware_checks(
            load_settings(WorkerSources(("--model", "/m", "--engine", "reference"), {})), layout, {"n1": [0, 1, 2, 3]}
        )
        is None
    )
    # half as long again for memory, and for NCCL to start
    assert allowed_seconds(plan) == 9 + 4.5 + 4.5 + 3


def test_a_report_is_one_line_when_all_is_well_and_an_error_has_its_code() -> None:
    from dynamo_mpi.layout.finding import error, warning

    fine = Report((), {"seconds": 1.25}, ("gpu: 2 of 2 GPUs read", "fabric: fine"))
    assert (fine.text, fine.error) == ("probe: 1.2 s; gpu: 2 of 2 GPUs read; fabric: fine", None)
    reported = fine._replace(findings=(warning("V9", "it has to be recovered"),))
    assert reported.error is None
    assert "warning V9: it has to be recovered" in reported.text
    for rule, given, code in (("V9", 75, 75), ("N1", 75, 75), ("V2", 64, 64), ("N2", 75, 124)):
        found = fine._replace(findings=(error(rule, "so it is"),), code=ExitCode(given)).error
        assert found is not None
        assert found.exit_code == code
        assert rule in str(found)


MOVED = "probe kv: moved to `dynamo-mpi launch` (--kv-check) and python -m dynamo_mpi.checks.kv; a worker leaves it out"
NO_EFFECT = "--probe-kv-seconds has no effect any more: the KV check is a step of `dynamo-mpi launch`"


@pytest.mark.parametrize(
    ("words", "size", "said"),
    [
        (["--probe", "kv"], 3, [MOVED]),
        (["--role", "prefill", "--probe", "gpu,kv", "--probe-kv-seconds", "9"], 1, [MOVED, NO_EFFECT]),
        (["--probe", "fabric,gpu"], 1, ["probe fabric: nothing to check in a world of one rank"]),
        (["--probe", "fabric"], 2, []),
        (["--probe", "auto"], 1, []),
    ],
)
def test_what_was_asked_for_in_vain_is_said(words: list[str], size: int, said: list[str]) -> None:
    settings = load_settings(WorkerSources(["--model", "/m", "--engine", "reference", *words], {}))
    assert [*skipped_checks(settings, size), *obsolete(settings)] == said
    assert "kv" not in chosen_checks(settings, size)
