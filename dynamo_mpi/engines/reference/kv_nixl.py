# SPDX-License-Identifier: Apache-2.0
"""This rank's NIXL agent: what a prefill rank shares, decode ranks read without its engine's help.

NIXL is imported when it is needed and no sooner. Its progress thread would burn a core, so that both sides call NIXL while a transfer is
under way, with waits between: on the prefill rank that is the thread of the connection that the transfer was agreed on.

A read that is given up can't be taken back: UCX may write to its target as soon as the peer goes on. So its memory stays ours, registered
and unused, until the read has ended in whatever way.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynamo_mpi.engines.reference.gguf_tensors import Float32Array
from dynamo_mpi.engines.reference.kv_address import interface_addresses, kv_address
from dynamo_mpi.engines.reference.kv_wire import MOST_AGENT, Located
from dynamo_mpi.errors import UsageError

POLL_SECONDS = 0.001
_PACKAGES = ("nixl", "nixl_cu12", "nixl_cu13")
_INFINIBAND = Path("/sys/class/infiniband")
_MOST_PEERS = 64
_CURE = "pip install --no-deps nixl-cu12 (NVIDIA's containers have nixl), or --kv-transport tcp on the prefill worker"
_never_ended: list[object] = []


class NixlError(Exception):
    """NIXL can't, or can't any more; the text says what it said."""


def nixl_installed() -> bool:
    """Tell whether there is a package of NIXL, without importing it."""
    return any(importlib.util.find_spec(name) is not None for name in _PACKAGES)


def missing_nixl() -> UsageError:
    """Return the error for a host without NIXL."""
    return UsageError("NIXL is not installed here", needed="it on every rank's host, for KV by NIXL", fix=_CURE)


@dataclass
class _Peer:
    name: Any
    users: int = 0
    failed: bool = False


@dataclass(frozen=True)
class _Reading:
    """What has to live for as long as a read may go on."""

    handle: Any
    registered: Any
    target: Float32Array
    peer: _Peer


class NixlAgent:
    """One rank's agent; nothing happens before `open`. Thread-safe.

    Args:
        network: interface, network or address of this host: UCX listens on no other Ethernet; None leaves it to ``UCX_NET_DEVICES``, or
            to UCX, which takes all.
        peers: with how many others connections are kept while nothing is read from them.
    """

    def __init__(self, network: str | None = None, peers: int = _MOST_PEERS) -> None:
        self._network = network
        self._most_peers = peers
        self._lock = threading.Lock()
        self._agent: Any = None
        self._peers: dict[bytes, _Peer] = {}
        self._late: list[_Reading] = []
        self._shared: Any = None
        self.description = b""

    def open(self) -> None:
        """Import NIXL and set it up, unless that was done before.

        Raises:
            UsageError: it is missing, or doesn't work on this host.
        """
        with self._lock:
            if self._agent is None:
                self._agent = _new_agent(self._network)

    def share(self, memory: Float32Array) -> None:
        """Let peers read ``memory`` until `close`; those that know this agent's ``description`` can.

        Raises:
            UsageError: NIXL can't be used, or not with this memory.
        """
        self.open()
        try:
            self._shared = self._agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
            self.description = self._agent.get_agent_metadata()
        except Exception as error:  # NIXL has a class of its own for each
            raise _unusable(f"registering {memory.nbytes} bytes failed: {error}") from None
        if len(self.description) > MOST_AGENT:
            raise _unusable(f"its agent's description has {len(self.description)} bytes, more than {MOST_AGENT}")

    def progress(self) -> None:
        """Let UCX answer those who are connecting or reading. Doesn't wait."""
        agent = self._agent
        if agent is not None:
            with contextlib.suppress(Exception):  # a peer's; it notices by itself
                agent.get_new_notifs()

    def read(self, located: Located, target: Float32Array, pause: Callable[[float], None]) -> None:
        """Fill ``target``, ``[2, layers, ...]``, from a peer's memory.

        Args:
            located: where that is.
            target: contiguous, and its own memory's owner; left to NIXL for as long as it needs it.
            pause: waits for so many seconds, or raises what ends the read.

        Raises:
            UsageError: there is no NIXL here.
            NixlError: it failed, or the peer is gone.
        """
        self.open()
        self._end_late_reads()
        peer = self._join(located.agent)
        reading, state = None, "ERR"
        try:
            reading = self._begin(located, target, peer)
            state = _checked(self._agent.transfer, reading.handle)
            while state == "PROC":
                pause(POLL_SECONDS)
                state = _checked(self._agent.check_xfer_state, reading.handle)
            if state != "DONE":
                raise NixlError("NIXL: the read failed")
        except NixlError:
            state = "ERR"
            raise
        finally:
            peer.failed |= state != "DONE"
            if reading is not None and state == "PROC":
                with self._lock:
                    self._late.append(reading)
            else:
                self._end(peer, reading)

    def close(self) -> None:
        """Forget all peers and what is shared. Idempotent."""
        self._end_late_reads()
        with self._lock:
            agent, self._agent = self._agent, None
            if agent is None:
                return
            if self._late:
                # UCX may still write to their targets: they and the agent go with the process
                _never_ended.extend((agent, *self._late))
                return
            with contextlib.suppress(Exception):  # the peer may be gone, and we are going
                for peer in self._peers.values():
                    agent.remove_remote_agent(peer.name)
            self._peers.clear()
            if self._shared is not None:
                with contextlib.suppress(Exception):
                    agent.deregister_memory(self._shared)

    def _begin(self, located: Located, target: Float32Array, peer: _Peer) -> _Reading:
        local = _runs(target.ctypes.data, target.strides[0], target.strides[1], target)
        remote = _runs(located.address, located.half_stride, located.layer_stride, target)
        agent = self._agent
        registered = _checked(agent.register_memory, [(target.ctypes.data, target.nbytes, 0, "")], "DRAM")
        try:
            handle = _checked(
                lambda: agent.initialize_xfer(
                    "READ", agent.get_xfer_descs(local, "DRAM"), agent.get_xfer_descs(remote, "DRAM"), peer.name
                )
            )
        except NixlError:
            agent.deregister_memory(registered)
            raise
        return _Reading(handle, registered, target, peer)

    def _join(self, description: bytes) -> _Peer:
        with self._lock:
            peer = self._peers.pop(description, None)
            if peer is None:
                peer = _Peer(_checked(self._agent.add_remote_agent, description))
            self._peers[description] = peer  # the last used is the last
            peer.users += 1
            idle = [known for known, other in self._peers.items() if not other.users]
            for known in idle[: max(0, len(self._peers) - self._most_peers)]:
                self._forget(known)
        return peer

    def _end(self, peer: _Peer, reading: _Reading | None) -> None:
        """Give up what a read that has ended held."""
        if reading is not None:
            with contextlib.suppress(Exception):
                self._agent.release_xfer_handle(reading.handle)
            with contextlib.suppress(Exception):
                self._agent.deregister_memory(reading.registered)
        with self._lock:
            peer.users -= 1
            if peer.failed and not peer.users:  # connected anew if it is ever asked again
                for known in [known for known, other in self._peers.items() if other is peer]:
                    self._forget(known)

    def _forget(self, description: bytes) -> None:
        peer = self._peers.pop(description)
        with contextlib.suppress(Exception):  # it may be disconnected already
            self._agent.remove_remote_agent(peer.name)

    def _end_late_reads(self) -> None:
        with self._lock:
            late, self._late = self._late, []
        for reading in late:
            try:
                state = _checked(self._agent.check_xfer_state, reading.handle)
            except NixlError:
                state = "ERR"
            if state == "PROC":
                with self._lock:
                    self._late.append(reading)
            else:
                self._end(reading.peer, reading)


def _checked(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except Exception as error:  # NIXL has a class of its own for each
        raise NixlError(f"NIXL: {error}") from None


def _runs(address: int, half_stride: int, layer_stride: int, target: Float32Array) -> Any:
    """Return address, size and device of each layer's keys and of its values."""
    halves, layers = target.shape[:2]
    starts = address + half_stride * np.arange(halves)[:, None] + layer_stride * np.arange(layers)[None, :]
    size = target[0, 0].nbytes
    return [(int(start), size, 0) for start in starts.ravel()]


def _new_agent(network: str | None) -> Any:
    nixl = _import_nixl()
    try:
        variables = _ucx_variables(network)
        config = nixl.nixl_agent_config(
            enable_prog_thread=False, backends=[], sync_mode=nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        )
        # nobody else's may have this name
        agent = nixl.nixl_agent(secrets.token_hex(8), config)
        with _environment(variables):
            agent.create_backend("UCX")
    except UsageError:
        raise
    except Exception as error:  # NIXL has a class of its own for each
        raise _unusable(f"{type(error).__name__}: {error}") from None
    return agent


def _import_nixl() -> Any:
    for name in _PACKAGES:
        try:
            nixl = importlib.import_module(f"{name}._api")
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError) as error:  # a library that it needs
            raise _unusable(str(error)) from None
        logger = logging.getLogger("nixl")
        logger.handlers.clear()  # it writes to stdout, which is not ours to write to
        logger.propagate = True
        if "NIXL_LOG_LEVEL" not in os.environ:
            logger.setLevel(logging.WARNING)
        return nixl
    raise missing_nixl()


def _unusable(why: str) -> UsageError:
    return UsageError(f"NIXL can't be used on this host: {why}", needed="a NIXL with its UCX backend", fix=_CURE)


def _ucx_variables(network: str | None) -> dict[str, str]:
    """Return what UCX is to be told, unless its user has told it something else.

    NIXL's wheel brings libraries for InfiniBand that collide with the system's, and end the process by SIGSEGV when it exits: they stay
    out where there is no InfiniBand. Interfaces are excluded, not chosen: a choice would exclude devices that aren't interfaces.
    """
    variables = {}
    if not (_INFINIBAND.is_dir() and any(_INFINIBAND.iterdir())):
        variables["UCX_MODULES"] = "^ib"
    if network is not None:
        address = kv_address(network)
        others = [name for name, found in interface_addresses().items() if address not in map(str, found)]
        if others:
            variables["UCX_NET_DEVICES"] = "^" + ",".join(others)
    return {name: value for name, value in variables.items() if name not in os.environ}


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables for a while: MPI's own UCX reads the same ones."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
