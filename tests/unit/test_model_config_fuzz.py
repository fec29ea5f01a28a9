# SPDX-License-Identifier: Apache-2.0
"""Model files of real models with a few values spoiled: each is read, estimated and judged, or refused with its path and key."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_mpi.cli.main import main
from dynamo_mpi.common.errors import ConfigFileError
from dynamo_mpi.layout.engine_config import EngineConfig
from dynamo_mpi.layout.layout import Cluster, LayoutSpec
from dynamo_mpi.layout.model_config import parse_model_shape
from dynamo_mpi.layout.report import check_worker
from tests.unit.model_zoo import texts

MODELS = (
    *("Kimi-K3", "Gemma-4-26B-A4B-NVFP4", "Nemotron-3-Ultra-550B-A55B-NVFP4", "GLM-5.2-NVFP4", "DeepSeek-V4-Pro-NVFP4"),
    *("Llama-3.3-Nemotron-Super-49B", "Nemotron-3.5-Lightning-30B-A3B-NVFP4", "MiniMax-M3", "Qwen3.5-27B", "LFM2-1.2B"),
    *("DeepSeek-V3.2-NVFP4", "gpt-oss-120b", "Llama-4-Scout-17B-16E", "MiMo-V2-Flash", "Nemotron-H-56B-Base-8K"),
)
DROP = object()
SPOILT: tuple[Any, ...] = (
    *(DROP, None, True, False, 0, 1, -1, 3, 7, 2**31 - 1, 2**31, 2**63, 10**400, 1.5, -0.5, 1e300, float("nan")),
    *("", "x", "\ud800", "fp8", [], {}, [0], [-1], ["x"], [[]], [{}], {"a": 1}, {"quant_algo": "NVFP4"}),
)


def paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values, of long lists those of the first three."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*above, key)
        yield from paths(inner, (*above, key))


def spoil(config: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        try:
            config = config[key]
        except (KeyError, IndexError, TypeError):
            return  # spoilt above
    if not isinstance(config, dict | list) or isinstance(config, dict) == isinstance(path[-1], int):
        return
    if value is DROP:
        config.pop(path[-1]) if isinstance(config, dict) and path[-1] in config else None
    elif isinstance(config, dict) or path[-1] < len(config):
        config[path[-1]] = copy.deepcopy(value)


@st.composite
def spoilt(draw: st.DrawFn) -> tuple[str, str | None]:
    """The two files of a real model after one to three changes; some keys get the value of another."""
    config_text, quant_text = texts(draw(st.sampled_from(MODELS)))
    files = [json.loads(config_text), None if quant_text is None else json.loads(quant_text)]
    for _ in range(draw(st.integers(1, 3))):
        file = files[draw(st.sampled_from([0, 0, 0, 1]))] or files[0]
        everywhere = list(paths(file))
        path = draw(st.sampled_from(everywhere))
        if draw(st.booleans()):
            spoil(file, path, draw(st.sampled_from(SPOILT)))
        else:
            other: Any = file
            for key in draw(st.sampled_from(everywhere)):
                other = other[key] if isinstance(other, dict | list) else other
            spoil(file, path, other)
    return json.dumps(files[0]), None if files[1] is None else json.dumps(files[1])


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(spoilt(), st.sampled_from([1, 3, 8, 64]), st.booleans(), st.sampled_from(["agg", "decode", "encode"]))
def test_spoilt_files_are_judged_or_refused(files: tuple[str, str | None], tp: int, whole: bool, role: str) -> None:
    try:
        shape = parse_model_shape(files[0], "/m/config.json", files[1])
    except ConfigFileError as error:
        assert "/m/" in error.problem
        assert error.expected or error.fix
        return
    config = EngineConfig(tp, enable_attention_dp=whole)
    report = check_worker(LayoutSpec(shape, config, Cluster(1, tp, "b200"), role), suggest=False)
    json.dumps(report.as_json()).encode()
    if report.memory is not None:
        assert all(stage.weights_bytes >= 0 and stage.kv_bytes_per_token >= 0 for stage in report.memory.stages)


@settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
@given(files=spoilt(), verb=st.sampled_from(["check", "plan"]))
def test_spoilt_files_end_a_verb_with_a_code_of_the_table(
    files: tuple[str, str | None], verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(files[0])
    (tmp_path / "hf_quant_config.json").unlink(missing_ok=True)
    if files[1] is not None:
        (tmp_path / "hf_quant_config.json").write_text(files[1])
    sizes = ("--gpus", "8") if verb == "plan" else ("--tp-size", "8")
    code = main([verb, "--model", str(tmp_path), *sizes, "--gpus-per-node", "8", "--gpu", "h200"])
    out, err = capsys.readouterr()
    assert code in (0, 64, 65, 78)
    assert "Traceback" not in err
    assert out if code == 0 else out or err
