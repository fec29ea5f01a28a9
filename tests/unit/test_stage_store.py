# SPDX-License-Identifier: Apache-2.0
"""Staging on one node: what identifies a model, its copies and their locks, room, and who reads what."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import socket
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from dynamo_mpi.common.cgroup import CgroupLimits
from dynamo_mpi.stage import manifest as manifests
from dynamo_mpi.stage.digest import digest_of
from dynamo_mpi.stage.helper import Helper, HelperPlan
from dynamo_mpi.stage.holdings import Holdings
from dynamo_mpi.stage.manifest import MAX_EXTENT, MIN_EXTENT, Manifest, SourceChangedError, SourceFile, StageError, scan
from dynamo_mpi.stage.partial import PartialCopy
from dynamo_mpi.stage.pool import SLOW_SECONDS, WAY_SECONDS, Pool
from dynamo_mpi.stage.store import LOCK, MARKER, PARTIAL, State, Store
from dynamo_mpi.stage.wire import Peer

MIB = 1 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "Llama"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "empty").touch()
    (folder / "sub" / "weights.safetensors").write_bytes(os.urandom(9 * MIB))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").touch()
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "local"))


def copy(store: Store, manifest: Manifest) -> int:
    """Make a copy as a node alone does; return its lock, shared."""
    lock = store.open_lock(manifest.folder_name)
    assert store.take(lock, manifest) is State.MISSING
    part = PartialCopy(store, manifest)
    digests = []
    for file, offset, length in manifest.extents():
        data = (Path(manifest.source) / manifest.files[file].path).read_bytes()[offset : offset + length]
        part.write(file, offset, memoryview(data))
        digests.append(digest_of(part.files.descriptor(file), offset, length))
    for number in range(len(manifest.files)):
        part.sync(number)
    part.publish(tuple(digests))
    store.share(lock)
    return lock


# -- the model ----------------------------------------------------------------------------------------------------------


def test_a_manifest_has_all_files_but_hidden_ones_and_survives_json(model: Path) -> None:
    manifest = scan(str(model))
    assert [file.path for file in manifest.files] == ["config.json", "empty", "sub/weights.safetensors"]
    assert manifest.size == 9 * MIB + 2
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.folder_name.startswith("Llama-")


def test_extents_cover_each_byte_once_and_grow_with_the_model(model: Path) -> None:
    manifest = scan(str(model))
    assert [(extent.file, extent.offset, extent.length) for extent in manifest.extents()] == [
        (0, 0, 2),
        (2, 0, 8 * MIB),
        (2, 8 * MIB, MIB),
    ]
    assert manifests.extent_bytes_for(1 << 30) == MIN_EXTENT
    assert manifests.extent_bytes_for(700 << 30) == MAX_EXTENT


def test_another_version_of_a_model_has_another_folder(model: Path) -> None:
    before = scan(str(model)).folder_name
    os.utime(model / "config.json", ns=(1, 1))
    changed = scan(str(model)).folder_name
    (model / "more").touch()
    assert len({before, changed, scan(str(model)).folder_name}) == 3


def test_a_snapshot_of_the_hub_is_copied_with_the_names_of_its_blobs(tmp_path: Path) -> None:
    root = tmp_path / "models--org--Name"
    snapshot, blobs = root / "snapshots" / "abc", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "f00").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/f00")
    manifest = scan(str(snapshot))
    assert (manifest.files[0].path, manifest.files[0].blob) == ("config.json", "f00")
    assert manifest.folder_name.startswith("org--Name-")


@pytest.mark.parametrize("target", ["/etc/passwd", "../other/file"])
def test_a_link_that_leaves_the_model_is_refused(model: Path, target: str) -> None:
    (model.parent / "other").mkdir()
    (model.parent / "other" / "file").touch()
    (model / "link.json").symlink_to(target)
    with pytest.raises(StageError, match=r"link\.json is a link that leaves the model's folder"):
        scan(str(model))


def test_what_is_no_regular_file_is_refused(model: Path) -> None:
    os.mkfifo(model / "pipe")
    with pytest.raises(StageError, match="pipe is no regular file"):
        scan(str(model))


@pytest.mark.parametrize("change", ["time", "size", "new", "gone"])
def test_a_change_of_the_model_names_the_file(model: Path, change: str) -> None:
    manifest = scan(str(model))
    manifests.require_all_unchanged(manifest)
    if change == "time":
        os.utime(model / "config.json", ns=(1, 1))
    elif change == "size":
        (model / "config.json").write_text("{ }")
    elif change == "new":
        (model / "added.json").touch()
    else:
        (model / "empty").unlink()
    name = {"new": r"added\.json is new", "gone": "empty is gone"}.get(change, r"config\.json has changed")
    with pytest.raises(SourceChangedError, match=name):
        manifests.require_all_unchanged(manifest)


# -- the store ----------------------------------------------------------------------------------------------------------


def test_a_copy_is_the_model_with_its_times_and_only_its_owner_may_read_it(model: Path, store: Store) -> None:
    manifest = scan(str(model))
    os.close(copy(store, manifest))
    path = Path(store.copy_path(manifest.folder_name))
    for file in manifest.files:
        assert (path / file.path).read_bytes() == (model / file.path).read_bytes()
        assert (path / file.path).stat().st_mtime_ns == file.mtime_ns
        assert not (path / file.path).is_symlink()
    assert {each.stat().st_mode & 0o077 for each in [Path(store.path), path, *path.rglob("*")]} == {0}
    assert store.is_complete(manifest, digests=True)


def test_nothing_is_visible_before_it_is_published(model: Path, store: Store) -> None:
    manifest = scan(str(model))
    lock = store.open_lock(manifest.folder_name)
    assert store.take(lock, manifest) is State.MISSING
    part = PartialCopy(store, manifest)
    part.write(0, 0, memoryview(b"{}"))
    assert not os.path.exists(store.copy_path(manifest.folder_name))
    assert not store.is_complete(manifest)
    part.discard()
    assert not any(name.startswith(PARTIAL) for name in os.listdir(store.path))
    os.close(lock)


def test_a_second_worker_waits_for_the_first_one_s_copy_and_then_shares_it(model: Path, store: Store) -> None:
    manifest = scan(str(model))
    first, second = (store.open_lock(manifest.folder_name) for _ in range(2))
    assert store.take(first, manifest) is State.MISSING
    assert store.take(second, manifest) is State.BUSY
    os.close(first)  # as if it were killed
    assert store.take(second, manifest) is State.MISSING
    os.close(second)
    lock = copy(store, manifest)
    third = store.open_lock(manifest.folder_name)
    assert store.take(third, manifest) is State.COMPLETE
    os.close(lock)
    os.close(third)


@pytest.mark.parametrize("damage", ["size", "time", "missing", "link", "marker"])
def test_a_damaged_copy_is_made_again(model: Path, store: Store, damage: str) -> None:
    manifest = scan(str(model))
    os.close(copy(store, manifest))
    path = Path(store.copy_path(manifest.folder_name))
    file = path / "config.json"
    if damage == "size":
        file.chmod(0o600)
        file.write_text("{  }")
    elif damage == "time":
        os.utime(file, ns=(1, 1))
    elif damage == "marker":
        (path / MARKER).unlink()
    else:
        file.unlink()
        if damage == "link":
            file.symlink_to(model / "config.json")
    lock = store.open_lock(manifest.folder_name)
    assert store.take(lock, manifest) is State.MISSING
    os.close(lock)


def test_wrong_bytes_of_the_right_size_are_found_by_digests(model: Path, store: Store) -> None:
    manifest = scan(str(model))
    os.close(copy(store, manifest))
    file = Path(store.copy_path(manifest.folder_name)) / "config.json"
    before = file.stat().st_mtime_ns
    file.chmod(0o600)
    file.write_bytes(b"[]")
    os.utime(file, ns=(before, before))
    lock = store.open_lock(manifest.folder_name)
    assert store.take(lock, manifest) is State.COMPLETE
    assert store.take(lock, manifest, digests=True) is State.MISSING
    os.close(lock)


def test_the_least_recently_used_copies_make_room_but_never_one_in_use(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[tuple[str, int]] = []
    for name in ("a", "b", "c"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "w").write_bytes(bytes(1000))
        manifest = scan(str(folder))
        lock = copy(store, manifest)
        os.utime(lock, (len(copies), len(copies)))
        copies.append((manifest.folder_name, lock))
    (_, in_use), *others = copies
    for _, lock in others:
        os.close(lock)
    freed = len(store.entries()) * 1000
    monkeypatch.setattr(Store, "free_bytes", lambda self: freed - sum(e.size for e in self.entries() if e.complete))
    monkeypatch.setattr("dynamo_mpi.stage.store._SPARE_BYTES", 0)
    assert store.make_room(1000, "new") == [copies[1][0]]
    with pytest.raises(StageError, match=rf"needs .*in use and kept: {copies[0][0]}"):
        store.make_room(3000, "new")
    assert [entry.name for entry in store.entries()] == [copies[0][0]]
    os.close(in_use)


def test_what_a_killed_worker_has_left_makes_room_first(model: Path, store: Store) -> None:
    manifest = scan(str(model))
    lock = store.open_lock(manifest.folder_name)
    store.take(lock, manifest)
    PartialCopy(store, manifest).write(0, 0, memoryview(b"{}"))
    (entry,) = store.entries()
    assert (entry.complete, entry.in_use) == (False, True)
    os.close(lock)
    assert store.make_room(1, "other") == []
    assert store.entries() == []


def test_a_folder_that_another_user_could_have_written_is_not_used(tmp_path: Path) -> None:
    Store(str(tmp_path / "local"))
    own = tmp_path / "local" / f"dynamo-mpi-{os.geteuid()}"
    own.chmod(0o777)
    with pytest.raises(StageError, match="a folder that others can write"):
        Store(str(tmp_path / "local"))
    own.rmdir()
    own.symlink_to(tmp_path)
    with pytest.raises(StageError, match="can't be used"):
        Store(str(tmp_path / "local"))


def test_folders_before_it_are_not_created_as_they_may_be_misspelt(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    for name in ("scrtch/me", "scrtch/me/deeper"):
        with pytest.raises(StageError, match=f"{name} can't be used: there is no {tmp_path}/scrtch, and only the last"):
            Store(str(tmp_path / name))
    assert os.listdir(tmp_path) == ["scratch"]
    Store(str(tmp_path / "scratch" / "me")).close()
    assert (tmp_path / "scratch" / "me").is_dir()


def test_a_shared_file_system_is_no_place_for_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_mpi.stage.store.file_system_type", lambda _: "nfs4")
    with pytest.raises(StageError, match=r"on a shared file system \(nfs4\)"):
        Store(str(tmp_path / "local"))


def test_a_removal_that_takes_long_holds_up_no_other_worker(
    model: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = scan(str(model))
    name = manifest.folder_name
    os.close(copy(store, manifest))
    removing, may_end = threading.Event(), threading.Event()

    def slow(path: str, **_: object) -> None:
        if os.path.exists(path):
            removing.set()
            assert may_end.wait(30)
            rmtree(path)

    rmtree = shutil.rmtree
    monkeypatch.setattr("dynamo_mpi.stage.store.shutil.rmtree", slow)
    monkeypatch.setattr("dynamo_mpi.stage.store._MUTEX_SECONDS", 0.0)
    lock, other = store.open_lock(name), store.open_lock("other")
    with ThreadPoolExecutor(1) as pool:
        removed = pool.submit(store.remove, name)
        try:
            assert removing.wait(30)
            assert not os.path.exists(store.copy_path(name)), "it is hidden before its first file goes"
            assert store.take(lock, manifest) is State.BUSY
            assert store.take(other, manifest._replace(source="/other")) is State.MISSING
        finally:
            may_end.set()
        assert removed.result(30)
    assert store.take(lock, manifest) is State.MISSING
    os.close(lock)
    os.close(other)


def test_a_process_that_stopped_with_the_lock_is_waited_for_only_so_long(
    model: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_mpi.stage.store._MUTEX_SECONDS", 0.05)
    held = os.open(os.path.join(store.path, LOCK), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(held, fcntl.LOCK_EX)
    lock = store.open_lock("x")
    with pytest.raises(StageError, match=r"another process has locked .* for 0\.05 s: end or resume it"):
        store.take(lock, scan(str(model)))
    os.close(held)
    assert store.take(lock, scan(str(model))) is State.MISSING
    os.close(lock)


def test_a_lock_that_can_t_be_opened_is_named(model: Path, store: Store) -> None:
    os.mkdir(os.path.join(store.path, LOCK))
    lock = store.open_lock("x")
    with pytest.raises(StageError, match=r"/local/dynamo-mpi-\d+ can't be used: "):
        store.take(lock, scan(str(model)))
    os.close(lock)


def test_memory_has_room_up_to_the_job_s_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = CgroupLimits(memory=100 * MIB, memory_used=30 * MIB)
    monkeypatch.setattr("dynamo_mpi.stage.file_system.read_limits", lambda: limits)
    on_disk = Store(str(tmp_path / "disk"))
    assert on_disk.free_bytes() > 70 * MIB
    for module in ("store", "file_system"):
        monkeypatch.setattr(f"dynamo_mpi.stage.{module}.file_system_type", lambda _: "tmpfs")
    in_memory = Store(str(tmp_path / "memory"))
    assert in_memory.free_bytes() == 70 * MIB
    with pytest.raises(StageError, match=r"\(memory, within the job's limit\) has 0\.1 GiB free"):
        in_memory.make_room(70 * MIB, "new")


def test_a_marker_is_json_with_the_digests(model: Path, store: Store) -> None:
    manifest = scan(str(model))
    os.close(copy(store, manifest))
    marker = json.loads((Path(store.copy_path(manifest.folder_name)) / MARKER).read_text())
    assert marker["source"] == str(model)
    assert [len(digest) for digest in marker["digests"]["crc32"]] == [8, 8, 8]


# -- what arrives ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [b"{}", b"[]"])
def test_what_two_threads_have_written_is_read_again(model: Path, store: Store, other: bytes) -> None:
    manifest = scan(str(model))
    holdings = Holdings(manifest, PartialCopy(store, manifest))
    assert holdings.write(0, 0, memoryview(b"{}"))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(holdings.write, 0, 0, memoryview(other)).result()
    assert holdings.arrived(0, f"{zlib.crc32(b'{}'):08x}")
    assert not holdings.write(0, 0, memoryview(other)), "what is complete isn't touched"
    holdings.close(1)
    if other == b"{}":
        assert not holdings.sync()
    else:
        with pytest.raises(StageError, match=r"config\.json was read or has arrived damaged \(bytes 0 to 2\)"):
            holdings.sync()


def helpers_of(tmp_path: Path, model: Path, count: int, *, fed: bool = False) -> list[Helper]:
    """Return the helpers of a ring of nodes on loopback, each with a folder of its own; the first may feed the others."""
    manifest, token = scan(str(model)), secrets.token_hex(32)
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ring = tuple(Peer(f"n{node}", *listener.getsockname()) for node, listener in enumerate(listeners))
    helpers = []
    for node, listener in enumerate(listeners):
        store = Store(str(tmp_path / f"n{node}"))
        lock = store.open_lock(manifest.folder_name)
        assert store.take(lock, manifest) is (State.COMPLETE if fed and not node else State.MISSING)
        place = (lock, node, ring, ring[0], node == 0, listener.detach(), token, 2, 60.0, False, fed)
        helpers.append(Helper(HelperPlan(str(tmp_path / f"n{node}"), manifest.to_json(), *place), lambda _: None))
    return helpers


@pytest.mark.parametrize(
    ("megabytes", "nodes", "readers"), [(8, 1, 1), (64, 1, 2), (1024, 4, 8), (512, 16, 1), (1 << 20, 512, 8)]
)
def test_of_a_small_model_parts_are_left_while_the_first_ones_travel(megabytes: int, nodes: int, readers: int) -> None:
    model = Manifest("/model", (SourceFile("weights", megabytes << 20, 1),))
    ring = (Peer("n", "127.0.0.1", 1),) * nodes
    plan = HelperPlan("/local", model.to_json(), -1, 0, ring, ring[0], True, -1, "", 8, 60.0)
    assert Helper(plan, lambda _: None)._place().readers == readers


def run_helpers(helpers: list[Helper]) -> list[Callable[[], dict[str, object]]]:
    """Start helpers; return functions that wait for their results."""
    pool = ThreadPoolExecutor(len(helpers))
    futures = [pool.submit(helper.run) for helper in helpers]
    pool.shutdown(wait=False)
    return [partial(future.result, 60) for future in futures]


def test_a_node_that_makes_room_for_long_still_takes_its_neighbour_s_streams(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_room = Store.make_room

    def slowly(self: Store, size: int, name: str) -> list[str]:
        if self.path.startswith(str(tmp_path / "n1")):
            time.sleep(1.5)  # longer than connecting may take
        return make_room(self, size, name)

    monkeypatch.setattr("dynamo_mpi.stage.helper._CONNECT_SECONDS", 1.0)
    monkeypatch.setattr(Store, "make_room", slowly)
    results = [result() for result in run_helpers(helpers_of(tmp_path, model, 2))]
    assert [result["result"] for result in results] == ["done", "done"], results
    for node in range(2):
        assert Store(str(tmp_path / f"n{node}")).is_complete(scan(str(model)), digests=True)


def test_tcp_gives_up_no_stream_while_its_receiver_makes_room(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (model / "more.safetensors").open("wb") as file:
        file.truncate(64 * MIB)  # more than the sockets' buffers take
    make_room = Store.make_room

    def slowly(self: Store, size: int, name: str) -> list[str]:
        if self.path.startswith(str(tmp_path / "n1")):
            time.sleep(3.0)
        return make_room(self, size, name)

    monkeypatch.setattr("dynamo_mpi.stage.wire._USER_TIMEOUT_MS", 500)
    monkeypatch.setattr(Store, "make_room", slowly)
    results = [result() for result in run_helpers(helpers_of(tmp_path, model, 2))]
    assert [result["result"] for result in results] == ["done", "done"], results


def test_a_node_with_a_copy_feeds_the_others(tmp_path: Path, model: Path) -> None:
    manifest = scan(str(model))
    os.close(copy(Store(str(tmp_path / "n0")), manifest))
    helpers = helpers_of(tmp_path, model, 3, fed=True)
    results = [result() for result in run_helpers(helpers)]
    assert [result["result"] for result in results] == ["done"] * 3, results
    assert [result["read_bytes"] for result in results] == [0, 0, 0]
    assert [result["sent_bytes"] for result in results] == [manifest.size, manifest.size, 0]
    for node in range(3):
        assert Store(str(tmp_path / f"n{node}")).is_complete(manifest, digests=True)


def test_a_damaged_copy_is_not_passed_on(tmp_path: Path, model: Path) -> None:
    manifest = scan(str(model))
    store = Store(str(tmp_path / "n0"))
    os.close(copy(store, manifest))
    damaged = Path(store.copy_path(manifest.folder_name)) / "config.json"
    damaged.chmod(0o600)
    damaged.write_bytes(b"[]")
    os.utime(damaged, ns=(manifest.files[0].mtime_ns,) * 2)
    results = [result() for result in run_helpers(helpers_of(tmp_path, model, 2, fed=True))]
    assert [result["result"] for result in results] == ["failed"] * 2
    assert "config.json has arrived damaged from n0 (bytes 0 to 2)" in str(results[0]["text"])
    assert not Store(str(tmp_path / "n1")).is_complete(manifest)


def test_a_cancelled_helper_removes_what_it_has_copied(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second node never has room: the first one has its part, and waits."""
    make_room, may_go_on = Store.make_room, threading.Event()

    def wait(self: Store, size: int, name: str) -> list[str]:
        assert not self.path.startswith(str(tmp_path / "n1")) or may_go_on.wait(30)
        return make_room(self, size, name)

    monkeypatch.setattr(Store, "make_room", wait)
    first, second = helpers_of(tmp_path, model, 2)
    results = run_helpers([first, second])
    own = Path(Store(str(tmp_path / "n0")).path)
    end = time.monotonic() + 30
    while not any(own.glob(f"{PARTIAL}*/sub/*.safetensors")) and time.monotonic() < end:
        time.sleep(0.01)
    assert any(own.glob(f"{PARTIAL}*/sub/*.safetensors"))
    first.cancel()
    may_go_on.set()
    for result in results:
        assert result()["result"] == "failed"
    for node in range(2):
        left = os.listdir(Store(str(tmp_path / f"n{node}")).path)
        assert [name for name in left if not name.startswith(LOCK)] == []


def test_marks_are_seen_and_those_of_killed_ranks_removed(store: Store) -> None:
    old = store.mark()
    os.utime(os.path.join(store.path, old), (1, 1))
    mine = store.mark()
    assert store.has_mark(mine)
    assert not store.has_mark(old)
    assert store.entries() == []
    store.unmark(mine)
    assert not store.has_mark(mine)


def test_no_descriptor_of_the_folder_stays_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    store = Store(str(tmp_path / "local"))
    store.close()
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


# -- who reads what -------------------------------------------------------------------------------------------------------


def test_each_extent_is_handed_out_once() -> None:
    pool = Pool([8, 8, 8])
    assert [pool.next(node, 0.0) for node in (0, 1, 0, 1)] == [0, 1, 2, None]


def test_a_slow_node_s_extent_goes_to_another_one_as_well_but_only_once() -> None:
    pool = Pool([8, 8])
    assert (pool.next(0, 0.0), pool.next(1, 0.0)) == (0, 1)
    pool.done(0, 0.1)
    assert pool.next(0, SLOW_SECONDS / 2) is None
    assert pool.next(1, 2 * SLOW_SECONDS) is None
    assert pool.next(0, 2 * SLOW_SECONDS) == 1
    assert pool.next(2, 9 * SLOW_SECONDS) is None


def test_small_files_say_nothing_about_how_long_an_extent_takes() -> None:
    pool = Pool([1, 8, 8])
    for node in range(3):
        pool.next(node, 0.0)
    pool.done(0, 0.001)
    assert pool.next(0, 100.0) is None


def test_a_starved_node_reads_again_what_others_have_read_long_ago() -> None:
    pool = Pool([8, 8])
    for extent in (0, 1):
        pool.next(0, 0.0)
        pool.done(extent, 0.1)
    assert pool.next(1, 0.2, [1, 0]) is None
    assert pool.next(1, 0.2 + WAY_SECONDS, [1]) == 1
    late = Pool([8])
    late.next(0, 1.0)
    late.done(0, 100.0)
    assert late.next(1, 100.2 + WAY_SECONDS, [0]) is None
    assert late.next(1, 135.0, [0]) == 0


def test_a_reader_gets_no_extent_that_another_one_of_its_node_got() -> None:
    pool = Pool([8, 8], fed=True)
    assert [pool.next(1, 9.0), pool.next(1, 9.0, [1, 0]), pool.next(1, 9.0, [1, 0])] == [None, 1, 0]
    assert [pool.next(1, 9.0, [1, 0]), pool.next(2, 9.0, [1])] == [None, 1]
