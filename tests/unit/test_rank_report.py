# SPDX-License-Identifier: Apache-2.0
"""A rank's answer to rank 0: whatever isn't as rank 0 has it becomes a problem, never an exception."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi import __version__
from dynamo_mpi.checks.gpu_facts import NodeGpus
from dynamo_mpi.checks.host_facts import HostFacts
from dynamo_mpi.checks.rank_report import ComparedFile, RankReport, ReportRequest, collect_rank_report, weight_files
from dynamo_mpi.common.codec import encode_strings
from dynamo_mpi.common.process import host_name
from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo

LAUNCH = LaunchInfo(Launcher.OPEN_MPI, rank=1, size=2, local_rank=0, local_size=2)
ARGV = ("--model", "/m")


def problems_of(
    tmp_path: Path,
    *,
    files: tuple[ComparedFile, ...] = (),
    weights: tuple[str, ...] = (),
    argv: tuple[str, ...] = ARGV,
    launch: LaunchInfo = LAUNCH,
) -> tuple[str, ...]:
    return collect_rank_report(ReportRequest(ARGV, str(tmp_path), weights, files), launch, argv).problems


def watch(path: Path, content: str) -> ComparedFile:
    return ComparedFile("engine config", str(path), content)


def test_a_rank_that_sees_the_same_has_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    config = tmp_path / "engine.yaml"
    config.write_bytes(b"a: 1\r\nb: \xc3\xa9\r\n")
    (tmp_path / "model.safetensors").touch()
    report_request = ReportRequest(ARGV, str(tmp_path), ("model.safetensors",), (watch(config, "a: 1\r\nb: é\r\n"),))
    card = collect_rank_report(report_request, LAUNCH, ARGV)
    assert card == RankReport(host_name(), "2,3", __version__, ())
    assert "." not in host_name()


def test_another_command_line_is_shown_beside_rank_0s(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, argv=("--model", "/other"))
    assert problem.startswith("command line: ")
    assert "--model /other" in problem
    assert "--model /m" in problem


@pytest.mark.parametrize(
    ("mine", "theirs", "line"),
    [
        ("a: 1\nb: 2\n", "a: 1\nb: 3\n", "2"),
        # what can't be seen is what people look for longest
        ("a: 1\n", "a: 1 \n", "1"),
        ("a:\n  b: 1\n", "a:\nb: 1\n", "2"),
        ("\ta: 1\n", " a: 1\n", "1"),
        ("x" * 500 + "1", "x" * 500 + "2", "1"),
        ("a: 1\n", "a: 1\r\n", "1"),
        ("a: 1\n", "a: 1", "1"),
    ],
)
def test_the_first_line_that_differs_between_files_is_reported(
    tmp_path: Path, mine: str, theirs: str, line: str
) -> None:
    config = tmp_path / "engine.yaml"
    config.write_bytes(mine.encode())
    (problem,) = problems_of(tmp_path, files=(watch(config, theirs),))
    assert problem.startswith(f"engine config: {config} differs")
    assert f"line {line}" in problem
    here, _, there = problem.partition(", on rank 0 ")
    quoted = here[here.index("line ") :].partition(": ")[2]
    assert quoted
    assert quoted != there, "the two sides look the same"


@pytest.mark.parametrize(("mine", "theirs"), [("", "a: 1\n"), ("a: 1\n", ""), ("a: 1\n", "a: 1\nb: 2\n")])
def test_a_file_that_ends_early_is_noticed(tmp_path: Path, mine: str, theirs: str) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text(mine)
    (problem,) = problems_of(tmp_path, files=(watch(config, theirs),))
    assert "differs" in problem
    assert "lines, on rank 0 " in problem


@given(st.text(alphabet="ab: \n\r\t\x85", max_size=12), st.text(alphabet="ab: \n\r\t\x85", max_size=12))
def test_any_difference_is_a_problem(tmp_path_factory: pytest.TempPathFactory, mine: str, theirs: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    config = folder / "any.yaml"
    config.write_bytes(mine.encode())
    assert bool(problems_of(folder, files=(watch(config, theirs),))) == (mine != theirs)


def test_binary_rubbish_in_a_file_is_a_difference(tmp_path: Path) -> None:
    config = tmp_path / "engine.yaml"
    config.write_bytes(b"\xff\xfe\0")
    (problem,) = problems_of(tmp_path, files=(watch(config, "a: 1"),))
    assert "differs" in problem


@pytest.mark.parametrize("name", ["absent.yaml", "folder"])
def test_a_file_that_cannot_be_read_is_a_problem(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (problem,) = problems_of(tmp_path, files=(ComparedFile("engine config", f"{tmp_path}/{name}", ""),))
    assert problem.startswith("engine config: ")
    assert "can't be read" in problem


def test_missing_weights_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    weights = ("a.safetensors", "b.safetensors", "c.safetensors")
    (problem,) = problems_of(tmp_path, weights=weights)
    assert problem.startswith("model: ")
    assert "2 of 3" in problem
    assert "b.safetensors" in problem


def test_a_missing_model_folder_is_a_problem(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path / "absent", weights=("a.safetensors",))
    assert "can't be read: No such file" in problem


def test_a_dangling_weight_file_is_found_once_per_node(tmp_path: Path) -> None:
    """A Hugging Face cache is full of links, which a container may not mount the targets of."""
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "nowhere")
    (problem,) = problems_of(tmp_path, weights=("a.safetensors",))
    assert "a.safetensors can't be read" in problem
    assert problems_of(tmp_path, weights=("a.safetensors",), launch=LAUNCH._replace(local_rank=1)) == ()
    assert problems_of(tmp_path, weights=("a.safetensors",), launch=LAUNCH._replace(local_rank=None))


def test_every_problem_is_reported(tmp_path: Path) -> None:
    problems = problems_of(tmp_path, argv=("x",), files=(watch(tmp_path / "absent", ""),), weights=("a.safetensors",))
    assert [problem.partition(":")[0] for problem in problems] == ["command line", "engine config", "model"]


def test_weight_files_are_known_by_their_endings() -> None:
    names = ["b.safetensors", "config.json", "a.gguf", "model.safetensors.index.json", "c.bin", "tokenizer.json"]
    assert weight_files(names) == ("a.gguf", "b.safetensors", "c.bin")


def test_host_and_gpus_are_reported_only_on_request(tmp_path: Path) -> None:
    report_request = ReportRequest(ARGV, str(tmp_path), (), ())
    card = collect_rank_report(report_request, LAUNCH, ARGV, "Open MPI v5.0.8")
    assert (card.host_facts, card.gpu_facts) == ((), ())
    card = collect_rank_report(report_request._replace(hosts=True), LAUNCH, ARGV, "Open MPI v5.0.8")
    assert HostFacts.unpack(card.host_facts).mpi_library == "Open MPI v5.0.8"
    assert card.gpu_facts == ()
    card = collect_rank_report(report_request._replace(hosts=True, gpus=True), LAUNCH, ARGV)
    assert isinstance(NodeGpus.unpack(card.gpu_facts), NodeGpus)


@pytest.mark.parametrize(("local_rank", "speaks"), [(0, True), (None, True), (1, False)])
def test_one_rank_of_each_node_speaks_for_it(tmp_path: Path, local_rank: int | None, speaks: bool) -> None:
    report_request = ReportRequest(ARGV, str(tmp_path), (), (), hosts=True)
    card = collect_rank_report(report_request, LAUNCH._replace(local_rank=local_rank), ARGV)
    assert HostFacts.unpack(card.host_facts).speaks_for_node is speaks


def test_ranks_of_another_version_answer_with_no_more_than_theirs() -> None:
    """P4 is what must be heard of them; the rest may mean something else there."""
    report_request = ReportRequest.unpack(encode_strings(["99.0", "what", "later", "versions", "ask"]))
    card = collect_rank_report(report_request, LAUNCH, ARGV)
    assert (card.host, card.version, card.problems) == (host_name(), __version__, ())
    assert RankReport.unpack(encode_strings(["n1", "0,1", "99.0", "what", "they", "send"])) == RankReport(
        "n1", "0,1", "99.0", ()
    )
