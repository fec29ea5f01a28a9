# SPDX-License-Identifier: Apache-2.0
"""The fabric probe between nodes whose links are slow, lossy or cut: the right node or pair is named, and nothing hangs."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.dynamo.running import eventually
from tests.namespaces.processes import command_line

from .session import SlurmSession
from .shaping import lossy_link, slow_node
from .test_worker import library

pytestmark = [pytest.mark.slurm, pytest.mark.serial]
PROGRAM = ROOT / "tests" / "mpi" / "programs" / "probed_world.py"
NODES = ("n1", "n2", "n3", "n4")
SECONDS = 12.0


@pytest.fixture(autouse=True)
def nothing_is_left(slurm: SlurmSession) -> Iterator[None]:
    """Whatever the network does, no rank stays."""
    yield
    left = [pid for node in NODES for pid in slurm.pids(node) if str(PROGRAM) in command_line(pid)]
    assert not left


class Probed:
    """A world of a rank on each node that was probed.

    Args:
        slurm: the cluster.
        folder: for files of this world.
        bad: a link to be bad once the world stands: Slurm and MPI need theirs to start.
        seconds: for the probe.
        strict: `strict` for findings to be errors.
    """

    def __init__(
        self,
        slurm: SlurmSession,
        folder: Path,
        bad: AbstractContextManager[None] | None = None,
        seconds: float = SECONDS,
        strict: str = "report",
    ) -> None:
        plan = f"fabric|{seconds}|mpi|node=0;1;2;3|tp=0,1,2,3"
        placed = (f"--nodes={len(NODES)}", f"--nodelist={','.join(NODES)}", "--ntasks-per-node=1")
        variables = {**library(slurm, "pmix"), "PYTHONPATH": str(ROOT), "NETWORK": "", "HOLD": str(folder / "hold")}
        command = ("srun", "--mpi=pmix", *placed, "--kill-on-bad-exit=1", sys.executable, PROGRAM, plan, strict)
        process = slurm.popen(*command, env=variables)
        try:
            eventually(lambda: (folder / "hold.up").exists() or process.poll() is not None, "the world stands", 30)
            if process.poll() is not None:
                pytest.fail(process.communicate()[1])
            with bad or nullcontext():
                began = time.monotonic()
                (folder / "hold.go").touch()
                self.out, self.err = process.communicate(timeout=40)
                self.took = time.monotonic() - began
        finally:
            process.end()
        self.code = process.returncode
        print(f"{self.took:.1f} s\n{self.out}\n{self.err}")

    @property
    def results(self) -> dict[str, Any]:
        """What rank 0 has found."""
        content: dict[str, Any] = json.loads(self.out.strip().splitlines()[-1])
        return content

    @property
    def findings(self) -> list[tuple[str, str]]:
        return [(finding["rule"], finding["message"]) for finding in self.results["findings"]]


@pytest.mark.full
def test_links_that_are_alike_are_no_finding(slurm: SlurmSession, tmp_path: Path) -> None:
    probed = Probed(slurm, tmp_path)
    assert probed.code == 0
    assert probed.findings == []
    kinds = probed.results["figures"]["fabric"]["kinds"]
    assert list(kinds) == ["exchange far", "all-reduce tp", "all-to-all tp"]
    assert all(min(kind["gbps"]) > 0 and min(kind["us"]) > 0 for kind in kinds.values())


def test_a_slow_node_is_named(slurm: SlurmSession, tmp_path: Path) -> None:
    probed = Probed(slurm, tmp_path, slow_node(slurm, "n3", "80mbit"))
    assert probed.code == 0
    assert ("N3", "node n3 is far slower to reach than others") in probed.findings


@pytest.mark.full
def test_a_lossy_link_is_named(slurm: SlurmSession, tmp_path: Path) -> None:
    """Which packets are lost is chance, and so is how bad it gets: few are sent again, the pair is slow, or nothing comes through in time."""
    probed = Probed(slurm, tmp_path, lossy_link(slurm, "n2", "n3", 0.15), strict="strict")
    assert probed.code in (75, 124)
    said = [line for line in probed.err.splitlines() if re.search("(error N[38]|N2): ", line)]
    assert said
    for line in said:
        # a collective that is late names who does not hear each other, else what was slow before it
        named = line.rpartition("slowest were" if "slowest were" in line else "between")[2]
        assert "rank 1 on n2 and rank 2 on n3" in named
        assert not re.search("n1|n4|other pair", named)


@pytest.mark.full
def test_a_cut_link_is_named_and_ends_the_world(slurm: SlurmSession, tmp_path: Path) -> None:
    probed = Probed(slurm, tmp_path, lossy_link(slurm, "n2", "n3", 1.0), seconds=2.0)
    assert probed.code == 124
    said = "error in hardware_check: N2: the check hangs: a message of 4096 bytes does not arrive between rank 1 on n2 and rank 2 on n3\n"
    assert said in probed.err
    assert probed.took < 12
