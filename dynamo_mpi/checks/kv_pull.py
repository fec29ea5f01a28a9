# SPDX-License-Identifier: Apache-2.0
"""One pair of the KV check: a decode host pulls a pattern from a prefill host, by NIXL or over TCP, and measures it.

Over TCP, both sides first prove with an HMAC over both nonces that they know this run's key, which rank 0 made. Every wait has a deadline.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import hmac
import importlib
import importlib.util
import logging
import os
import random
import re
import secrets
import socket
import socketserver
import struct
import tempfile
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.checks.nccl_fabric import has_cards
from dynamo_mpi.common.admission import Admission
from dynamo_mpi.common.host_address import interface_addresses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Pull = Callable[[int], tuple[bytes | bytearray, float]]

OK, FAILED, LATE = "ok", "failed", "late"
TCP, NIXL = "tcp", "nixl"
SMALL_BYTES, MIDDLE_BYTES, LARGE_BYTES = 1 << 12, 1 << 20, 1 << 25
"""Message sizes: for the latency, for an estimate, for the rate."""
PULL_SECONDS, CONNECT_SECONDS = 6.0, 4.0
"""Time limits: for the pulls of one pair, and for the start of a connection."""
# the best of several: another process may have used the core
_REPEATS = {SMALL_BYTES: 9, MIDDLE_BYTES: 3, LARGE_BYTES: 4}
_NONCE_BYTES = 16
_SIZE = struct.Struct("!I")
_MOST_AT_ONCE = 1 << 20
_MOST_STRANGERS = 256
# prime, so that no part of the pattern looks like another part at a border of pages or packets
_BLOCK_BYTES = 65521
_CORRUPT_AT = 1000
_NIXL_PACKAGES = ("nixl", "nixl_cu12", "nixl_cu13")
_LANES = re.compile(r"(?:-node cfg#\d+|\bep_cfg\[\d+\]:)\s.*\brma(?:_am)?\(([^)]*)\)")
_PATH = re.compile(r"([a-z]\w*)/([\w.:-]+)")


class NixlError(Exception):
    """NIXL's error."""


class PairResult(NamedTuple):
    """A decode host's measurement of its pull from a prefill host.

    ``state`` is `OK`, otherwise ``text`` has the reason; ``paths`` are transports and devices as UCX writes them (``rc_mlx5/mlx5_0:1``);
    ``cards`` whether an InfiniBand or RoCE port of the decode host is up; ``wrong`` whether other bytes arrived than were sent; ``latency``
    the seconds for `SMALL_BYTES`, ``rate`` the bytes a second of the largest message that fitted into the time, the best of several.
    """

    prefill: str
    decode: str
    transport: str
    state: str = OK
    text: str = ""
    paths: tuple[str, ...] = ()
    cards: bool = False
    wrong: bool = False
    latency: float = 0.0
    rate: float = 0.0

    @classmethod
    def of(cls, row: Iterable[Any]) -> PairResult:
        """Return the result that a rank sent as JSON."""
        values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in row]
        return cls(*values)


class Source(NamedTuple):
    """Where a prefill host has the pattern: a server's address and port; for NIXL its metadata (base64), and the memory's address."""

    host: str
    address: str
    port: int
    agent: str = ""
    memory: int = 0


def pattern(key: bytes, host: str, *, corrupt: bool = False) -> bytes:
    """Return the `LARGE_BYTES` that a prefill host sends in this run, different for each run; with ``corrupt``, one byte is wrong."""
    seed = hmac.digest(key, host.encode("utf-8", "surrogateescape"), "sha256")
    block = random.Random(seed).randbytes(_BLOCK_BYTES)  # noqa: S311 - no secret
    data = bytearray((block * (LARGE_BYTES // _BLOCK_BYTES + 1))[:LARGE_BYTES])
    data[_CORRUPT_AT] ^= corrupt
    return bytes(data)


class _Connection:
    """A connection over which both sides prove that they know a key; then bare bytes. Every method may raise OSError."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self.deadline = connection, deadline

    def authenticate(self, key: bytes, own_role: bytes, peer_role: bytes) -> None:
        own = secrets.token_bytes(_NONCE_BYTES)
        self.write(own)
        theirs = self.read(_NONCE_BYTES)
        self.write(hmac.digest(key, own_role + own + theirs, "sha256"))
        proof = hmac.digest(key, peer_role + theirs + own, "sha256")
        if not hmac.compare_digest(self.read(len(proof)), proof):
            raise ConnectionError("the peer doesn't know the key of this run")

    def write(self, data: bytes | memoryview) -> None:
        self._socket.settimeout(_left(self.deadline))
        self._socket.sendall(data)

    def read(self, size: int) -> bytearray:
        data = bytearray(size)
        left = memoryview(data)
        while left:
            self._socket.settimeout(_left(self.deadline))
            count = self._socket.recv_into(left[:_MOST_AT_ONCE])
            if not count:
                raise ConnectionError("the peer closed the connection")
            left = left[count:]
        return data

    def pull(self, size: int) -> tuple[bytearray, float]:
        start = time.perf_counter()
        self.write(_SIZE.pack(size))
        return self.read(size), time.perf_counter() - start


class PatternServer(socketserver.ThreadingTCPServer):
    """A prefill host's side over TCP, in threads that end with the process; it listens at ``address``."""

    daemon_threads, block_on_close = True, False
    request_queue_size = 128

    def __init__(self, address: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, 0), socketserver.BaseRequestHandler)
        self.port: int = self.server_address[1]
        self._key = self._data = b""
        self._strangers: Admission[socket.socket] = Admission(_MOST_STRANGERS, CONNECT_SECONDS)
        self._lock = threading.Lock()

    def start(self, key: bytes, data: bytes) -> None:
        """Let those that know ``key`` pull ``data``."""
        self._key, self._data = key, data
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, unless it must make room for others."""
        with self._lock:
            displaced = self._strangers.enter(request, client_address[0], time.monotonic())
        for connection in displaced:
            with contextlib.suppress(OSError):  # its thread, if it has one, closes it
                connection.shutdown(socket.SHUT_RDWR)
        if request in displaced:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._lock:
            self._strangers.leave(request)
        super().shutdown_request(request)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve one peer: it sends sizes, and gets that many bytes."""
        with contextlib.suppress(OSError):  # the peer sees that its connection is closed, and reports it
            peer = _Connection(request, time.monotonic() + CONNECT_SECONDS)
            peer.authenticate(self._key, b"prefill", b"decode")
            with self._lock:
                self._strangers.leave(request)
            peer.deadline += PULL_SECONDS
            while True:
                peer.write(memoryview(self._data)[: _SIZE.unpack(peer.read(_SIZE.size))[0]])


class NixlAgent:
    """NIXL with UCX, and one buffer of `LARGE_BYTES` for peers to read, or to read into. Raises NixlError if it doesn't work on this host."""

    def __init__(self) -> None:
        with tempfile.NamedTemporaryFile(prefix="kv-check-") as log:
            # makes UCX log which devices it uses; it keeps the file open
            os.environ.update(UCX_LOG_LEVEL="info", UCX_PROTO_INFO="y", UCX_LOG_FILE=log.name)
            self._log = os.dup(log.fileno())
            nixl = _checked(_import_nixl)
            sync = nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
            # without the thread that would keep a core busy
            config = _checked(nixl.nixl_agent_config, enable_prog_thread=False, backends=[], sync_mode=sync)
            self._agent: Any = _checked(nixl.nixl_agent, secrets.token_hex(8), config)
            _checked(self._agent.create_backend, "UCX")
        self._unfinished: list[object] = []
        self._register()

    def share(self, data: bytes) -> tuple[str, int]:
        """Let peers read ``data``; return the last fields of a `Source`."""
        ctypes.memmove(self._buffer, data, len(data))
        metadata = _checked(self._agent.get_agent_metadata)
        return base64.b64encode(metadata).decode(), ctypes.addressof(self._buffer)

    def progress(self) -> None:
        """Let UCX serve peers that connect or read. Doesn't wait."""
        with contextlib.suppress(Exception):  # a peer's error; the peer reports it
            self._agent.get_new_notifs()

    @contextlib.contextmanager
    def joined(self, source: Source, deadline: float) -> Iterator[Pull]:
        """Return what reads so many bytes from a peer until a deadline."""
        peer = _checked(self._agent.add_remote_agent, base64.b64decode(source.agent))
        try:
            yield partial(self._read, peer, source.memory, deadline)
        finally:
            with contextlib.suppress(Exception):  # it may have been removed already
                self._agent.remove_remote_agent(peer)

    def paths(self) -> tuple[str, ...]:
        """Return the transports of the last read, as UCX logs them."""
        return paths_in(os.pread(self._log, os.fstat(self._log).st_size, 0).decode("utf-8", "replace"))

    def _register(self) -> None:
        self._buffer = ctypes.create_string_buffer(LARGE_BYTES)
        _checked(self._agent.register_memory, [(ctypes.addressof(self._buffer), LARGE_BYTES, 0, "")], "DRAM")

    def _read(self, peer: Any, address: int, deadline: float, size: int) -> tuple[bytes, float]:
        ctypes.memset(self._buffer, 0, size)  # earlier reads begin with the same bytes
        own, theirs = (
            self._agent.get_xfer_descs([(at, size, 0)], "DRAM") for at in (ctypes.addressof(self._buffer), address)
        )
        begin, state = time.perf_counter(), ""
        handle = _checked(self._agent.initialize_xfer, "READ", own, theirs, peer)
        try:
            state = _checked(self._agent.transfer, handle)
            while state == "PROC":
                _left(deadline)
                state = _checked(self._agent.check_xfer_state, handle)
            if state != "DONE":
                raise NixlError("NIXL: the read failed")
        finally:
            if state != "DONE":
                # UCX may write to it when the peer continues: it must stay registered until the process ends
                self._unfinished.append((self._buffer, handle))
                self._register()
        took = time.perf_counter() - begin
        _checked(self._agent.release_xfer_handle, handle)
        return ctypes.string_at(self._buffer, size), took


def run_pair(source: Source, decode: str, key: bytes, agent: NixlAgent | None) -> PairResult:
    """Pull from a prefill host to this one, by NIXL if there is an agent, in `CONNECT_SECONDS` and `PULL_SECONDS`. Errors of the peer, the
    network or NIXL are part of the result, not raised."""
    result = PairResult(source.host, decode, TCP if agent is None else NIXL, cards=has_cards())
    expected, began = pattern(key, source.host), time.monotonic()
    try:
        # also before NIXL, which waits without a limit for a host that can't be reached
        with socket.create_connection((source.address, source.port), timeout=CONNECT_SECONDS) as connection:
            peer = _Connection(connection, began + CONNECT_SECONDS)
            peer.authenticate(key, b"decode", b"prefill")
            peer.deadline += PULL_SECONDS
            with contextlib.nullcontext(peer.pull) if agent is None else agent.joined(source, peer.deadline) as pull:
                result = _measure(result, expected, pull)
            paths = (f"tcp/{_interface(connection.getsockname()[0])}",) if agent is None else agent.paths()
            result = result._replace(paths=paths)
    except TimeoutError:
        result = result._replace(state=LATE, text=f"not done in {time.monotonic() - began:.0f} s")
    except (OSError, NixlError, MemoryError) as error:
        result = result._replace(state=FAILED, text=" ".join(str(error).split()) or type(error).__name__)
    return result


def _measure(result: PairResult, expected: bytes, pull: Pull) -> PairResult:
    """Pull all sizes; for a slow pair, as many as fit into half of the time."""
    middle = time.monotonic() + PULL_SECONDS / 2
    for size, repeats in _REPEATS.items():
        # at the rate of the size before
        if result.rate and time.monotonic() + size / result.rate > middle:
            break
        # the first establishes the connection
        data, took = pull(size)
        result = result._replace(wrong=result.wrong or data != expected[:size])
        times = [took]
        while len(times) <= repeats and time.monotonic() < middle:
            times.append(pull(size)[1])
        best = min(times)
        result = result._replace(latency=best) if size == SMALL_BYTES else result._replace(rate=size / best)
    return result


def _left(deadline: float) -> float:
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return left


def _interface(address: str) -> str:
    return next((name for name, found in interface_addresses().items() if address in map(str, found)), address)


def nixl_installed() -> bool:
    """Return whether NIXL's Python package is installed, without importing it."""
    return any(importlib.util.find_spec(name) is not None for name in _NIXL_PACKAGES)


def _import_nixl() -> Any:
    for name in _NIXL_PACKAGES:
        with contextlib.suppress(ModuleNotFoundError):
            nixl = importlib.import_module(f"{name}._api")
            logging.getLogger("nixl").handlers.clear()  # it writes to stdout
            return nixl
    raise NixlError("NIXL's Python package isn't installed, or a module that it needs is missing")


def _checked(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    try:
        return call(*arguments, **named)
    except Exception as error:  # NIXL has a class of its own for each
        raise NixlError(f"NIXL: {error}" if str(error) else f"NIXL: {type(error).__name__}") from None


def paths_in(log: str) -> tuple[str, ...]:
    """Return the transports by which a peer's memory is read, from UCX's last log line about it; empty if there is none.

    It writes, from 1.13 on, one of these for a peer: ``inter-node cfg#1 rma(rc_mlx5/mlx5_0:1) am(…)``, ``ep_cfg[0]: rma_am(tcp/eth0) …``.
    """
    lanes = _LANES.findall(log)
    return tuple(dict.fromkeys("/".join(path) for path in _PATH.findall(lanes[-1]))) if lanes else ()
