# SPDX-License-Identifier: Apache-2.0
"""Engine backends other than PyTorch's: judged by their own keys, and never by PyTorch's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.layout.finding import Severity, errors
from dynamo_mpi.layout.library import PlanReport, Worker, check, plan
from dynamo_mpi.layout.report import Report
from tests.unit.model_zoo import ZOO


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(ZOO["Llama-3.1-8B"]))
    return str(path)


def judged(model: str, text: str, **worker: object) -> Report:
    settings = {"gpus_per_node": None, "trtllm_version": "1.2.1", "gpu": "h100"} | worker
    return check(model, yaml.safe_load(text), Worker(**settings))  # type: ignore[arg-type]


def planned(model: str, text: str, gpus: int = 4, **worker: object) -> PlanReport:
    return plan(model, gpus, yaml.safe_load(text), Worker(trtllm_version="1.2.1", **worker))  # type: ignore[arg-type]


def test_autodeploy_needs_world_size_ranks(model: str) -> None:
    report = judged(model, "{backend: _autodeploy, world_size: 4}")
    assert report.ok and report.memory is None
    assert report.subject.cluster.world_size == 4
    assert [(finding.rule, finding.severity) for finding in report.findings] == [("A16", Severity.INFO)]


@pytest.mark.parametrize("size", ["", ", world_size: 1", ", world_size: 0"])
def test_autodeploy_has_one_rank_by_default(model: str, size: str) -> None:
    assert judged(model, f"{{backend: _AutoDeploy{size}}}").subject.layout.world_size == 1


@pytest.mark.parametrize(("cluster", "size"), [({}, 8), ({"nodes": 2, "gpus_per_node": 8}, 16)])
def test_refused_sizes_without_world_size_have_one_fix(model: str, cluster: dict[str, int], size: int) -> None:
    text = "{backend: _autodeploy, tensor_parallel_size: 4, pipeline_parallel_size: 2}"
    (finding,) = errors(judged(model, text, **cluster).findings)
    assert (finding.rule, f"set world_size: {size}" in finding.fix) == ("A16", True), finding


def test_another_number_of_ranks_is_refused(model: str) -> None:
    (finding,) = errors(judged(model, "{backend: _autodeploy, world_size: 4}", gpus_per_node=2).findings)
    assert finding.rule == "A1"
    assert "set world_size: 2" in finding.fix


def test_no_rule_of_pytorch_applies(model: str) -> None:
    assert errors(judged(model, "{backend: pytorch, tensor_parallel_size: 7}").findings) != []
    assert errors(judged(model, "{backend: _autodeploy, world_size: 7}").findings) == []
    assert errors(judged(model, "{backend: tensorrt, tensor_parallel_size: 7}").findings) == []


@pytest.mark.parametrize(
    "line",
    [
        *("tensor_parallel_size: 2", "pipeline_parallel_size: 2", "context_parallel_size: 2"),
        *("moe_tensor_parallel_size: 2", "moe_expert_parallel_size: 2", "moe_cluster_parallel_size: 2"),
        *("enable_attention_dp: true", "cp_config: {cp_type: HELIX}"),
        *("max_beam_width: 2", "{max_batch_size: 16, max_num_tokens: 8}"),
        "{max_batch_size: 4, cuda_graph_config: {max_batch_size: 8}}",
    ],
)
def test_what_autodeploy_refuses(model: str, line: str) -> None:
    keys = yaml.safe_load(line) | {"backend": "_autodeploy", "world_size": 1}
    (finding,) = errors(judged(model, json.dumps(keys), trtllm_version="1.3.0rc29").findings)
    assert finding.rule == "A16"
    assert next(iter(yaml.safe_load(line))) in finding.found


def test_limits_of_autodeploy_warn_in_versions_that_werent_read(model: str) -> None:
    report = judged(model, "{backend: _autodeploy, world_size: 1, max_beam_width: 2}")
    assert report.ok
    assert ("A16", Severity.WARNING) in [(finding.rule, finding.severity) for finding in report.findings]


def test_a_size_becomes_world_size(model: str) -> None:
    report = judged(model, "{backend: _autodeploy, tensor_parallel_size: 2}", gpus_per_node=2)
    found = {finding.rule: finding for finding in errors(report.findings)}
    assert found["A16"].fix == "leave tensor_parallel_size out, and set world_size: 2"
    assert report.nearest == ()


def test_defaults_are_no_sizes(model: str) -> None:
    text = "{backend: _autodeploy, tensor_parallel_size: 1, moe_expert_parallel_size: -1, enable_attention_dp: false}"
    assert judged(model, text).ok


def test_autodeploy_is_planned_by_world_size_alone(model: str) -> None:
    report = planned(model, "{backend: _autodeploy, tensor_parallel_size: 2, max_batch_size: 8}", gpu="h100")
    (made,) = report.as_json()["layouts"]
    assert report.ok
    assert yaml.safe_load(made["yaml"]) == {
        "backend": "_autodeploy",
        "world_size": 4,
        "gpus_per_node": 4,
        "max_batch_size": 8,
    }


def test_the_tensorrt_backend_is_judged_by_its_ranks_alone(model: str) -> None:
    report = judged(model, "{backend: trt, tensor_parallel_size: 2, moe_expert_parallel_size: 4}", gpus_per_node=4)
    assert {finding.rule for finding in errors(report.findings)} == {"A2"}
    assert any("only the number of ranks" in finding.message for finding in report.findings)


def test_the_tensorrt_backend_isnt_planned(model: str) -> None:
    with pytest.raises(UsageError, match="can't be planned"):
        planned(model, "backend: tensorrt")


def test_an_unknown_backend_is_a_value_that_is_refused(model: str) -> None:
    report = judged(model, "backend: vllm")
    assert {finding.rule for finding in errors(report.findings)} == {"H"}
    assert not report.subject.other_backend


@pytest.mark.parametrize("backend", ["pytorch", "_autodeploy"])
@pytest.mark.parametrize(("version", "known"), [("1.2.1", True), ("9.9", False)])
def test_a_version_newer_than_known_is_a_warning(model: str, backend: str, version: str, known: bool) -> None:
    report = judged(model, f"{{backend: {backend}}}", trtllm_version=version)
    found = [finding.severity for finding in report.findings if finding.rule == "H18"]
    assert found == ([] if known else [Severity.WARNING])
    assert report.ok
