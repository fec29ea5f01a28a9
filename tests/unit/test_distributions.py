# SPDX-License-Identifier: Apache-2.0
"""Versions of distributions, compared with what ``importlib.metadata`` reads."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from dynamo_mpi.common.distributions import installed_versions
from tests.conftest import ROOT


def test_all_of_this_environment_have_the_librarys_version() -> None:
    names = {found.metadata["Name"] for found in metadata.distributions()}
    assert installed_versions(sorted(names)) == {name: metadata.version(name) for name in names}
    assert len(names) > 20


@pytest.mark.parametrize(
    ("entry", "content", "version"),
    [
        ("tensorrt_llm-1.3.0rc5.dist-info/METADATA", "Metadata-Version: 2.4\nName: x\nVersion: 1.3.0rc5\n", "1.3.0rc5"),
        ("TensorRT.LLM-1.2.dist-info/METADATA", "Name: x\nVersion: 1.2+cu13\n\nVersion: 9\n", "1.2+cu13"),
        ("tensorrt_llm.egg-info/PKG-INFO", "Version: 1.0\n", "1.0"),
        ("tensorrt_llm-1.1-py3.11.egg-info", "Version: 1.1\n", "1.1"),
        ("tensorrt_llm-1.1.dist-info/METADATA", "Name: x\n\nVersion: 9\n", ""),
        ("tensorrt_llm-1.1.dist-info/RECORD", "", ""),
    ],
)
def test_each_kind_of_metadata(tmp_path: Path, entry: str, content: str, version: str) -> None:
    (tmp_path / entry).parent.mkdir(exist_ok=True)
    (tmp_path / entry).write_text(content)
    assert installed_versions(["tensorrt-llm", "torch"], [str(tmp_path)]) == {"tensorrt-llm": version}


def test_the_first_folder_wins_and_others_are_skipped(tmp_path: Path) -> None:
    for folder, version in (("first", "1"), ("second", "2")):
        info = tmp_path / folder / "torch-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Version: {version}\n")
    archive = tmp_path / "packages.zip"
    archive.touch()
    path = [str(tmp_path / "missing"), str(archive), str(tmp_path / "first"), str(tmp_path / "second")]
    assert installed_versions(["torch"], path) == {"torch": "1"}


def test_rank_0_imports_no_slow_module_before_the_result() -> None:
    slow = (
        "typing",
        "dataclasses",
        "inspect",
        "traceback",
        "importlib.metadata",
        "email",
        "difflib",
        "asyncio",
        "shutil",
        "tempfile",
    )
    code = (
        "import sys, pickle\n"  # as mpi4py does
        "from dynamo_mpi.checks import host_facts, gpu_rules, host_rules\n"
        "from dynamo_mpi.runtime import agent_process, leader, main\n"
        "host_facts.collect('Open MPI', {}, speaks_for_node=True)\n"
        f"print([name for name in {slow} if name in sys.modules])"
    )
    # without site-packages' .pth files, which may import anything
    words = [sys.executable, "-S", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT, env={"PATH": ""})
    assert done.stdout.strip() == "[]"
