# SPDX-License-Identifier: Apache-2.0
"""How much room `check` and `plan` say that a staged copy needs, against what staging copies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.layout import check, plan
from dynamo_mpi.layout.staging_room import StagingRoom, folder_bytes
from dynamo_mpi.stage.manifest import scan
from tests.unit.model_zoo import ZOO

GIB = 2**30


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The config of a model of 141 GB, alone."""
    path = tmp_path / "model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(ZOO["Llama-3.1-70B"]))
    return path


def test_files_are_counted_as_staging_copies_them(config: Path) -> None:
    blobs = config.parent / ".cache"
    blobs.mkdir()
    (blobs / "partial").write_bytes(b"x" * 1000)
    (config.parent / "blob").write_bytes(b"x" * 5000)
    (config.parent / "model-1.safetensors").symlink_to("blob")
    (config.parent / "original").mkdir()
    (config.parent / "original" / "more.bin").write_bytes(b"x" * 700)
    room = check(config).staging
    assert room == StagingRoom(scan(str(config.parent)).size, counted=True)
    assert room.bytes == 2 * 5000 + 700 + config.stat().st_size
    assert check(config.parent).staging == plan(config.parent, 8).staging == room


def test_without_files_the_weights_are_estimated(config: Path) -> None:
    room = check(config).staging
    assert room is not None and not room.counted
    assert room.bytes == pytest.approx(70.55e9 * 2, rel=0.01)
    # beside other files
    (config.parent / "video.mp4").write_bytes(b"x" * 10)
    assert folder_bytes(str(config.parent)) is None


def test_a_config_that_lacks_sizes_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "num_attention_heads": 8}))
    assert check(path).staging is None
    assert check(path).as_json()["staging"] == {}


@pytest.mark.parametrize(
    ("room", "gpu", "line"),
    [
        (StagingRoom(3 * GIB, True), None, "3.0 GiB of disk on each node; in /dev/shm as much of its memory"),
        (StagingRoom(3 * GIB, False), "h200", "about 3.0 GiB of disk on each node; in /dev/shm as much of its memory"),
        (
            StagingRoom(3 * GIB, False, True),
            "gb200",
            "at least 3.0 GiB of disk on each node; in /dev/shm as much of its memory, which on gb200 leaves less for the KV cache",
        ),
    ],
)
def test_in_one_line(room: StagingRoom, gpu: str | None, line: str) -> None:
    assert room.line(gpu) == f"staging (--stage): {line}"


def test_both_verbs_say_it(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "staging (--stage): about 131.4 GiB of disk on each node; in /dev/shm as much of its memory\n"
    assert main(["check", "--model", str(config), "--tp-size", "8", "--gpu", "h200"]) == 0
    assert capsys.readouterr().out.count(line) == 1
    assert main(["plan", "--model", str(config), "--gpus", "8", "--gpu", "h200"]) == 0
    assert capsys.readouterr().out.count(line) == 1
    pair = [f"--{role}-engine-config={config.parent / 'e.yaml'}" for role in ("prefill", "decode")]
    (config.parent / "e.yaml").write_text("tensor_parallel_size: 8\ncache_transceiver_config: {backend: UCX}\n")
    assert main(["check", "--model", str(config), *pair, "--gpu", "h200"]) == 0
    assert capsys.readouterr().out.count(line) == 1
