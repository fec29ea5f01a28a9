# SPDX-License-Identifier: Apache-2.0
"""Compile caches without MPI: which variables are set, what makes an archive valid, what is packed, and what is refused."""

from __future__ import annotations

import ctypes
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from dynamo_mpi.checks.gpu_facts import GpuFacts, NodeGpus
from dynamo_mpi.checks.host_facts import HostFacts
from dynamo_mpi.checks.rank_facts import RankFacts
from dynamo_mpi.checks.rank_report import ComparedFile
from dynamo_mpi.common import folder_walk
from dynamo_mpi.common.claimed_folder import LOCK, claim, remove_claimed
from dynamo_mpi.common.folder_walk import UnsafeFileError, user_folder
from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.host_platform import cpu_kind
from dynamo_mpi.layout.engine_config import EngineConfig
from dynamo_mpi.layout.layout import Cluster, LayoutSpec
from dynamo_mpi.layout.model_config import parse_model_shape
from dynamo_mpi.mpi.world import World
from dynamo_mpi.runtime.leader_caches import LeaderCaches
from dynamo_mpi.stage import cache_archive, cache_folder, cache_helper, cache_session, cache_store
from dynamo_mpi.stage.cache_archive import ArchiveError, contents_of, copy_checked, pack, unpack
from dynamo_mpi.stage.cache_call import HelperCall, Problem
from dynamo_mpi.stage.cache_folder import OWN_TMPDIR, bases_for, claim_folder
from dynamo_mpi.stage.cache_helper import handle
from dynamo_mpi.stage.cache_key import KeyUnknownError, key_of
from dynamo_mpi.stage.cache_session import CachePlan, CacheSession, unlike_json
from dynamo_mpi.stage.cache_store import Part, folders_of, look, name_of, publish
from dynamo_mpi.stage.compile_caches import LIBRARIES, ROOT_VARIABLE, assign
from tests.contexts import OneRank
from tests.unit.models import SMOLLM2
from tests.unit.neighbour import NOBODY, as_neighbour, needs_root

Files = dict[str, bytes]
SHAPE = parse_model_shape(json.dumps(SMOLLM2), "config.json")


def write(folder: Path, files: Files) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def packed(folder: Path) -> bytes:
    target = io.BytesIO()
    pack(str(folder), target)
    return target.getvalue()


def read(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# which variables


def test_each_library_gets_its_own_folder_below_the_rank_s() -> None:
    found = assign("/local/r0", {"PATH": "/bin"})
    assert found.own == ()
    assert {library.variable for library in LIBRARIES} < found.variables.keys()
    assert found.variables["TLLM_AUTOTUNER_CACHE_PATH"] == "/local/r0/autotuner/cache.json"
    assert "/local/r0/autotuner" in found.folders and "/local/r0/autotuner/cache.json" not in found.folders
    assert found.variables[ROOT_VARIABLE] == "/local/r0/trtllm"
    # without it, TensorRT-LLM keeps these kernels in memory
    assert found.variables["TRTLLM_DG_JIT_DUMP_CUBIN"] == "1"
    places = [library.place for library in LIBRARIES]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("name", "value", "variable"),
    [
        ("TRITON_CACHE_DIR", "/mine", "TRITON_CACHE_DIR"),
        ("TRITON_HOME", "/mine", "TRITON_CACHE_DIR"),
        ("CUDA_CACHE_DISABLE", "1", "CUDA_CACHE_PATH"),
        ("TRTLLM_FLASHINFER_WORKSPACE_PER_PROCESS", "0", "FLASHINFER_WORKSPACE_BASE"),
    ],
)
def test_what_the_user_has_set_wins(name: str, value: str, variable: str) -> None:
    found = assign("/local/r0", {name: value})
    assert variable not in found.variables and name not in found.variables
    (line,) = found.own
    assert line.startswith(f"{name} is set: ") and line.endswith("'s compile cache is left alone")
    # TensorRT-LLM sets a variable that isn't set below its root: only where that is the user's own it stays as it is
    assert (ROOT_VARIABLE in found.variables) == (name == variable)
    others = {library.variable for library in LIBRARIES} - {variable}
    assert others <= found.variables.keys()


def test_the_user_s_root_is_for_all_of_them() -> None:
    found = assign("/local/r0", {ROOT_VARIABLE: "/mine"})
    assert (found.variables, found.folders) == ({}, ())
    assert found.own == (f"{ROOT_VARIABLE} is set: all compile caches are where it says",)
    assert "TRTLLM_DG_JIT_DUMP_CUBIN" not in assign("/l", {"TRTLLM_DG_JIT_DUMP_CUBIN": "0"}).variables


# what makes an archive valid

GPU = GpuFacts(0, "GPU-a", "NVIDIA H200", 90)
PLATFORM = (("cpu", "x86_64-1"), ("libc", "glibc 2.39"), ("system", "ubuntu 24.04"), ("cuda toolkit", "13.0.1"))
HOST = HostFacts(
    True, "Open MPI", versions=(("tensorrt_llm", "1.3.0"), ("torch", "2.11"), ("mpi4py", "4.1")), platform=PLATFORM
)


def row(rank: int, **more: Any) -> RankFacts:
    gpus = tuple(replace_gpu(GPU, number, **more) for number in range(2))
    node = NodeGpus(gpus, tuple(gpu.uuid for gpu in gpus), more.get("driver", "580.1"))
    return RankFacts(rank, "n1", HOST if rank == 0 else HostFacts(False, ""), node)


def replace_gpu(gpu: GpuFacts, number: int, **more: Any) -> GpuFacts:
    named = {name: value for name, value in more.items() if name in GpuFacts._fields}
    return gpu._replace(number=number, uuid=f"GPU-{number}", **named)


def key(subject: LayoutSpec | None = None, rows: list[RankFacts] | None = None, config: str = "{}") -> dict[str, Any]:
    subject = subject or LayoutSpec(SHAPE, EngineConfig(tp_size=2), Cluster(1, 2))
    files = (ComparedFile("model config", "config.json", config), ComparedFile("engine config", "e.yaml", "x: 1"))
    return key_of(subject, files, rows or [row(0), row(1)], without_gpus=False)


def platform_with(changed: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, "other" if name == changed else value) for name, value in PLATFORM)


def test_the_key_has_all_that_makes_kernels_valid_and_no_more() -> None:
    usual = key()
    assert usual["versions"] == {"tensorrt_llm": "1.3.0", "torch": "2.11"}
    assert usual["hosts"] == [dict(PLATFORM)] * 2
    assert usual["gpus"] == [["NVIDIA H200", 90, "580.1"]] * 2
    assert usual == key() == json.loads(json.dumps(usual))
    other_versions = HOST._replace(versions=(("tensorrt_llm", "1.3.1"),))
    changed = {
        "engine": key(rows=[row(0)._replace(facts=other_versions), row(1)]),
        **{
            name: key(rows=[row(0)._replace(facts=HOST._replace(platform=platform_with(name))), row(1)])
            for name, _ in PLATFORM
        },
        # on other nodes as well
        "one node's CPU": key(
            rows=[row(0), row(1)._replace(host="n2", facts=HOST._replace(platform=platform_with("cpu")))]
        ),
        "driver": key(rows=[row(0, driver="590.1"), row(1, driver="590.1")]),
        "one rank's driver": key(rows=[row(0), row(1, driver="590.1")]),
        "GPU": key(rows=[row(0, name="NVIDIA B200", sm=100), row(1, name="NVIDIA B200", sm=100)]),
        "model": key(config='{"x": 1}'),
        "layout": key(LayoutSpec(SHAPE, EngineConfig(pp_size=2), Cluster(1, 2))),
        "nodes": key(LayoutSpec(SHAPE, EngineConfig(tp_size=2), Cluster(2, 1))),
        "role": key(LayoutSpec(SHAPE, EngineConfig(tp_size=2), Cluster(1, 2), role="decode")),
    }
    names = {what: name_of("/models/M", each) for what, each in changed.items()} | {
        "usual": name_of("/models/M", usual)
    }
    assert len(set(names.values())) == len(names)
    assert names["usual"].startswith("M-") and name_of("/models/.. /", usual).startswith("_")
    place = changed["layout"]["places"][1]
    assert place != usual["places"][1]


def test_where_a_gpu_isn_t_known_there_is_no_key() -> None:
    unknown = row(1)._replace(gpus=NodeGpus(problem="no NVML"))
    with pytest.raises(KeyUnknownError, match=r"rank 1 on n1, or its driver, isn't known: no NVML"):
        key(rows=[row(0), unknown])
    without = key_of(
        LayoutSpec(SHAPE, EngineConfig(), Cluster(1, 1)), (), [unknown._replace(rank=0)], without_gpus=True
    )
    assert without["gpus"] == [[]]


# archives


def test_an_archive_gives_the_files_back_with_their_times_to_the_nanosecond(tmp_path: Path) -> None:
    files = {
        "triton/K/kernel.cubin": b"\x7fELF" * 9,
        "flashinfer/op.so": b"so",
        "inductor/ab/c.py": b"x = 1\n",
        "e": b"",
    }
    source = write(tmp_path / "a", files)
    os.utime(source / "flashinfer/op.so", ns=(1, 1_700_000_000_123_456_789))
    (source / "flashinfer/op.so").chmod(0o755)
    data = packed(source)
    source.rename(tmp_path / "moved")
    target = tmp_path / "a"
    target.mkdir()
    unpack(io.BytesIO(data), str(target))
    assert read(target) == files
    assert (target / "flashinfer/op.so").stat().st_mtime_ns == 1_700_000_000_123_456_789
    assert (target / "flashinfer/op.so").stat().st_mode & 0o777 == 0o700
    assert (target / "triton/K/kernel.cubin").stat().st_mode & 0o777 == 0o600
    assert contents_of(str(target)) == contents_of(str(tmp_path / "moved"))


def test_what_is_good_in_one_folder_only_isn_t_unpacked_into_another(tmp_path: Path) -> None:
    files = {
        "triton/k": b"k",
        "flashinfer/.cache/op/build.ninja": b"n",
        "torch_extensions/x/x.so": b"x",
        "cuda/index": b"i",
    }
    data = packed(write(tmp_path / "a", files))
    (tmp_path / "b").mkdir()
    unpack(io.BytesIO(data), str(tmp_path / "b"))
    assert set(read(tmp_path / "b")) == {"triton/k", "cuda/index"}


def test_what_is_of_a_process_or_would_stop_the_engine_is_left_out(tmp_path: Path) -> None:
    left_out = {
        LOCK: b"",
        "triton/K/tmp.pid_1_x/kernel": b"x",
        "flashinfer/cached_ops/tmp/op.lock": b"",
        "inductor/locks/a": b"",
        "inductor/a.lock": b"",
        "torch_extensions/x/lock": b"",
        "autotuner/cache.json": b'{"rank_0": {',
    }
    source = write(tmp_path / "a", {"triton/K/k": b"k", **left_out})
    (source / "link").symlink_to("/etc/hostname")
    os.mkfifo(source / "pipe")
    assert set(contents_of(str(source)).files) == {"triton/K/k"}
    write(source, {"autotuner/cache.json": b'{"rank_0": {}}'})
    assert set(contents_of(str(source)).files) == {"triton/K/k", "autotuner/cache.json"}


def test_triton_s_lists_of_files_follow_the_folder(tmp_path: Path) -> None:
    source = tmp_path / "a"
    kernel = str(source / "triton/K/k.cubin")
    write(
        source,
        {"triton/K/k.cubin": b"k", "triton/K/__grp__k.json": json.dumps({"child_paths": {"k": kernel}}).encode()},
    )
    write(source, {"other.json": json.dumps(kernel).encode()})
    target = tmp_path / "b"
    target.mkdir()
    unpack(io.BytesIO(packed(source)), str(target))
    assert json.loads((target / "triton/K/__grp__k.json").read_text())["child_paths"] == {
        "k": str(target / "triton/K/k.cubin")
    }
    assert json.loads((target / "other.json").read_text()) == kernel


def tar_with(*members: tuple[str, bytes, str]) -> io.BytesIO:
    """An archive that our own packing would never write: (name, type, target)."""
    target = io.BytesIO()
    facts = {"DYNAMOMPI.home": "/x", "DYNAMOMPI.cpu": cpu_kind()}
    with tarfile.open(fileobj=target, mode="w", pax_headers=facts) as archive:
        for name, kind, link in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            member.size = 3 if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"abc"))
    target.seek(0)
    return target


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("/etc/x", tarfile.REGTYPE, ""),
        ("../x", tarfile.REGTYPE, ""),
        ("a/../../x", tarfile.REGTYPE, ""),
        ("a/./x", tarfile.REGTYPE, ""),
        ("a//x", tarfile.REGTYPE, ""),
        (LOCK, tarfile.REGTYPE, ""),
        ("x", tarfile.SYMTYPE, "/etc/passwd"),
        ("x", tarfile.LNKTYPE, "y"),
        ("x", tarfile.CHRTYPE, ""),
        ("x", tarfile.FIFOTYPE, ""),
        ("x", tarfile.GNUTYPE_SPARSE, ""),
    ],
)
def test_nothing_but_folders_and_regular_files_below_the_folder_is_unpacked(
    tmp_path: Path, name: str, kind: bytes, link: str
) -> None:
    target = tmp_path / "in"
    target.mkdir()
    with pytest.raises(ArchiveError):
        unpack(tar_with(("fine", tarfile.REGTYPE, ""), (name, kind, link)), str(target))
    assert set(read(tmp_path)) == {"in/fine"}


def test_a_file_is_never_written_through_one_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "fine").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        unpack(tar_with(("fine", tarfile.REGTYPE, "")), str(tmp_path))
    assert not (tmp_path / "elsewhere").exists()


def test_an_archive_of_another_cpu_or_cut_off_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = packed(write(tmp_path / "a", {"x": b"x" * 5000}))
    (tmp_path / "b").mkdir()
    with pytest.raises(ArchiveError, match="no whole archive"):
        unpack(io.BytesIO(data[:2500]), str(tmp_path / "b"))
    monkeypatch.setattr(cache_archive, "cpu_kind", lambda: "other")
    with pytest.raises(ArchiveError, match="another kind of CPU"):
        unpack(io.BytesIO(data), str(tmp_path / "b"))


def test_a_folder_that_changes_all_the_time_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a", {"x": b"x"})
    real: Callable[..., None] = cache_archive._write

    def while_compiling(folder: str, contents: Any, target: Any) -> None:
        real(folder, contents, target)
        write(source, {f"new{time.monotonic_ns()}": b"y"})

    monkeypatch.setattr(cache_archive, "_write", while_compiling)
    with pytest.raises(ArchiveError, match="have changed while they were read, 3 times"):
        packed(source)


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = packed(write(tmp_path / "a", {"x": b"x", "y": b"y"}))
    monkeypatch.setattr(cache_archive, "MOST_FILES", 1)
    with pytest.raises(ArchiveError, match="too many"):
        packed(tmp_path / "a")
    (tmp_path / "b").mkdir()
    with pytest.raises(ArchiveError, match="more than 1 files"):
        unpack(io.BytesIO(data), str(tmp_path / "b"))


@pytest.mark.parametrize("change", [lambda data: data[:-1] + b"!", lambda data: data + b"!", lambda data: data[:-1]])
def test_other_bytes_than_the_index_says_are_refused(change: Callable[[bytes], bytes]) -> None:
    import hashlib

    data = b"code" * 100
    digest = hashlib.sha256(data).hexdigest()
    copy_checked(io.BytesIO(data), io.BytesIO(), len(data), digest)
    with pytest.raises(ArchiveError, match="other bytes than its index says"):
        copy_checked(io.BytesIO(change(data)), io.BytesIO(), len(data), digest)


# on the shared file system

KEY = {"engine": "trtllm", "gpus": [["H200", 90, "580"]]}


def saved(tmp_path: Path, target: Path, files: Files) -> list[Any]:
    folder = tmp_path / "rank"
    folder.mkdir(exist_ok=True)
    answer = handle({"do": "save", "folder": str(write(folder, files)), "target": str(target)})
    assert "problem" not in answer, answer
    part: list[Any] = answer["part"]
    return part


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Path, list[Any]]:
    """An archive of one rank, in a folder of this user's."""
    target = tmp_path / "shared" / "dynamo-mpi-0" / "M-1"
    part = saved(tmp_path, target, {"triton/k": b"k" * 1000})
    assert handle({"do": "publish", "target": str(target), "key": KEY, "parts": [part]}) == {"removed": 0}
    return target, part


def seed(tmp_path: Path, target: Path, part: list[Any]) -> dict[str, Any]:
    into = tmp_path / "into"
    into.mkdir(exist_ok=True)
    return handle({"do": "seed", "source": str(target), "part": part, "folder": str(into)})


def test_what_is_written_back_is_found_and_seeds_and_nothing_new_is_not_written_again(
    tmp_path: Path, archive: tuple[Path, list[Any]]
) -> None:
    target, part = archive
    found = handle(
        {"do": "look", "folders": [str(tmp_path / "no"), str(target)], "key": KEY, "ranks": 1, "worker": "w"}
    )
    assert found == {"folder": str(target), "parts": [part], "failed": False, "skipped": []}
    assert seed(tmp_path, target, part)["files"] == 1
    again = {"do": "save", "folder": str(tmp_path / "into"), "target": str(target)}
    assert handle(again) == {"part": part, "new": 0, "written": False, "json": []}
    # logs grow at each start
    write(tmp_path / "into", {"flashinfer/flashinfer_jit.log": b"x", "flashinfer/op/.ninja_log": b"x"})
    assert handle(again)["new"] == 0
    write(tmp_path / "into", {"triton/k2": b"k"})
    more = handle(again)
    assert more["new"] == 1 and more["part"] != part
    handle({"do": "publish", "target": str(target), "key": KEY, "parts": [more["part"]]})
    names = set(os.listdir(target))
    # a worker that starts now may still read the one before
    assert {f"{part[0]}.tar", f"{more['part'][0]}.tar", "index.json", "previous.json"} == names
    old = time.time() - 4000
    for name in names:
        os.utime(target / name, (old, old))
    (target / ".part-left").touch()
    os.utime(target / ".part-left", (old, old))
    assert handle({"do": "publish", "target": str(target), "key": KEY, "parts": [more["part"]]}) == {"removed": 2}
    assert set(os.listdir(target)) == {f"{more['part'][0]}.tar", "index.json", "previous.json"}


def test_an_index_of_something_else_or_none_is_refused(archive: tuple[Path, list[Any]]) -> None:
    target, _ = archive
    look(str(target), KEY, 1)
    for other, ranks in (({**KEY, "engine": "x"}, 1), (KEY, 2)):
        with pytest.raises(ArchiveError, match="another engine"):
            look(str(target), other, ranks)
    for content in ("", "[]", '{"version": 2}', '{"version": 1, "key": {}, "parts": [["../../x", 1, 1]]}'):
        (target / "index.json").write_text(content)
        with pytest.raises(ArchiveError, match="no index of this version"):
            look(str(target), KEY, 1)


def test_a_part_that_is_changed_or_gone_seeds_nothing(tmp_path: Path, archive: tuple[Path, list[Any]]) -> None:
    target, part = archive
    file = target / f"{part[0]}.tar"
    file.write_bytes(file.read_bytes().replace(b"kkkk", b"evil", 1))
    assert "other bytes than its index says" in seed(tmp_path, target, part)["problem"]
    assert os.listdir(tmp_path / "into") == []
    file.unlink()
    assert "No such file" in seed(tmp_path, target, part)["problem"]


@pytest.mark.parametrize("which", ["file", "index", "folder", "above"])
def test_what_others_can_write_is_refused_with_the_reason(
    tmp_path: Path, archive: tuple[Path, list[Any]], which: str
) -> None:
    target, part = archive
    paths = {
        "file": target / f"{part[0]}.tar",
        "index": target / "index.json",
        "folder": target,
        "above": target.parent,
    }
    path = paths[which]
    for bits in (0o020, 0o002):
        usual = path.stat().st_mode & 0o777
        path.chmod(usual | bits)
        looked = handle({"do": "look", "folders": [str(target)], "key": KEY, "ranks": 1, "worker": "w"})
        answer = seed(tmp_path, target, part) if which == "file" else looked
        assert answer["refused"] and str(path) in answer["problem"] and str(path) in answer["fix"], answer
        assert answer["fix"].startswith("chmod ")
        assert answer["expected"] == "files and folders that only this user or root could have written"
        assert "write" in answer["problem"]
        path.chmod(usual)
    assert "problem" not in seed(tmp_path, target, part)


@needs_root
def test_what_another_user_has_is_refused_and_root_s_is_taken(tmp_path: Path, archive: tuple[Path, list[Any]]) -> None:
    target, part = archive
    os.chown(target / f"{part[0]}.tar", NOBODY, NOBODY)
    assert f"belongs to user {NOBODY}" in seed(tmp_path, target, part)["problem"]
    os.chown(target / f"{part[0]}.tar", 0, 0)
    assert "problem" not in seed(tmp_path, target, part)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that other users reach."""
    folder = Path(tempfile.mkdtemp(prefix="caches-"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def archive_in(shared: Path) -> None:
    """Write this user's archive, of one rank; others can read it, whatever the umask of the tests is."""
    before = os.umask(0o022)
    target = Path(folders_of(str(shared), "M-1")[0])
    rank = shared / f"rank-{os.geteuid()}"
    rank.mkdir()
    part = saved(rank, target, {"triton/k": b"k"})
    assert handle({"do": "publish", "target": str(target), "key": KEY, "parts": [part]}) == {"removed": 0}
    os.umask(before)


def looked_up(shared: Path) -> dict[str, Any]:
    return handle({"do": "look", "folders": folders_of(str(shared), "M-1"), "key": KEY, "ranks": 1, "worker": "w"})


@needs_root
def test_root_s_archive_is_read_by_other_users(shared: Path) -> None:
    archive_in(shared)

    def use_it() -> None:
        found = looked_up(shared)
        assert found["folder"] == f"{shared}/dynamo-mpi-0/M-1" and found["skipped"] == [], found
        # where no note of the start can be kept, a restart isn't seeded
        assert found["failed"]
        into = shared / "nobody"
        into.mkdir()
        request = {"do": "seed", "source": found["folder"], "part": found["parts"][0], "folder": str(into)}
        assert handle(request)["files"] == 1

    as_neighbour(use_it)
    (shared / "dynamo-mpi-0/M-1/index.json").chmod(0o600)
    as_neighbour(lambda: expect(looked_up(shared), {"skipped": []}))
    (shared / "dynamo-mpi-0").chmod(0o700)
    as_neighbour(lambda: expect(looked_up(shared), {"skipped": []}))


def expect(found: object, right: object) -> None:
    assert found == right


@needs_root
def test_a_stranger_s_folder_in_place_of_root_s_is_skipped_with_one_line(shared: Path) -> None:
    archive_in(shared)
    os.chown(shared / "dynamo-mpi-0", 12345, 12345)

    def look_twice() -> None:
        (line,) = looked_up(shared)["skipped"]
        assert line.startswith(f"{shared}/dynamo-mpi-0 belongs to user 12345"), line
        archive_in(shared)
        assert looked_up(shared)["folder"] == f"{shared}/dynamo-mpi-{NOBODY}/M-1"

    as_neighbour(look_twice)


@needs_root
def test_a_stranger_s_folder_in_place_of_this_user_s_is_refused_and_root_s_is_used(shared: Path) -> None:
    archive_in(shared)
    theirs = shared / f"dynamo-mpi-{NOBODY}"
    (theirs / "M-1").mkdir(parents=True)
    os.chown(theirs, 12345, 12345)

    def look_up() -> None:
        found = looked_up(shared)
        assert found["refused"] and "belongs to user 12345" in found["problem"]
        assert found["folder"] == f"{shared}/dynamo-mpi-0/M-1"

    as_neighbour(look_up)


def within_a_namespace_as_its_root() -> bool:
    """Become root of a user namespace, as in a container; return whether that is allowed here."""
    outside = os.geteuid()
    library = ctypes.CDLL(None)
    # after setuid(2), /proc/self is root's
    library.prctl(4, 1, 0, 0, 0)
    if library.unshare(0x10000000):
        return False
    Path("/proc/self/uid_map").write_text(f"0 {outside} 1")
    folder_walk._outside.cache_clear()
    return True


def require_namespaces() -> None:
    try:
        as_neighbour(lambda: expect(within_a_namespace_as_its_root(), right=True))
    except AssertionError:
        pytest.skip("user namespaces aren't allowed here")


@needs_root
def test_users_whom_their_containers_show_as_root_have_folders_of_their_own(shared: Path) -> None:
    for user in (shared / "dynamo-mpi-0", shared / f"dynamo-mpi-{NOBODY - 1}"):
        (user / "M-1").mkdir(parents=True)
        os.chown(user, 12345, 12345)

    def in_a_container() -> None:
        assert within_a_namespace_as_its_root()
        assert os.geteuid() == 0 and user_folder() == f"dynamo-mpi-{NOBODY}"
        archive_in(shared)
        assert looked_up(shared)["folder"] == f"{shared}/dynamo-mpi-{NOBODY}/M-1"
        assert (shared / f"dynamo-mpi-{NOBODY}").stat().st_mode & 0o777 == 0o700
        claimed = claim(str(shared), "M-r0")
        assert claimed.path == f"{shared}/dynamo-mpi-caches-{NOBODY}/M-r0"
        claimed.remove()

    require_namespaces()
    as_neighbour(in_a_container)


@needs_root
@pytest.mark.parametrize(("mode", "is_taken"), [(0o1777, False), (0o755, True)])
def test_in_a_container_root_s_archive_is_taken_where_no_other_user_could_have_made_it(
    shared: Path, mode: int, is_taken: bool
) -> None:
    archive_in(shared)
    shared.chmod(mode)

    def in_a_container() -> None:
        assert within_a_namespace_as_its_root()
        found = looked_up(shared)
        assert ("folder" in found) == is_taken and len(found["skipped"]) == (not is_taken), found

    require_namespaces()
    as_neighbour(in_a_container)


def test_a_link_of_an_archive_is_not_followed(tmp_path: Path, archive: tuple[Path, list[Any]]) -> None:
    target, part = archive
    file = target / f"{part[0]}.tar"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert "is a link" in seed(tmp_path, target, part)["problem"]


def test_writing_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(_: Any) -> tuple[str, int]:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        cache_store.write_part(str(tmp_path / "t"), fail)
    assert os.listdir(tmp_path / "t") == []


def test_two_workers_that_write_at_once_leave_one_whole_archive(tmp_path: Path) -> None:
    target = tmp_path / "t"
    first = [Part(*saved(tmp_path, target, {"triton/a": b"a"}))]
    second = [Part(*saved(tmp_path, target, {"triton/b": b"b"}))]
    publish(str(target), KEY, second)
    publish(str(target), KEY, first)
    found = look(str(target), KEY, 1)
    assert found is not None and list(found.parts) == first
    assert (target / f"{second[0].digest}.tar").exists()


def test_a_part_that_is_gone_is_not_published(tmp_path: Path, archive: tuple[Path, list[Any]]) -> None:
    target, part = archive
    index = (target / "index.json").read_bytes()
    # another worker's archive replaced the one of which this rank keeps its part
    other = saved(tmp_path, target, {"triton/b": b"b"})
    (target / f"{part[0]}.tar").unlink()
    answer = handle({"do": "publish", "target": str(target), "key": KEY, "parts": [other, part]})
    assert answer["problem"].endswith(f"{part[0]}.tar is gone")
    assert (target / "index.json").read_bytes() == index and not (target / "previous.json").exists()
    (target / f"{part[0]}.tar").write_bytes(b"short")
    answer = handle({"do": "publish", "target": str(target), "key": KEY, "parts": [other, part]})
    assert "has 5 bytes, not" in answer["problem"]


def test_what_is_written_and_not_published_is_removed_at_once(tmp_path: Path, archive: tuple[Path, list[Any]]) -> None:
    target, part = archive
    before = set(os.listdir(target))
    written = saved(tmp_path, target, {"triton/b": b"b"})
    # another worker is about to publish it
    young = saved(tmp_path, target, {"triton/c": b"c"})
    (target / ".part-left").touch()
    os.utime(target / ".part-left", (1, 1))
    # the part that the index names stays, whatever is asked
    request = {"do": "discard", "target": str(target), "digests": [written[0], part[0]]}
    assert handle(request) == {"removed": 2}
    assert set(os.listdir(target)) == before | {f"{young[0]}.tar"}


def test_a_start_that_did_not_come_to_serve_is_known_to_the_next(
    tmp_path: Path, archive: tuple[Path, list[Any]]
) -> None:
    target, part = archive

    def may_have_failed(worker: str) -> bool:
        request = {"do": "look", "folders": [str(target)], "key": KEY, "ranks": 1, "worker": worker}
        return bool(handle(request)["failed"])

    into = tmp_path / "into"
    into.mkdir()
    handle({"do": "seed", "source": str(target), "part": part, "folder": str(into), "worker": "ns.a"})
    assert may_have_failed("ns.a") and not may_have_failed("ns.b")
    handle({"do": "forget", "source": str(target), "worker": "ns.a"})
    assert not may_have_failed("ns.a")


# a rank's folder


def test_a_folder_is_one_process_s_until_it_ends_and_another_gets_the_next(tmp_path: Path) -> None:
    first, second = claim(str(tmp_path), "M-r0"), claim(str(tmp_path), "M-r0")
    assert (first.slot, second.slot) == (0, 1) and second.path == f"{first.path}-s1"
    remove_claimed(first.path)
    assert os.path.isdir(first.path)
    write(Path(first.path), {"triton/k": b"k"})
    first.clear()
    assert os.listdir(first.path) == [LOCK]
    first.remove()
    first.remove()
    assert os.listdir(os.path.dirname(second.path)) == ["M-r0-s1"]
    third = claim(str(tmp_path), "M-r0")
    assert third.slot == 0
    second.remove()
    third.remove()
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    code = f"from dynamo_mpi.common.claimed_folder import claim\nimport os\np = claim({str(tmp_path)!r}, 'M-r0').path\n"
    code += "os.makedirs(p + '/triton/k')\nprint(p, flush=True)\nos.kill(os.getpid(), 9)\n"
    killed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False, text=True)
    path = killed.stdout.strip()
    assert os.path.isdir(f"{path}/triton")
    other = claim(str(tmp_path), "N-r0")
    assert not os.path.exists(path)
    other.remove()
    assert os.listdir(tmp_path) == []


def test_the_folder_of_a_killed_rank_is_removed_at_once(tmp_path: Path) -> None:
    claimed = claim(str(tmp_path), "M-r0")
    os.close(claimed._lock)
    remove_claimed(claimed.path)
    assert os.listdir(tmp_path) == []
    # nothing else is
    (tmp_path / "mine").mkdir()
    remove_claimed(str(tmp_path / "mine"))
    assert os.listdir(tmp_path) == ["mine"]


def test_a_folder_where_others_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UnsafeFileError):
        claim(str(tmp_path / "open"), "M-r0")


def claimed_in(bases: Sequence[Path | str], ranks: int = 1, **environ: str) -> tuple[str, str]:
    """Return the base that is taken, and otherwise why none is."""
    folder, problem = claim_folder([str(base) for base in bases], "M-r0", environ, ranks)
    if folder is None:
        return "", problem
    folder.remove()
    return os.path.dirname(os.path.dirname(folder.path)), problem


def test_only_a_disk_of_this_node_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert claimed_in([tmp_path]) == (str(tmp_path), "")
    assert claimed_in([tmp_path / "new"]) == (str(tmp_path / "new"), "")
    assert f"there is no {tmp_path}/scrtch, and only the last" in claimed_in([tmp_path / "scrtch" / "me"])[1]
    (tmp_path / "file").touch()
    assert claimed_in(["/proc/none", tmp_path / "file" / "x", tmp_path]) == (str(tmp_path), "")
    monkeypatch.setattr(
        cache_folder, "file_system_type", lambda path: "nfs4" if path.endswith("s") else "fuse.fuse-overlayfs"
    )
    assert claimed_in([tmp_path / "s"]) == ("", f"{tmp_path}/s is on a shared file system (nfs4)")
    assert claimed_in([tmp_path / "s", tmp_path]) == (str(tmp_path), "")
    # all ranks of a node see the same free bytes
    monkeypatch.setattr(cache_folder, "free_bytes", lambda _: 3 << 29)
    assert claimed_in([tmp_path]) == (str(tmp_path), "")
    assert claimed_in([tmp_path], 2) == ("", f"{tmp_path} has too little room: 1.5 GiB of 2.0 GiB for 2 ranks")


@pytest.mark.parametrize(("kind", "count"), [("tmpfs", 1), ("ext4", 0)])
def test_folders_in_memory_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, count: int) -> None:
    monkeypatch.setattr(cache_session, "file_system_type", lambda _: kind)
    session = CacheSession(0, CachePlan("M-1", (str(tmp_path),)), {}, lambda _: None)
    session.begin()
    seeding = session.finish(cast("World", OneRank()))
    session.remove()
    assert seeding is not None and seeding.in_memory == count


def test_where_no_folder_can_be_claimed_the_next_base_is_taken(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "good").mkdir()
    assert claimed_in([tmp_path / "open", tmp_path / "good"]) == (str(tmp_path / "good"), "")
    base, problem = claimed_in([tmp_path / "open"])
    assert base == "" and problem.startswith(f"{tmp_path}/open can be written by its group; chmod g-w ")


def test_each_rank_takes_its_own_tmpdir_and_makes_none(tmp_path: Path) -> None:
    bases = bases_for("auto")
    assert bases == bases_for("none") == (OWN_TMPDIR, "/tmp") and bases_for("/local")[0] == "/local"
    (tmp_path / "job").mkdir()
    assert claimed_in(bases[:1], TMPDIR=str(tmp_path / "job")) == (str(tmp_path / "job"), "")
    assert claimed_in([OWN_TMPDIR, tmp_path], TMPDIR=str(tmp_path / "none")) == (str(tmp_path), "")
    assert claimed_in([OWN_TMPDIR, tmp_path], TMPDIR="relative") == claimed_in([OWN_TMPDIR, tmp_path])
    assert not (tmp_path / "none").exists()
    # what --stage names is made, as by staging
    assert claimed_in([tmp_path / "stage"]) == (str(tmp_path / "stage"), "")


def test_the_room_to_unpack_is_for_all_ranks_of_the_node(
    tmp_path: Path, archive: tuple[Path, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, part = archive
    monkeypatch.setattr(cache_helper, "free_bytes", lambda _: 1 << 30)
    request = {"do": "seed", "source": str(target), "part": part, "folder": str(tmp_path)}
    answer = handle({**request, "ranks": 8})
    assert "has too little room: 1.0 GiB of 2.0 GiB" in answer["problem"] and "another disk" in answer["fix"]
    assert "problem" not in handle({**request, "ranks": 2})


# a rank


def test_a_rank_has_its_folders_whether_it_is_seeded_or_not_until_it_ends(
    tmp_path: Path, archive: tuple[Path, list[Any]]
) -> None:
    target, part = archive
    cubins = tmp_path / "home/.cache/flashinfer/cubins"
    cubins.mkdir(parents=True)
    for source, parts in (("", ()), (str(target), (Part(*part),))):
        environ = dict(os.environ) | {"HOME": str(tmp_path / "home"), ROOT_VARIABLE: ""}
        plan = CachePlan("M-1", (str(tmp_path),), source, parts, str(target))
        assert CachePlan.unpack(plan.pack()) == plan
        session = CacheSession(0, plan, environ, lambda _: None)
        session.begin()
        seeding = session.finish(cast("World", OneRank()))
        assert seeding is not None and seeding.problems == ()
        assert (seeding.seeded, seeding.files) == (bool(parts), len(parts))
        assert all(os.path.isdir(environ[library.variable]) for library in LIBRARIES if not library.is_json)
        assert os.path.isdir(os.path.dirname(environ["TLLM_AUTOTUNER_CACHE_PATH"]))
        # downloaded, and often not to be had on a node
        assert environ["FLASHINFER_CUBIN_DIR"] == str(cubins)
        assert os.path.exists(f"{environ['TRITON_CACHE_DIR']}/../triton/k") == bool(parts)
        write(Path(environ["TRITON_CACHE_DIR"]), {"new": b"new"})
        assert session.save()["new"] == 1
        session.remove()
        assert not os.path.exists(environ["TRITON_CACHE_DIR"]) and session.is_over
        assert session.save()["problem"] == "it has ended"
    assert [name for name in os.listdir(tmp_path) if "caches" in name] == []


class OneOfTwo(OneRank):
    """Rank 0 of a world of two, whose rank 1 answers as given."""

    size = 2

    def __init__(self, other: dict[str, Any]) -> None:
        self.other = other

    def gather(self, data: bytes) -> list[bytes]:
        return [data, json.dumps({"slot": 0, "folder": True} | self.other).encode()]


@pytest.fixture
def with_tactics(tmp_path: Path) -> CachePlan:
    """A plan with an archive whose parts have tactics."""
    target = tmp_path / "shared" / "dynamo-mpi-0" / "M-1"
    part = Part(*saved(tmp_path, target, {"triton/k": b"k", "autotuner/cache.json": b'{"rank_0": {}}'}))
    publish(str(target), KEY, [part, part])
    return CachePlan("M-1", (str(tmp_path),), str(target), (part, part), str(target), "ns.a")


@pytest.mark.parametrize(
    ("other", "seeded", "writes", "problem"),
    [
        ({"json": ["autotuner/cache.json"]}, True, True, ""),
        ({"json": []}, False, True, "autotuner/cache.json is missing or not whole on rank 1, not on the others"),
        ({"problem": "n2: no", "expected": "e", "fix": "f"}, False, True, "n2: no"),
        # what it would write could never be published
        ({"problem": "n2: no", "expected": "e", "fix": "f", "folder": False}, False, False, "n2: no"),
    ],
)
def test_all_ranks_have_tactics_or_none(
    with_tactics: CachePlan, other: dict[str, Any], seeded: bool, writes: bool, problem: str
) -> None:
    environ = dict(os.environ) | {ROOT_VARIABLE: ""}
    session = CacheSession(0, with_tactics, environ, lambda _: None)
    session.begin()
    seeding = session.finish(cast("World", OneOfTwo(other)))
    assert seeding is not None
    assert (seeding.seeded, session.writes) == (seeded, writes)
    assert [each.problem for each in seeding.problems] == [problem] * bool(problem)
    assert os.path.exists(environ["TLLM_AUTOTUNER_CACHE_PATH"]) == seeded
    session.remove()


def test_a_rank_that_can_t_make_its_folders_reports_it_before_the_ranks_agree(
    with_tactics: CachePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = dict(os.environ) | {ROOT_VARIABLE: ""}
    session = CacheSession(0, with_tactics, environ, lambda _: None)
    session.begin()
    real = os.makedirs

    def full(path: str, *rest: Any, **more: Any) -> None:
        if "inductor" in path:
            raise OSError(28, "No space left on device", path)
        real(path, *rest, **more)

    monkeypatch.setattr(os, "makedirs", full)
    seeding = session.finish(cast("World", OneOfTwo({"json": ["autotuner/cache.json"]})))
    assert seeding is not None and not seeding.seeded
    assert "inductor: No space left on device" in seeding.problems[0].problem
    # nor are they made afterwards: the libraries are left alone, and nothing is written
    assert "TLLM_AUTOTUNER_CACHE_PATH" not in environ.keys() - os.environ.keys()
    assert "No space left" in session.save()["problem"]
    session.remove()


def test_tactics_that_are_not_whole_are_reported_with_what_was_written(tmp_path: Path) -> None:
    target, folder = tmp_path / "t", tmp_path / "rank"
    write(folder, {"triton/k": b"k", "autotuner/cache.json": b'{"rank_0": {'})
    request = {"do": "save", "folder": str(folder), "target": str(target)}
    broken = handle(request)
    write(folder, {"autotuner/cache.json": b'{"rank_0": {}}'})
    whole = handle(request)
    assert (broken["json"], whole["json"]) == ([], ["autotuner/cache.json"])
    unlike = unlike_json([whole, broken, whole, broken])
    assert unlike is not None and "not whole on ranks 1, 3," in unlike.problem
    assert unlike_json([whole, whole]) is None and unlike_json([broken, broken]) is None


def test_a_rank_without_a_folder_leaves_the_libraries_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environ: dict[str, str] = {}
    session = CacheSession(0, CachePlan("M-1", (str(tmp_path / "file" / "x"),)), environ, lambda _: None)
    session.begin()
    seeding = session.finish(cast("World", OneRank()))
    assert seeding is not None and not seeding.seeded and not session.writes
    (problem,) = seeding.problems
    assert "no folder for compile caches" in problem.problem and problem.fix == "name one with --stage or TMPDIR"
    assert environ == {}
    session.remove()


def test_ending_a_session_takes_no_time_for_its_files(tmp_path: Path) -> None:
    session = CacheSession(0, CachePlan("M-1", (str(tmp_path),), target=str(tmp_path / "t")), {}, lambda _: None)
    session.begin()
    session.finish(cast("World", OneRank()))
    session.end()
    # other ranks wait at this moment: the files are removed when none does
    assert list(tmp_path.glob("dynamo-mpi-caches-*/M-1-r0/triton"))
    assert session.save()["problem"] == "it has ended"
    session.remove()
    assert os.listdir(tmp_path) == []
    # nor does a failure's report wait for it: the node agent removes them
    assert LeaderCaches.on_exit is WorkerHook.on_exit


# messages


def test_several_problems_are_one_message_with_the_fix_of_each() -> None:
    rights = Problem.of(UnsafeFileError("/s/a", "is a folder that others can write", "chmod 700 /s/a"))
    room = Problem.of(OSError(28, "No space left on device", "/s/b"))
    assert Problem.in_answer(rights._asdict()) == rights and Problem.in_answer({"part": []}) is None
    joined = Problem.joined([rights, room])
    assert joined.problem == "/s/a is a folder that others can write; /s/b: No space left on device"
    assert joined.fix == "chmod 700 /s/a; correct its rights or make room"
    many = Problem.joined([room._replace(problem=f"n{number}: no") for number in range(5)])
    assert many.problem == "n0: no; n1: no; n2: no; and 2 more"
    assert (many.expected, many.fix) == (room.expected, room.fix)


# the helper process


def test_a_helper_answers_or_is_given_up(tmp_path: Path, archive: tuple[Path, list[Any]]) -> None:
    target, part = archive
    request = {"do": "look", "folders": [str(target)], "key": KEY, "ranks": 1, "worker": "w"}
    assert HelperCall(request, os.environ).result(20.0) == {
        "folder": str(target),
        "parts": [part],
        "failed": False,
        "skipped": [],
    }
    assert "has ended without an answer" in HelperCall({"do": "seed"}, os.environ).result(20.0)["problem"]
    stopped = HelperCall(request, os.environ)
    assert stopped._process is not None
    stopped._process.popen.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert stopped.result(0.2)["problem"] == "no answer within 0.2 s: the shared file system may hang"
    assert time.monotonic() - began < 5
    assert stopped._process.exit_code() is not None
