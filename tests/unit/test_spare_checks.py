# SPDX-License-Identifier: Apache-2.0
"""What makes a spare node unfit before it is needed: what it lacks by itself, and what differs from the nodes of workers that serve."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi import __version__
from dynamo_mpi.checks import node_probe
from dynamo_mpi.checks.gpu_fabric import COMPLETED, GpuFabric
from dynamo_mpi.checks.gpu_facts import GpuFacts, NodeGpus
from dynamo_mpi.checks.host_facts import HostFacts, StaleFile
from dynamo_mpi.checks.node_facts import NodeFacts, facts_of_node, facts_of_worker
from dynamo_mpi.checks.node_probe import read_result
from dynamo_mpi.checks.rank_report import ComparedFile, RankReport, ReportRequest
from dynamo_mpi.checks.spare_rules import compare
from dynamo_mpi.deploy import spare_checks
from dynamo_mpi.deploy.spare_checks import SpareComparer
from dynamo_mpi.deploy.step_commands import SPARES

GIB = 2**30
H100 = GpuFacts(0, "GPU-0", "NVIDIA H100 80GB HBM3", 90, 80 * GIB, 80 * GIB)
GPUS = NodeGpus((H100, H100._replace(number=1, uuid="GPU-1")), ("GPU-0", "GPU-1"), "580.1", 13000)
OPEN_MPI = "Open MPI v5.0.8"
VERSIONS = (("tensorrt_llm", "1.2.1"), ("torch", "2.9.0"), ("ai-dynamo", "1.4.0"))
HOST = HostFacts(True, OPEN_MPI, versions=VERSIONS, shm_bytes=64 * GIB, shm_free=64 * GIB)
CONFIG, ENGINE = "/model/config.json", "/engine.yaml"


def facts(host: str, facts: HostFacts = HOST, gpus: NodeGpus = GPUS, **more: Any) -> NodeFacts:
    usual = {"version": "1.0", "python": "cpython 3.12", "model_dir": "/model", "weights": 2, "weight_names": "w"}
    files = {CONFIG: "c", ENGINE: "e"}
    return NodeFacts(host, **{**usual, "files": files, "host_facts": facts.pack(), "gpu_facts": gpus.pack(), **more})


WORKER = facts("n1")
MIG = H100._replace(mig=True)
UNFIT: dict[str, tuple[NodeFacts, str]] = {
    "dynamo_mpi": (facts("n5", version="1.1"), "P4: dynamo_mpi 1.1, on n1 1.0"),
    "Python": (facts("n5", python="cpython 3.10"), "P4: Python is cpython 3.10, on n1 cpython 3.12"),
    "a package that decides": (
        facts("n5", HOST._replace(versions=(*VERSIONS[:1], ("torch", "2.8.0"), *VERSIONS[2:]))),
        "D10: torch: 2.9.0 on n1; 2.8.0 on n5",
    ),
    "another package": (
        facts("n5", HOST._replace(versions=VERSIONS[:2])),
        "D10: ai-dynamo: 1.4.0 on n1; missing on n5",
    ),
    "MPI": (facts("n5", HOST._replace(mpi_library="Open MPI v4.1.6")), "K1: "),
    "the model's config": (facts("n5", files={CONFIG: "other", ENGINE: "e"}), f"P3: {CONFIG} differs from that on n1"),
    "no config": (facts("n5", files={ENGINE: "e"}), f"P3: {CONFIG} isn't there"),
    "the engine's": (facts("n5", files={CONFIG: "c", ENGINE: "other"}), f"P2: {ENGINE} differs from that on n1"),
    "weights": (facts("n5", weights=1, weight_names="v"), "P3: /model has other weight files: 1 of them, 2 on n1"),
    "another architecture": (
        facts("n5", gpus=GPUS._replace(gpus=tuple(gpu._replace(sm=80, name="NVIDIA A100") for gpu in GPUS.gpus))),
        "G6: ",
    ),
    "a GPU less": (
        facts("n5", gpus=GPUS._replace(gpus=GPUS.gpus[:1], visible=("GPU-0",))),
        "G6: 2 GPUs on n1; 1 GPU on n5",
    ),
    "no GPU": (
        facts("n5", gpus=NodeGpus(problem="the NVIDIA driver isn't loaded")),
        "V1: no GPU is seen there: the NVIDIA driver isn't loaded",
    ),
    "instances": (facts("n5", gpus=GPUS._replace(gpus=(MIG, *GPUS.gpus[1:]))), "V8: MIG is on, on n5"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_spare_that_a_preflight_would_refuse_beside_the_worker_is_unfit(what: str) -> None:
    spare, problem = UNFIT[what]
    found = compare(WORKER, spare)
    (said,) = found.files if problem.startswith(("P2", "P3")) else found.problems
    assert said.startswith(problem) and len((*found.files, *found.problems)) == 1


@pytest.mark.parametrize(
    ("spare", "rules"),
    [
        (facts("n5"), []),
        (facts("n5", gpus=GPUS._replace(driver="570.2", cuda=12080)), ["V6"]),
        (facts("n5", HOST._replace(shm_free=GIB)), ["V3"]),
        (facts("n5", HOST._replace(leftovers=(StaleFile("moe_shared", GIB, 60),))), ["V4"]),
        (
            facts(
                "n5",
                gpus=GPUS._replace(
                    gpus=(*GPUS.gpus, H100._replace(number=2, uuid="GPU-2")), visible=("GPU-0", "GPU-1", "GPU-2")
                ),
            ),
            [],
        ),
        (facts("n5", HOST._replace(mpi_library="")), []),
        # another folder may be a copy of its own
        (facts("n5", model_dir="/other", weights=1, weight_names="v", files={ENGINE: "e"}), []),
    ],
)
def test_what_a_worker_starts_with_is_a_note(spare: NodeFacts, rules: list[str]) -> None:
    found = compare(WORKER, spare)
    assert found.problems == ()
    assert [note.partition(":")[0] for note in found.notes] == rules


def test_an_engine_without_requirements_of_hosts_compares_versions_and_files_alone() -> None:
    bare = WORKER._replace(host_facts=(), gpu_facts=())
    assert compare(bare, facts("n5", HOST._replace(versions=()), NodeGpus())) == ((), (), ())
    assert compare(bare, facts("n5", version="2.0")).problems


CPU = (("cpu", "avx512"), ("glibc", "2.39"))


@pytest.mark.parametrize(
    ("spare", "notes"),
    [
        (facts("n5", HOST._replace(platform=CPU), caches="/shared/caches"), []),
        # without --cache it doesn't matter
        (facts("n5", HOST._replace(platform=CPU[:1])), []),
        (
            facts("n5", HOST._replace(platform=(("cpu", "avx2"), CPU[1])), caches="/shared/caches"),
            ["compile caches: those for n1 aren't for this node's cpu, so a first start here compiles kernels"],
        ),
        (
            facts("n5", HOST._replace(platform=CPU), caches="unreadable: /shared/caches is no folder here"),
            ["compile caches: /shared/caches is no folder here, so a start here compiles kernels"],
        ),
    ],
)
def test_whether_a_spare_would_be_seeded_with_the_worker_s_compile_caches(spare: NodeFacts, notes: list[str]) -> None:
    assert compare(facts("n1", HOST._replace(platform=CPU)), spare) == ((), (), tuple(notes))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "a.safetensors").write_bytes(b"")
    (tmp_path / "engine.yaml").write_text("tensor_parallel_size: 1\n")
    return folder


def worker_facts(model: Path) -> NodeFacts:
    """Return what rank 0 of a worker with the same model has written."""
    paths = {"model config": model / "config.json", "engine config": model.parent / "engine.yaml"}
    files = tuple(ComparedFile(label, str(path), path.read_text()) for label, path in paths.items())
    request = ReportRequest((), str(model), ("a.safetensors",), files)
    host = HOST._replace(variables=(("TLLM_WORKER", "x"),), cpus=(1,))
    found = facts_of_worker(request, RankReport("n1", "", __version__, (), host.pack()))
    # anybody may read it
    assert "TLLM_WORKER" not in found.host_facts
    return found._replace(host_facts=())


def test_a_node_with_the_same_files_is_like_the_worker_s(model: Path) -> None:
    spare = facts_of_node(str(model), [str(model.parent / "engine.yaml")], os.environ)
    assert (spare.problems, compare(worker_facts(model), spare)) == ([], ((), (), ()))
    assert NodeFacts.of(json.loads(json.dumps(spare._asdict()))) == spare
    (model / "b.safetensors").write_bytes(b"")
    (model / "config.json").write_text("{}")
    files = compare(worker_facts(model), facts_of_node(str(model), [], os.environ)).files
    assert files == (f"P3: {model} has other weight files: 2 of them, 1 on n1",)


def test_a_folder_for_caches_that_isn_t_there_is_known(tmp_path: Path) -> None:
    assert facts_of_node("", [], {"DYN_MPI_CACHE": str(tmp_path)}).caches == str(tmp_path)
    gone = tmp_path / "gone"
    assert facts_of_node("", [], {"DYN_MPI_CACHE": str(gone)}).caches == f"unreadable: {gone} is no folder here"


@pytest.mark.parametrize("missing", ["model", "engine.yaml"])
def test_files_that_cant_be_read_are_problems_without_a_worker(missing: str, model: Path) -> None:
    path = model if missing == "model" else model.parent / missing
    path.rename(path.with_name("elsewhere"))
    (problem,) = facts_of_node(str(model), [str(model.parent / "engine.yaml")], os.environ).problems
    assert str(path) in problem


def test_the_probe_of_a_spare_writes_them_down_and_reports_what_is_missing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODEL_PATH", str(model))
    monkeypatch.setattr(node_probe, "wait_for_memory", lambda seconds: [])
    written = tmp_path / "spares" / "n5.json"
    words = ["--full", "--facts", str(written), "--engine-config", str(tmp_path / "gone.yaml")]
    assert node_probe.main(words) == 0
    result = read_result(capsys.readouterr().out)
    assert result is not None
    assert result.problems == (f"{tmp_path / 'gone.yaml'} can't be read: No such file or directory",)
    assert NodeFacts.of(json.loads(written.read_text())).model_dir == str(model)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(content))
    fresh.replace(path)


def test_spares_are_compared_with_each_start_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare_checks, "LOOK_SECONDS", 0.0)
    tmp_path.chmod(0o700)
    write(tmp_path / SPARES / "n5.json", facts("old")._asdict())
    comparer = SpareComparer(tmp_path)
    comparer.forget("n5")
    fabric = GpuFabric(COMPLETED, 0, "7f", 1)
    gpus = GPUS._replace(gpus=tuple(gpu._replace(fabric=fabric) for gpu in GPUS.gpus))
    write(tmp_path / "ready" / "decode-0.json", {"node": facts("n1", gpus=gpus)._asdict()})
    # nothing is known of it yet
    assert comparer.look(["n5"]) == {}
    assert (comparer.domain_of("decode-0"), comparer.domain_of("prefill-0")) == ("7f.1", "")
    write(tmp_path / SPARES / "n5.json", facts("n5", HOST._replace(shm_free=0))._asdict())
    found = comparer.look(["n5"])["n5"]
    assert ([note[:3] for note in found.notes], found.problems, found.is_old) == (["V3:"], {}, False)
    assert comparer.look(["n5"]) == {}
    # an older worker's, or anything else
    others: list[object] = [{}, {"node": None}, {"node": {"host": "n1"}}, []]
    for content in others:
        write(tmp_path / "ready" / "prefill-0.json", content)
        assert comparer.look(["n5"]) == {}
    write(tmp_path / "ready" / "prefill-0.json", {"node": facts("n2", version="2.0")._asdict()})
    found = comparer.look(["n5"])["n5"]
    assert (found.problems, found.is_old) == ({"prefill-0": "P4: dynamo_mpi 1.0, on n2 2.0"}, True)
    # what has served once is known from then on
    (tmp_path / "ready" / "decode-0.json").unlink()
    assert comparer.look(["n5"]) == {}
    assert comparer.domain_of("decode-0") == "7f.1"


def test_a_file_that_was_changed_for_all_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare_checks, "LOOK_SECONDS", 0.0)
    tmp_path.chmod(0o700)
    changed = {CONFIG: "c", ENGINE: "new"}
    comparer = SpareComparer(tmp_path)
    write(tmp_path / "ready" / "decode-0.json", {"node": facts("n1")._asdict()})
    write(tmp_path / SPARES / "n5.json", facts("n5")._asdict())
    assert comparer.look(["n5"])["n5"].problems == {}
    # another one starts with the new file; the spare was checked before
    write(tmp_path / "ready" / "decode-1.json", {"node": facts("n2", files=changed)._asdict()})
    found = comparer.look(["n5"])["n5"]
    assert (found.problems, set(found.doubts), found.is_old) == ({}, {"decode-0", "decode-1"}, True)
    comparer.forget("n5")
    assert comparer.look(["n5"]) == {}
    write(tmp_path / SPARES / "n5.json", facts("n5", files=changed)._asdict())
    assert comparer.look(["n5"])["n5"] == ({}, {}, (), False)
