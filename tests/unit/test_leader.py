# SPDX-License-Identifier: Apache-2.0
"""What rank 0 makes of failed loads, and of its settings for the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_mpi.checks.preflight import load_inputs
from dynamo_mpi.checks.rank_report import RankReport
from dynamo_mpi.common.codec import encode_strings
from dynamo_mpi.common.errors import ExitCode, UsageError
from dynamo_mpi.config.sources import WorkerSources
from dynamo_mpi.config.worker import load_settings
from dynamo_mpi.runtime.engine_choice import check_engine_installed, engine_spec
from dynamo_mpi.runtime.engine_runner import decode_failures, describe_failures

CARDS = [RankReport(host, "", "1.0", ()) for host in ("n1", "n1", "n2", "n2")]


def report(code: ExitCode, text: str) -> bytes:
    return encode_strings([str(int(code)), text])


def test_a_reason_that_ranks_share_is_reported_once() -> None:
    text, code = describe_failures(decode_failures([b"", *[report(ExitCode.NO_MODEL, "no weights")] * 3]), CARDS)
    assert code is ExitCode.NO_MODEL
    assert text.count("no weights") == 1
    assert "ranks 1 on n1 and 2-3 on n2" in text


def test_the_lowest_rank_decides_the_code_and_every_reason_is_reported() -> None:
    reports = [b"", report(ExitCode.ENGINE, "out of memory"), report(ExitCode.NO_MODEL, "no weights"), b""]
    text, code = describe_failures(decode_failures(reports), CARDS)
    assert code is ExitCode.ENGINE
    assert "rank 1 on n1: out of memory" in text
    assert "rank 2 on n2: no weights" in text


@pytest.mark.parametrize("flags", [[], ["--tp-size", "9", "--max-seq-len", "128"]], ids=["alone", "over flags"])
def test_the_engine_gets_every_size(tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    engine = tmp_path / "engine.yaml"
    engine.write_text(
        "tensor_parallel_size: 3\npipeline_parallel_size: 2\ncontext_parallel_size: 5\nmax_batch_size: 4\n"
        "max_num_tokens: 64\nmax_seq_len: 256\nkv_cache_config: {tokens_per_block: 16}\n"
    )
    argv = ["--model", str(tmp_path), "--engine-config", str(engine), *flags]
    settings = load_settings(WorkerSources(argv, {}))
    spec = engine_spec(settings, load_inputs(settings, argv))
    assert (spec.engine, spec.model_dir) == ("reference", str(tmp_path))
    assert (spec.tp_size, spec.max_seq_len) == (3, 256)
    assert (spec.pp_size, spec.cp_size) == (2, 5)
    assert (spec.max_batch_size, spec.max_num_tokens, spec.tokens_per_block) == (4, 64, 16)


def test_tensorrt_llm_needs_dynamos_worker_for_it_only_where_it_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_mpi.runtime.engine_choice.find_spec", lambda name: None)
    words = ["--model", "/m", "--engine", "trtllm"]
    check_engine_installed(load_settings(WorkerSources([*words, "--preflight-only"], {})))
    check_engine_installed(load_settings(WorkerSources(["--model", "/m"], {})))
    with pytest.raises(UsageError, match=r"there is no dynamo\.trtllm") as caught:
        check_engine_installed(load_settings(WorkerSources(words, {})))
    assert "container" in caught.value.fix
