# SPDX-License-Identifier: Apache-2.0
"""The digests of extents: what they are, and what becomes of copies and peers of other versions."""

from __future__ import annotations

import json
import os
import queue
import socket
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.stage.digest import ALGORITHM, EARLIER, Crc32, digest_of, is_known
from dynamo_mpi.stage.manifest import Manifest, scan
from dynamo_mpi.stage.partial import PartialCopy
from dynamo_mpi.stage.store import MARKER, State, Store
from dynamo_mpi.stage.wire import Listener, await_ready, send_ready
from dynamo_mpi.supervisor.join import connect
from dynamo_mpi.supervisor.rendezvous import Rendezvous

CONTENT = b"the weights" * 1000
TOKEN = "00" * 32


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "local"))


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(b"{}")
    (tmp_path / "model" / "weights").write_bytes(CONTENT)
    return scan(str(tmp_path / "model"))


def make_copy(store: Store, manifest: Manifest, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
    """Make a copy whose marker is changed afterwards, as one of another version has another; return its folder."""
    part = PartialCopy(store, manifest)
    digests = []
    for file, offset, length in manifest.extents():
        data = Path(manifest.source, manifest.files[file].path).read_bytes()
        part.write(file, offset, memoryview(data))
        digests.append(digest_of(part.files.descriptor(file), offset, length))
        part.sync(file)
    folder = Path(part.publish(tuple(digests)))
    marker = json.loads((folder / MARKER).read_text())
    change(marker)
    (folder / MARKER).chmod(0o600)
    (folder / MARKER).write_text(json.dumps(marker))
    return folder


def as_earlier(marker: dict[str, Any]) -> None:
    """Make a marker as versions with SHA-256 have written it."""
    source = Path(marker["source"])
    paths = [source / path for path, *_ in marker["files"]]
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]
    marker["digests"] = [digest_of(each, 0, 1 << 20, EARLIER) for each in descriptors]
    for each in descriptors:
        os.close(each)


def as_later(marker: dict[str, Any]) -> None:
    """Make a marker as a version with digests of a kind that is unknown now may write it."""
    marker["digests"] = {"blake9": marker["digests"]["crc32"]}


def damage(path: Path) -> None:
    """Change one bit, and neither size nor time."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))


def test_the_digest_is_crc_32_of_all_bytes_whatever_they_come_in(tmp_path: Path) -> None:
    digest = Crc32()
    for part in (b"1234", b"", b"56789"):
        digest.update(memoryview(part))
    # the check value of CRC-32's definition
    assert (ALGORITHM, digest.hexdigest()) == ("crc32", "cbf43926")
    (tmp_path / "file").write_bytes(os.urandom(100) + CONTENT * 200)
    with (tmp_path / "file").open("rb") as file:
        assert digest_of(file.fileno(), 100, 200 * len(CONTENT)) == f"{zlib.crc32(CONTENT * 200):08x}"
        assert digest_of(file.fileno(), 100, 1 << 30) == f"{zlib.crc32(CONTENT * 200):08x}"
        assert digest_of(file.fileno(), 1 << 30, 100) == "00000000"


def test_a_manifest_names_its_algorithm(manifest: Manifest) -> None:
    done = manifest._replace(digests=("cbf43926", "00000000"))
    assert json.loads(done.to_json())["digests"] == {"crc32": ["cbf43926", "00000000"]}
    assert Manifest.from_json(done.to_json()) == done
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize("digests", [{}, {"crc32": [], "sha256": []}, None, 5, "crc32", {"crc32": 5}])
def test_a_manifest_with_anything_else_for_digests_is_none(manifest: Manifest, digests: object) -> None:
    members = json.loads(manifest.to_json()) | {"digests": digests}
    with pytest.raises(ValueError, match=r"not a manifest|values to unpack"):
        Manifest.from_json(json.dumps(members))


def test_a_copy_of_an_earlier_version_is_used_and_checked_by_its_own_digests(store: Store, manifest: Manifest) -> None:
    folder = make_copy(store, manifest, as_earlier)
    assert store.read_marker(manifest.folder_name).algorithm == "sha256"
    assert store.is_complete(manifest)
    assert store.is_complete(manifest, digests=True)
    assert not store.can_feed(manifest), "the others couldn't check what it sends"
    damage(folder / "weights")
    assert store.is_complete(manifest)
    assert not store.is_complete(manifest, digests=True)


def test_a_copy_whose_digests_are_unknown_is_used_but_made_again_to_be_checked(
    store: Store, manifest: Manifest
) -> None:
    make_copy(store, manifest, as_later)
    assert not is_known(store.read_marker(manifest.folder_name).algorithm)
    assert store.is_complete(manifest)
    assert not store.can_feed(manifest)
    lock = store.open_lock(manifest.folder_name)
    assert store.take(lock, manifest, digests=True) is State.MISSING
    make_copy(store, manifest)
    assert store.is_complete(manifest, digests=True)
    assert store.can_feed(manifest)
    os.close(lock)


def test_an_earlier_version_takes_our_digests_for_none(store: Store, manifest: Manifest) -> None:
    """It expects a list with a digest of each extent, and neither checks nor feeds without: it makes its own copy to check it."""
    folder = make_copy(store, manifest)
    digests = tuple(map(str, json.loads((folder / MARKER).read_text())["digests"]))
    assert len(digests) != len(manifest.extents())


def test_a_node_of_another_version_is_no_peer() -> None:
    ours, its = socket.socketpair()
    with ours, its:
        its.sendall(b"\1")
        with pytest.raises(ConnectionError, match="another version"):
            await_ready(ours)
        send_ready(its)
        await_ready(ours)
        its.close()
        with pytest.raises(ConnectionError, match="has closed"):
            await_ready(ours)


@pytest.mark.parametrize(("version", "comes_in"), [(b"\1", False), (b"\2", True)])
def test_a_connection_of_another_version_is_closed(version: bytes, comes_in: bool) -> None:
    admitted: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    server = socket.create_server(("127.0.0.1", 0))
    address, port = server.getsockname()
    rendezvous = Rendezvous("n0", address, port, TOKEN)
    listener = Listener(server, TOKEN, lambda node, number, _: admitted.put((node, number)))
    try:
        connection, _ = connect(rendezvous, 16 + 3, 10.0)
        with connection.detach() as stream:
            stream.sendall(version)
            if comes_in:
                assert admitted.get(timeout=10) == (1, 3)
            else:
                stream.settimeout(10)
                assert stream.recv(1) == b""
                assert admitted.empty()
    finally:
        listener.close()
