# SPDX-License-Identifier: Apache-2.0
"""The nodes of a deployment: each error states the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_mpi.common.errors import ConfigFileError, UsageError
from dynamo_mpi.deploy.nodes import allocated, of_hostfile


def test_a_hostfile_names_each_host_once(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("n1 slots=8  # the first\n\nn2\nn1\nuser@n-3.example\nfd00::1\n")
    assert of_hostfile(tmp_path / "hosts", "login").names == ("n1", "n2", "user@n-3.example", "fd00::1")


@pytest.mark.parametrize("content", [None, "", "# n1\n", "n1\n-oProxyCommand=x\n", "c;ls\n", "$(x)\n"])
def test_a_bad_hostfile_is_refused_with_a_fix(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "hosts").write_text(content)
    with pytest.raises(ConfigFileError) as caught:
        of_hostfile(tmp_path / "hosts", "login")
    assert caught.value.expected.startswith("one host on a line")
    assert caught.value.fix


@pytest.mark.parametrize(
    ("scontrol", "problem"),
    [
        ("echo slurm_load_node: no controller >&2; exit 1", "scontrol show hostnames failed, .* no controller"),
        ("exit 0", "job 7 has no nodes"),
        (None, "scontrol isn't on PATH"),
    ],
    ids=["failure", "no node", "no scontrol"],
)
def test_a_failing_scontrol_is_refused_with_a_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scontrol: str | None, problem: str
) -> None:
    if scontrol is not None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{scontrol}\n")
        (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=problem) as caught:
        allocated({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}, 2, 8)
    assert caught.value.expected
    assert caught.value.fix
