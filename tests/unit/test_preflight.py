# SPDX-License-Identifier: Apache-2.0
"""Rank 0's side of the preflight: reading the files, and evaluating what the ranks answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi import __version__
from dynamo_mpi.checks.gpu_facts import NodeGpus
from dynamo_mpi.checks.host_facts import HostFacts
from dynamo_mpi.checks.preflight import PreflightInputs, PreflightResult, evaluate, load_inputs
from dynamo_mpi.checks.rank_facts import RankFacts
from dynamo_mpi.checks.rank_report import RankReport
from dynamo_mpi.common.errors import ConfigFileError, ExitCode, ModelNotFoundError
from dynamo_mpi.config.sources import WorkerSources
from dynamo_mpi.config.worker import load_settings
from dynamo_mpi.layout.finding import errors
from tests.unit.models import LLAMA_4, SMOLLM2
from tests.unit.test_host_rules import B200, GIB, facts, gpu, node, rows


def make_plan(
    folder: Path, config: dict[str, Any] = SMOLLM2, engine: str | None = None, *flags: str
) -> PreflightInputs:
    (folder / "config.json").write_text(json.dumps(config))
    argv = ["--model", str(folder), *flags]
    if engine is not None:
        (folder / "engine.yaml").write_text(engine)
        argv += ["--engine-config", str(folder / "engine.yaml")]
    return load_inputs(load_settings(WorkerSources(argv, {})), argv)


def cards(*hosts: str, problems: dict[int, tuple[str, ...]] | None = None) -> list[RankReport]:
    return [RankReport(host, "", "1.0", (problems or {}).get(rank, ())) for rank, host in enumerate(hosts)]


def test_a_plan_holds_what_rank_0_has_read(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    plan = make_plan(tmp_path, SMOLLM2, "tensor_parallel_size: 3\nmax_batch_size: 2\n", "--max-batch-size", "5")
    assert plan.shape.attention_heads == 9
    assert (plan.config.tp_size, plan.config.max_batch_size) == (3, 2)
    assert plan.report_request.model_dir == str(tmp_path)
    assert plan.report_request.weights == ("a.safetensors", "b.safetensors")
    assert [file.label for file in plan.report_request.files] == ["model config", "engine config"]
    for file in plan.report_request.files:
        assert Path(file.path).read_text() == file.content


def test_without_an_engine_config_the_model_alone_is_watched(tmp_path: Path) -> None:
    assert [file.label for file in make_plan(tmp_path).report_request.files] == ["model config"]


def test_a_missing_model_is_a_model_error(tmp_path: Path) -> None:
    for folder, words in ((tmp_path / "absent", "model folder .*absent"), (tmp_path, r"model config .*config\.json")):
        with pytest.raises(ModelNotFoundError, match=f"{words}.* can't be read") as caught:
            load_inputs(load_settings(WorkerSources(["--model", str(folder)], {})), [])
        assert caught.value.exit_code == 66


def test_a_file_in_the_folders_place_is_a_model_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(ModelNotFoundError, match="Not a directory"):
        load_inputs(load_settings(WorkerSources(["--model", str(path)], {})), [])


@pytest.mark.parametrize("make", ["absent", "folder", "binary", "list"])
def test_a_bad_engine_config_is_a_data_error(tmp_path: Path, make: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "engine.yaml"
    if make == "folder":
        path.mkdir()
    elif make == "binary":
        path.write_bytes(b"a: \xff")
    elif make == "list":
        path.write_text("- a")
    with pytest.raises(ConfigFileError, match=r"engine\.yaml") as caught:
        load_inputs(load_settings(WorkerSources(["--model", str(tmp_path), "--engine-config", str(path)], {})), [])
    assert caught.value.exit_code == 65


def test_all_is_well_in_one_line(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, SMOLLM2, "tensor_parallel_size: 3")
    verdict = evaluate(plan, cards("n1", "n1", "n1"))
    assert verdict.exit_code is ExitCode.OK
    assert verdict.findings == ()
    assert "\n" not in verdict.report
    for word in ("ok", "LlamaForCausalLM", "tp 3", "3 ranks", "n1"):
        assert word in verdict.report


def test_a_layout_over_nodes_is_described(tmp_path: Path) -> None:
    engine = "tensor_parallel_size: 2\npipeline_parallel_size: 6"
    plan = make_plan(tmp_path, LLAMA_4, engine)
    report = evaluate(plan, cards(*["n1"] * 4, *["n2"] * 4, *["n3"] * 4)).report
    for word in ("tp 2", "pp 6", "12 ranks", "3 nodes", "n1", "n3"):
        assert word in report


P1, P2, P3 = "command line: is `a`", "engine config: /e differs", "model: /m lacks 1 of 2 weight files"


@pytest.mark.parametrize(
    ("engine", "answers", "code", "rules"),
    [
        ("tensor_parallel_size: 3", cards(*"aa"), ExitCode.USAGE, ["A1"]),
        ("tensor_parallel_size: 2", cards(*"aa"), ExitCode.ILLEGAL_LAYOUT, ["B1", "B3"]),
        ("tensor_parallel_size: 2", cards(*"aaa"), ExitCode.USAGE, ["A1", "B1", "B3"]),
        ("tensor_parallel_size: 3", cards(*"aab"), ExitCode.USAGE, ["A11"]),
        ("tensor_parallel_size: 3", cards(*"aaa", problems={1: (P1,)}), ExitCode.USAGE, ["P1"]),
        ("tensor_parallel_size: 3", cards(*"aaa", problems={1: (P2,)}), ExitCode.DATA, ["P2"]),
        ("tensor_parallel_size: 3", cards(*"aaa", problems={1: (P3,)}), ExitCode.NO_MODEL, ["P3"]),
        ("tensor_parallel_size: 3", cards(*"aaa", problems={1: (P2, P3)}), ExitCode.DATA, ["P2", "P3"]),
        ("tensor_parallel_size: 3", [*cards(*"aa"), RankReport("a", "", "2.0", ())], ExitCode.USAGE, ["P4"]),
        ("tensor_parallel_size: 9", cards(*"aaaaaaaaa"), ExitCode.ILLEGAL_LAYOUT, ["E1"]),
        ("tensor_paralel_size: 3", cards("a"), ExitCode.DATA, ["H"]),
        ("tensor_parallel_size: 3\npipeline_parallel_size: 3", cards(*"aaabbbccc"), ExitCode.OK, []),
    ],
)
def test_the_first_error_decides_the_exit_code_and_all_are_reported(
    tmp_path: Path, engine: str, answers: list[RankReport], code: ExitCode, rules: list[str]
) -> None:
    verdict = evaluate(make_plan(tmp_path, SMOLLM2, engine), answers)
    assert verdict.exit_code is code
    assert [finding.rule for finding in errors(verdict.findings)] == rules
    if rules:
        assert ("1 error," if len(rules) == 1 else f"{len(rules)} errors,") in verdict.report
        assert "nothing was loaded" in verdict.report
    for rule in rules:
        assert f"error {rule}: " in verdict.report


# -- with TensorRT-LLM, hosts and GPUs are looked at too

WHOLE_LLAMA: dict[str, Any] = {
    **SMOLLM2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "head_dim": 128,
    "torch_dtype": "bfloat16",
}
TP8, TP4 = "tensor_parallel_size: 8", "tensor_parallel_size: 4"


def cards_of(some: list[RankFacts], *, version: str = __version__) -> list[RankReport]:
    """Return the rows as the ranks would have sent them."""
    sent = [RankReport(row.host, "", __version__, (), row.facts.pack(), row.gpus.pack()) for row in some]
    return [RankReport.unpack(card.pack())._replace(version=version) for card in sent]


def judged(folder: Path, some: list[RankFacts], engine: str = TP4, *flags: str, **config: Any) -> PreflightResult:
    """Judge as a preflight that no probe follows."""
    always = ("--engine", "trtllm", "--trtllm-version", "1.2.1", "--probe", "none")
    plan = make_plan(folder, {**WHOLE_LLAMA, **config}, engine, *always, *flags)
    return evaluate(plan, cards_of(some))


def finding_ids(verdict: PreflightResult) -> list[str]:
    return [f"{one.severity.value} {one.rule}" for one in verdict.findings if one.severity.value != "info"]


def test_ranks_are_asked_for_facts_by_engine(tmp_path: Path) -> None:
    for flags, asked in (
        ((), (False, False)),
        (("--allow-no-gpu",), (False, False)),
        (("--engine", "trtllm"), (True, True)),
        (("--engine", "trtllm", "--allow-no-gpu"), (True, False)),
    ):
        report_request = make_plan(tmp_path, SMOLLM2, None, *flags).report_request
        assert (report_request.hosts, report_request.gpus) == asked


def test_what_is_free_is_left_to_a_probe_that_waits_for_it(tmp_path: Path) -> None:
    full = node("a", gpus=tuple(gpu("a", i, used=79) for i in range(4)))
    some = rows("aaaa", [full] * 4)
    assert finding_ids(judged(tmp_path, some)) == ["error V2"]
    probed = judged(tmp_path, some, TP4, "--probe", "gpu")
    assert (probed.exit_code, finding_ids(probed)) == (ExitCode.OK, [])
    assert len(probed.weights) == 4
    assert probed.weights[0] > 0
    assert finding_ids(judged(tmp_path, some, TP4, "--probe", "gpu", "--preflight-only")) == ["error V2"]


def test_a_healthy_world_of_two_nodes(tmp_path: Path) -> None:
    """Its kind of GPU is found out, so that what fits is reckoned."""
    verdict = judged(tmp_path, rows("aaaabbbb"), TP8)
    assert (verdict.exit_code, finding_ids(verdict)) == (ExitCode.OK, ["warning A14"])
    assert "8 ranks on 2 nodes (a … b), h100" in verdict.report
    assert any(one.rule == "J" and "room for about" in one.message for one in verdict.findings)


def test_a_kind_of_gpu_that_was_said_is_believed(tmp_path: Path) -> None:
    assert "1 rank on a, b200" in judged(tmp_path, rows("a"), "{}", "--gpu", "b200").report


def test_weights_too_large_for_the_gpus_that_are_there_are_an_illegal_layout(tmp_path: Path) -> None:
    verdict = judged(tmp_path, rows("a"), "{}", num_hidden_layers=300)
    assert verdict.exit_code is ExitCode.ILLEGAL_LAYOUT
    assert "error J: the weights don't fit" in verdict.report


def unlike(version: str) -> HostFacts:
    return facts(versions=(("tensorrt_llm", version),))


@pytest.mark.parametrize(
    ("some", "rules", "words"),
    [
        (rows("aaaa", [node("a", 4, [rank]) for rank in range(4)]), ["error K9"], "ranks 0-3 on a"),
        (rows("aaaa", [node("a", 4)] * 3 + [node("a", 4, [0, 1, 2])]), ["error K9"], "--gpus-per-node=4"),
        (rows("aabb", [node("a", 2)] * 2 + [node("b", 2, kind=B200)] * 2), ["error G6"], "NVIDIA B200, SM100"),
        (rows("aabb", [node("a", 2)] * 2 + [node("b", 3)] * 2), ["error G6"], "3 GPUs on b"),
        (rows("aaaa", [NodeGpus(problem="the driver isn't loaded")] * 4), ["error V1"], "no rank sees a GPU"),
        (rows("aaaa", of_hosts=[facts(mpi_library="MPICH Version: 4.2")] * 4), ["error K1"], "isn't Open MPI"),
        (rows("aaaa", of_hosts=[facts(versions=())] * 4), ["error D10"], "isn't installed"),
        (rows("aaaa", of_hosts=[unlike("1.2.0"), *[unlike("1.2.1")] * 3]), ["error D10"], "1.2.0"),
        (rows("aaaa", [node("a", gpus=tuple(gpu("a", i, mig=True) for i in range(4)))] * 4), ["error V8"], "MIG"),
        (rows("aaaa", [node("a", gpus=tuple(gpu("a", i, used=78) for i in range(4)))] * 4), ["error V2"], "2.0 GiB of"),
    ],
)
def test_hosts_and_gpus_that_will_not_do_are_a_mislaunch(
    tmp_path: Path, some: list[RankFacts], rules: list[str], words: str
) -> None:
    verdict = judged(tmp_path, some)
    assert [rule for rule in finding_ids(verdict) if rule.startswith("error")] == rules
    assert words in verdict.report
    assert verdict.exit_code is ExitCode.USAGE


def test_a_layout_that_can_not_be_comes_before_hosts(tmp_path: Path) -> None:
    verdict = judged(tmp_path, rows("aaa", [NodeGpus()] * 3), "tensor_parallel_size: 3")
    found = [one.rule for one in errors(verdict.findings)]
    assert (found[0], found[-1]) == ("B1", "V1")
    assert verdict.exit_code is ExitCode.ILLEGAL_LAYOUT


def test_a_busy_gpu_is_reported_and_no_reason_to_stop(tmp_path: Path) -> None:
    busy = node("a", gpus=(gpu("a", 0, used=20, holders=((42, 20 * GIB),)), *(gpu("a", i) for i in range(1, 4))))
    verdict = judged(tmp_path, rows("aaaa", [busy] * 4))
    assert (verdict.exit_code, finding_ids(verdict)) == (ExitCode.OK, ["warning V2"])
    assert "rank 0 on a, GPU 0: 60.0 GiB of 80.0 GiB free; pid 42 holds 20.0 GiB" in verdict.report


def test_without_gpus_by_permission_the_other_rules_go_on(tmp_path: Path) -> None:
    blind = [row._replace(gpus=NodeGpus()) for row in rows("aaaa")]
    assert finding_ids(judged(tmp_path, blind)) == ["error V1"]
    allowed = judged(tmp_path, blind, TP4, "--allow-no-gpu")
    assert (allowed.exit_code, finding_ids(allowed)) == (ExitCode.OK, [])
    strange = [row._replace(facts=facts(mpi_library="MPICH Version: 4.2")) for row in blind]
    assert finding_ids(judged(tmp_path, strange, TP4, "--allow-no-gpu")) == ["error K1"]


def test_reports_of_another_version_are_not_read(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, WHOLE_LLAMA, "tensor_parallel_size: 2", "--engine", "trtllm")
    own, *_ = cards_of(rows("aa"))
    verdict = evaluate(plan, [own, RankReport("a", "", "99.0", ())])
    assert [one.rule for one in errors(verdict.findings)] == ["P4"]


def test_hosts_are_judged_for_tensorrt_llm_alone(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, WHOLE_LLAMA, TP4)
    assert evaluate(plan, cards_of(rows("aaaa", [NodeGpus()] * 4))).exit_code is ExitCode.OK


@pytest.mark.parametrize("path", ["absent.yaml", ".", r'"a\0b"'])
def test_a_load_balancer_that_can_not_be_read_is_a_finding(tmp_path: Path, path: str) -> None:
    named = path if "0" in path else str(tmp_path / path)
    verdict = evaluate(make_plan(tmp_path, WHOLE_LLAMA, f"moe_config: {{load_balancer: {named}}}"), cards("a"))
    assert "D4" in [one.rule for one in errors(verdict.findings)]
    assert verdict.exit_code is ExitCode.ILLEGAL_LAYOUT


def test_a_load_balancer_that_is_none_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "balancer.yaml").write_text("- a")
    with pytest.raises(ConfigFileError, match=r"balancer\.yaml"):
        make_plan(tmp_path, WHOLE_LLAMA, f"moe_config: {{load_balancer: {tmp_path}/balancer.yaml}}")
