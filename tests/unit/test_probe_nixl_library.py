# SPDX-License-Identifier: Apache-2.0
"""A host without a NIXL that works says so, with the cure."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from dynamo_mpi.errors import UsageError
from dynamo_mpi.probe import nixl_library
from dynamo_mpi.probe.kv_nixl import NixlAgent


def test_a_host_without_nixl_is_told_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_library, "_PACKAGES", ("nixl_of_no_host",))
    assert not nixl_library.nixl_installed()
    with pytest.raises(UsageError, match="NIXL is not installed here") as error:
        NixlAgent().open()
    assert "pip install" in str(error.value.fix)
    assert "--kv-transport tcp" in str(error.value.fix)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("raise ImportError('libcuda.so.1: cannot open shared object file')", r"libcuda\.so\.1"),
        ("import torch_of_no_host", "nixl_broken.* needs torch_of_no_host, which is not installed"),
    ],
)
def test_a_nixl_that_does_not_load_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, why: str
) -> None:
    package = tmp_path / f"nixl_broken_{tmp_path.name}"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_api.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(nixl_library, "_PACKAGES", (package.name,))
    assert importlib.util.find_spec(package.name) is not None
    with pytest.raises(UsageError, match=f"can't be used on this host: {why}"):
        NixlAgent().open()
