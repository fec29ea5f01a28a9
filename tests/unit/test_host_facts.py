# SPDX-License-Identifier: Apache-2.0
"""What a rank reports of its host, on this one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.checks import host_facts
from dynamo_mpi.checks.host_facts import UNKNOWN_VERSION, HostFacts, StaleFile, collect
from dynamo_mpi.common.codec import decode_strings, encode_strings

LIBRARY = "Open MPI v5.0.8, package: Open MPI x@y Distribution, ident: 5.0.8\n"


def look(shm: Path, *, speaks_for_node: bool = True, **environ: str) -> HostFacts:
    return collect(LIBRARY, environ, speaks_for_node=speaks_for_node, shm=str(shm))


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (LIBRARY, "Open MPI v5.0.8"),
        ("MPICH Version:      4.2.1\nMPICH Release date: ...", "MPICH Version: 4.2.1"),
        ("Intel(R) MPI Library 2021.11 for Linux* OS\0\0", "Intel(R) MPI Library 2021.11 for Linux* OS"),
        ("", ""),
    ],
)
def test_the_mpi_library_is_named_in_its_first_words(tmp_path: Path, said: str, name: str) -> None:
    assert collect(said, {}, speaks_for_node=False, shm=str(tmp_path)).mpi_library == name


def test_this_host(tmp_path: Path) -> None:
    facts = look(tmp_path)
    assert set(facts.cpus) == os.sched_getaffinity(0)
    assert set(facts.allowed) >= set(facts.cpus)
    assert dict(facts.versions)["mpi4py"] == metadata.version("mpi4py")
    assert facts.shm_bytes >= facts.shm_free > 0
    assert facts.leftovers == ()
    assert {"cpu", "libc"} <= dict(facts.platform).keys()
    assert (facts.version("no such package"), facts.variable("NO_SUCH_VARIABLE")) == (None, None)


def test_a_rank_that_does_not_speak_for_its_node_reads_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "moe_shared_l0_lr0_all").touch()
    facts = look(tmp_path, speaks_for_node=False, OMP_NUM_THREADS="4")
    assert facts.platform == ()
    assert (facts.versions, facts.shm_bytes, facts.shm_free, facts.leftovers) == ((), 0, 0, ())
    assert facts.variable("OMP_NUM_THREADS") == "4"
    assert facts.cpus


def test_what_can_not_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> set[int]:
        raise OSError

    monkeypatch.setattr(os, "sched_getaffinity", broken)
    facts = look(tmp_path / "missing")
    assert (facts.cpus, facts.shm_bytes, facts.shm_free, facts.leftovers) == ((), 0, 0, ())


def test_segments_of_an_earlier_worker(tmp_path: Path) -> None:
    old, young = tmp_path / "moe_shared_l0_lr0_all", tmp_path / "moe_shared_l1_lr0_all"
    old.write_bytes(b"x" * 300)
    young.touch()
    (tmp_path / "other").touch()
    os.utime(old, (1, 1))
    os.utime(young, (2**33, 2**33))  # a clock that was set back
    first, second = look(tmp_path).leftovers
    assert (first.name, first.size, second) == (old.name, 300, StaleFile(young.name, 0, 0))
    assert first.age > 10**9


def test_segments_of_somebody_else_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "moe_shared").touch()
    monkeypatch.setattr(os, "getuid", lambda: 2**31)
    assert look(tmp_path).leftovers == ()


def test_only_what_matters_leaves_the_environment_and_no_secret(tmp_path: Path) -> None:
    facts = look(
        tmp_path,
        PATH="/bin",
        OMP_NUM_THREADS="8",
        CUDA_VISIBLE_DEVICES="",
        TRTLLM_USE_UCX_KVCACHE="1",
        TRTLLM_MOE_DISABLE_ALLTOALLV="1",
        TLLM_X="y" * 1000,
        TLLM_LOG_LEVEL="INFO",
        TLLM_SPAWN_PROXY_PROCESS="1",
        TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY="hush",
        TRTLLM_HUB_TOKEN="hush",  # noqa: S106 - not a password
        TRTLLM_CACHE_DIR="/local/n1",
    )
    assert dict(facts.variables) == {
        "OMP_NUM_THREADS": "8",
        "CUDA_VISIBLE_DEVICES": "",
        "TRTLLM_USE_UCX_KVCACHE": "1",
        "TRTLLM_MOE_DISABLE_ALLTOALLV": "1",
        "TLLM_X": "y" * 200,
    }
    assert "hush" not in repr(facts)


def test_an_engine_without_metadata_is_there_and_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tensorrt_llm"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(host_facts, "PACKAGES", ("tensorrt_llm", "no-such-distribution"))
    assert look(tmp_path).versions == (("tensorrt_llm", UNKNOWN_VERSION),)


def test_the_ranks_import_next_to_nothing() -> None:
    code = (
        "import __future__, contextlib, os, sys, typing; before = set(sys.modules)\n"
        "from dynamo_mpi.checks import gpu_facts, host_facts\n"
        "host_facts.collect('Open MPI', os.environ, speaks_for_node=False)\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in out if not name.startswith("dynamo_mpi")] == []


TEXT = st.one_of(st.text(max_size=10), st.binary(max_size=10).map(os.fsdecode))
PAIRS = st.lists(st.tuples(TEXT, TEXT), max_size=4).map(tuple)
SIZE = st.integers(0, 2**60)
CPUS = st.frozensets(st.integers(0, 1024), max_size=9).map(sorted).map(tuple)
FACTS = st.builds(
    HostFacts,
    st.booleans(),
    TEXT,
    CPUS,
    PAIRS,
    PAIRS,
    TEXT,
    SIZE,
    SIZE,
    st.lists(st.builds(StaleFile, TEXT, SIZE, SIZE), max_size=3).map(tuple),
    CPUS,
    PAIRS,
)


@given(FACTS)
def test_a_rank_report_arrives_unchanged(facts: HostFacts) -> None:
    assert HostFacts.unpack(decode_strings(encode_strings(facts.pack()))) == facts


@given(st.lists(st.text(alphabet="0123- x", max_size=3), max_size=20))
def test_what_is_no_such_list_is_refused(values: list[str]) -> None:
    try:
        HostFacts.unpack(values)
    except ValueError:
        return
