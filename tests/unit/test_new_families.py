# SPDX-License-Identifier: Apache-2.0
"""`dynamo-mpi check` on the model files of new families: their layers, sizes and formats as the checkpoint has them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.layout.divisibility import legal_tp_sizes
from dynamo_mpi.layout.engine_config import EngineConfig
from dynamo_mpi.layout.layout import Cluster, LayoutSpec
from dynamo_mpi.layout.model_config import parse_model_shape
from dynamo_mpi.layout.model_shape import Feed, LayerFormats, ModelShape
from dynamo_mpi.layout.quantisation import WeightFormat
from dynamo_mpi.layout.rules.architecture import weight_formats
from dynamo_mpi.layout.rules.registry import layout_findings
from dynamo_mpi.layout.weights import checkpoint_bytes, missing_sizes, total_parameters
from tests.unit.model_zoo import parsed, texts

CONFIGS = Path(__file__).resolve().parents[1] / "data" / "model_configs"
GIB = 2**30


def shape_of(name: str) -> ModelShape:
    quant = CONFIGS / f"{name}.hf_quant_config.json"
    text = quant.read_text(encoding="utf-8") if quant.exists() else None
    return parse_model_shape((CONFIGS / f"{name}.json").read_text(encoding="utf-8"), f"{name}/config.json", text)


class Check:
    """Runs the verb on a model of tests/data, in a folder of its own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys

    def run(self, model: str, yaml: dict[str, Any], *words: str) -> tuple[int, dict[str, Any]]:
        shutil.copy(CONFIGS / f"{model}.json", self.folder / "config.json")
        if (quant := CONFIGS / f"{model}.hf_quant_config.json").exists():
            shutil.copy(quant, self.folder / "hf_quant_config.json")
        (self.folder / "engine.yaml").write_text(json.dumps(yaml), encoding="utf-8")
        given = ("--model", str(self.folder), "--engine-config", str(self.folder / "engine.yaml"), *words)
        code = main(["check", *given, "--output", "json"])
        report: dict[str, Any] = json.loads(self._capsys.readouterr().out)
        return code, report


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    return Check(tmp_path, capsys)


def rules(report: dict[str, Any]) -> set[str]:
    return {finding["rule"] for finding in report["findings"]}


def test_c2_kimi_k3_weighs_what_its_checkpoint_does(check: Check) -> None:
    layout = {"tensor_parallel_size": 8, "moe_expert_parallel_size": 8}
    code, report = check.run("Kimi-K3", layout, "--gpus-per-node", "8", "--gpu", "b300")
    assert code == 0
    stage = report["memory"]["stages"][0]
    # 1.56 TB over 8 ranks are 181.6 GiB; the projections into and out of the experts' width (9.5 GB) are whole on every rank
    assert 181 * GIB < stage["weights_bytes"] < 192 * GIB
    assert report["unknown"] == []


def test_c4_layers_by_block_type_and_nvfp4_experts(check: Check) -> None:
    yaml = {
        "tensor_parallel_size": 4,
        "moe_expert_parallel_size": 4,
        "enable_attention_dp": True,
        "moe_config": {"backend": "CUTEDSL"},
    }
    code, report = check.run("Nemotron-3-Ultra-550B-A55B-NVFP4", yaml, "--gpus-per-node", "4", "--gpu", "gb300")
    assert code == 0
    assert "D9" not in rules(report)
    assert report["memory"]["stages"][0]["weights_bytes"] > 70 * GIB
    kinds = Counter(
        (layer.mixer.value, layer.feed.value) for layer in shape_of("Nemotron-3-Ultra-550B-A55B-NVFP4").layers or ()
    )
    assert kinds == {("mamba2", "none"): 48, ("none", "experts"): 48, ("attention", "none"): 12}


def test_c5_experts_beside_an_excluded_mlp_are_quantised(check: Check) -> None:
    yaml = {"tensor_parallel_size": 1, "moe_config": {"backend": "CUTEDSL"}}
    code, report = check.run("Gemma-4-26B-A4B-NVFP4", yaml, "--gpus-per-node", "1", "--gpu", "b200")
    assert code == 0
    assert "D9" not in rules(report)
    assert 17 * GIB < report["memory"]["stages"][0]["weights_bytes"] < 18 * GIB


@pytest.mark.parametrize(
    ("model", "formats", "gigabytes"),
    [
        # 743.4e9 parameters: 721.6e9 in experts and their like in NVFP4, 21.8e9 in bfloat16
        ("GLM-5.2-NVFP4", ("NVFP4",), (436, 454)),
        # experts in NVFP4, what DeepSeek published in FP8 blocks stays so
        ("DeepSeek-V4-Pro-NVFP4", ("FP8_BLOCK_SCALES", "NVFP4"), (880, 916)),
        ("DeepSeek-V3.2-NVFP4", ("NVFP4",), (380, 396)),
    ],
)
def test_c12_formats_are_estimated_and_judged(
    model: str, formats: tuple[str, ...], gigabytes: tuple[int, int], check: Check
) -> None:
    assert set(weight_formats(shape_of(model))) == set(formats)
    code, report = check.run(model, {"tensor_parallel_size": 8}, "--gpus-per-node", "8", "--gpu", "b300")
    assert code == 0
    assert report["unknown"] == []
    low, high = gigabytes
    whole, ranks = report["memory"]["weights_total_bytes"], 8
    assert low * 1e9 < whole < high * 1e9 + ranks * 30e9
    # no Hopper GPU has NVFP4
    code, report = check.run(model, {"tensor_parallel_size": 8}, "--gpus-per-node", "8", "--gpu", "a100")
    assert (code, "G" in rules(report)) == (78, True)


def mixed(model: str, modules: dict[str, str], *excluded: str) -> ModelShape:
    """A model whose checkpoint lists each quantised module, as ModelOpt's do, with its format."""
    count = parsed(model).num_layers or 0
    named = {name.replace("N", str(i)): form for i in range(count) for name, form in modules.items()}
    section = {
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {name: {"quant_algo": form} for name, form in named.items()},
    }
    quant = json.dumps({"quantization": {**section, "exclude_modules": list(excluded)}})
    return parse_model_shape(texts(model)[0], "config.json", quant)


def test_c12_mixed_precision_of_attention_experts_and_shared_experts() -> None:
    above = "language_model.model.layers.N"
    shape = mixed(
        "MiniMax-M3",
        {
            f"{above}.self_attn.q_proj": "MXFP8",
            f"{above}.self_attn.o_proj": "MXFP8",
            f"{above}.mlp.down_proj": "MXFP8",
            f"{above}.block_sparse_moe.experts.0.w2": "NVFP4",
            f"{above}.block_sparse_moe.shared_experts.down_proj": "MXFP8",
        },
        f"{above}.block_sparse_moe.gate",
        "lm_head",
    )
    assert {form.algo for part in ("mixer", "output", "shared") for form in shape.formats(part)} == {"MXFP8"}
    assert [form.algo for form in shape.formats("feed", feed=Feed.EXPERTS)] == ["NVFP4"]
    assert [form.algo for form in shape.formats("feed", feed=Feed.DENSE)] == ["MXFP8"]
    assert shape.head_format is None
    # 57 layers x 128 experts x 3 x 6144 x 3072 at 0.5625 bytes; the rest at about 1, embedding and head at 2
    experts = 57 * 128 * 3 * 6144 * 3072
    rest = (total_parameters(shape) or 0) - experts
    assert checkpoint_bytes(shape) == pytest.approx(experts * 0.5625 + rest + 2 * 200064 * 6144, rel=0.01)


def test_c12_mixed_precision_of_mlps_linear_attention_and_head() -> None:
    above = "model.language_model.layers.N"
    shape = mixed(
        "Qwen3.5-27B",
        {
            f"{above}.mlp.down_proj": "W4A16_NVFP4",
            f"{above}.linear_attn.in_proj_qkv": "FP8",
            f"{above}.linear_attn.out_proj": "FP8",
            f"{above}.self_attn.q_proj": "FP8",
            f"{above}.self_attn.o_proj": "FP8",
            "lm_head": "W4A16_NVFP4",
        },
        "mtp*",
    )
    assert [form.algo for form in shape.formats("feed")] == ["W4A16_NVFP4"]
    assert {form.algo for part in ("mixer", "output") for form in shape.formats(part)} == {"FP8"}
    assert shape.head_format == WeightFormat("W4A16_NVFP4")
    assert shape.nextn_layer is not None
    assert shape.nextn_layer.formats == LayerFormats()


def test_mixed_precision_without_a_list_is_not_estimated() -> None:
    quant = json.dumps({"quantization": {"quant_algo": "MIXED_PRECISION"}})
    shape = parse_model_shape(texts("Llama-3.1-8B")[0], "config.json", quant)
    assert missing_sizes(shape) == ("quantized_layers, which MIXED_PRECISION needs",)


def test_an_unknown_kind_of_layer_is_never_unquantised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((CONFIGS / "GLM-5.2-NVFP4.json").read_text(encoding="utf-8"))
    config["layer_types"][5] = "telepathy"
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ("--model", str(tmp_path), "--tp-size", "8", "--gpus-per-node", "8", "--gpu", "b300")
    (tmp_path / "e.yaml").write_text("moe_config: {backend: CUTEDSL}\n")
    assert main(["check", *words, "--engine-config", str(tmp_path / "e.yaml"), "--output", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["memory"] == {}
    assert report["unknown"] == ["layer_types ('telepathy')"]
    assert "D9" not in rules(report)


def test_r9_kv_heads_of_global_layers_are_reported_as_copied(check: Check) -> None:
    code, report = check.run(
        "Gemma-4-26B-A4B-NVFP4", {"tensor_parallel_size": 4}, "--gpus-per-node", "4", "--gpu", "b200"
    )
    assert code == 0
    (copies,) = [finding for finding in report["findings"] if finding["rule"] == "B4"]
    assert "2 KV heads is held by 2 ranks" in copies["message"]
    (stage,) = report["memory"]["stages"]
    # 5 global layers of one head of 512 each, 25 under a window with two of 256
    assert stage["kv_bytes_per_token"] == 5 * 2 * 1 * 512
    assert stage["windows"] == [{"tokens": 1024, "bytes_per_token": 25 * 2 * 2 * 256}]


def test_r9_a_plan_counts_copies_of_the_fewest_kv_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(CONFIGS / "Gemma-4-26B-A4B-NVFP4.json")
    assert (
        main(["plan", "--model", model, "--gpus", "4", "--gpus-per-node", "4", "--gpu", "b200", "--output", "json"])
        == 0
    )
    made = {layout["name"]: layout for layout in json.loads(capsys.readouterr().out)["layouts"]}
    assert {layout["kv_copies"] for layout in made.values() if layout["layout"]["tp_size"] == 4} >= {2}


def test_r9_groups_of_heads_give_the_kv_heads_of_each_block() -> None:
    shape = parsed("Llama-3.3-Nemotron-Super-49B")
    assert (shape.kv_heads, shape.kv_head_counts) == (8, (8,))
    assert Counter(layer.mixer.value for layer in shape.layers or ()) == {"attention": 49, "none": 31}
    assert shape.dense_widths == (2816, 5632, 7168, 14336, 17920, 28672)


def test_heads_that_differ_under_a_window_must_divide_too(check: Check) -> None:
    # Step-3.5: 64 heads, and 96 under a window
    config = {
        "num_attention_heads": 64,
        "num_attention_groups": 8,
        "head_dim": 128,
        "hidden_size": 4096,
        "vocab_size": 9,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 512,
        "attention_other_setting": {"num_attention_heads": 96, "num_attention_groups": 8},
    }
    shape = parse_model_shape(json.dumps(config), "config.json")
    assert (shape.head_counts, shape.missing, shape.unread) == ((64, 96), (), ())
    found = layout_findings(LayoutSpec(shape, EngineConfig(64), Cluster(1, 64)))
    assert [finding.message for finding in found if finding.rule == "B1"] == [
        "96 attention heads can't be divided over tp_size = 64"
    ]
    assert legal_tp_sizes(shape) == (1, 2, 4, 8, 16, 32)
