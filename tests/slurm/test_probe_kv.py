# SPDX-License-Identifier: Apache-2.0
"""The KV probe between nodes whose links are slow or cut: the right pair is named, and nothing hangs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import pytest

from tests.conftest import ROOT

from .session import SlurmSession
from .shaping import lossy_link, slow_node

pytestmark = pytest.mark.slurm
PROGRAM = ROOT / "tests" / "slurm" / "programs" / "kv_side.py"
PREFILL, DECODE = ("n1", "n2", "n3"), "n4"
VARIABLES = {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def stations(slurm: SlurmSession) -> Iterator[str]:
    """A prefill worker's ranks on three nodes, and a decode worker's on the fourth, as they say where they are."""
    with ExitStack() as stack:
        ranks = [(node, "prefill", rank) for rank, node in enumerate(PREFILL)]
        told = []
        for node, role, rank in (*ranks, (DECODE, "decode", 0)):
            process = slurm.popen(sys.executable, PROGRAM, "station", role, str(rank), env=VARIABLES, host=node)
            stack.callback(process.end)
            assert process.stdout is not None
            told.append(json.loads(process.stdout.readline()))
        yield json.dumps(told)


def probe(slurm: SlurmSession, stations: str, bad: AbstractContextManager[None] | None = None) -> dict[str, Any]:
    with bad or nullcontext():
        done = slurm.exec(sys.executable, PROGRAM, "ask", "12", stations, env=VARIABLES, host=DECODE, timeout=30)
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout)
    print(content)
    return content


@pytest.mark.full
def test_links_that_are_alike_are_no_finding(slurm: SlurmSession, stations: str) -> None:
    told = probe(slurm, stations)
    assert told["findings"] == []
    assert told["line"].startswith("kv: 3 pairs over tcp (tcp/eth0): ")


@pytest.mark.full
def test_a_slow_pair_is_named(slurm: SlurmSession, stations: str) -> None:
    told = probe(slurm, stations, slow_node(slurm, "n2", "80mbit"))
    (finding,) = told["findings"]
    assert finding["rule"] == "T3"
    assert finding["message"].endswith("between 1 pair of ranks than between others: prefill rank 1 on n2")
    assert f"decode rank 0 on n4 <- prefill rank 1 on n2 ({slurm.addresses['n2']}, tcp/eth0): " in finding["found"]


def test_a_cut_pair_is_named_and_does_not_hang(slurm: SlurmSession, stations: str) -> None:
    began = time.monotonic()
    told = probe(slurm, stations, lossy_link(slurm, "n3", "n4", 1.0))
    assert time.monotonic() - began < 20
    (finding,) = told["findings"]
    assert finding["rule"] == "T2"
    assert finding["message"].endswith("1 pair of ranks of 3: prefill rank 2 on n3")
    assert "not done in 6 s" in finding["found"]
