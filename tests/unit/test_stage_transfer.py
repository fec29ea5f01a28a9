# SPDX-License-Identifier: Apache-2.0
"""A node's part of a staging, with its coordinator and its predecessor played by the test."""

from __future__ import annotations

import os
import socket
import time
import zlib
from pathlib import Path

import pytest

from dynamo_mpi.stage import member
from dynamo_mpi.stage.manifest import MIN_EXTENT, scan
from dynamo_mpi.stage.member import Place
from dynamo_mpi.stage.partial import PartialCopy
from dynamo_mpi.stage.store import Store
from dynamo_mpi.stage.transfer import Transfer
from dynamo_mpi.stage.wire import ExtentHeader, LineChannel


def test_a_node_for_which_nothing_was_left_to_read_finds_out_whether_it_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # so that it isn't for want of data
    monkeypatch.setattr(member, "_STALLED_SECONDS", 600.0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(os.urandom(3 * MIN_EXTENT))
    manifest = scan(str(tmp_path / "model"))
    copy = PartialCopy(Store(str(tmp_path / "local")), manifest)
    (ours, its), (incoming, predecessor) = socket.socketpair(), socket.socketpair()
    its.settimeout(10)
    transfer = Transfer(Place(1, ("h1", "h2"), 2, fed=False, leader="h1"), manifest, copy, LineChannel(ours))
    coordinator = LineChannel(its)
    try:
        transfer.start()
        transfer.add_incoming(incoming, first=True)
        data = (tmp_path / "model" / "weights").read_bytes()[:MIN_EXTENT]
        predecessor.sendall(ExtentHeader(0, len(data), 0, zlib.crc32(data).to_bytes(4, "big")).pack() + data)
        end, has_received = time.monotonic() + 10, False
        for kind, *numbers in coordinator.receive():
            assert time.monotonic() < end, "it reads nothing by itself"
            has_received = has_received or (kind == "progress" and numbers[0] > 0)
            if kind == "want" and has_received and numbers:
                break
            if kind == "want":
                coordinator.send("extent", None)
        assert set(numbers) == {1, 2}
    finally:
        transfer.close()
        copy.discard()
        for each in (ours, its, incoming, predecessor):
            each.close()
