# SPDX-License-Identifier: Apache-2.0
"""This rank's NIXL agent: what a prefill rank shares, decode ranks read without its engine's help.

NIXL is imported when it is needed and no sooner. Its progress thread would burn a core, so that both sides call NIXL while a transfer is
under way, with waits between: on the prefill rank that is the thread of the connection that the transfer was agreed on.

A read that is given up can't be taken back: UCX may write to its target as soon as the peer goes on. So its memory stays ours, registered
and unused, until the read has ended in whatever way.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamo_mpi.engines.reference.weights import Float32Array
from dynamo_mpi.probe.nixl_library import new_agent, unusable

POLL_SECONDS = 0.001
MOST_AGENT = 1 << 16
"""Bytes of what a NIXL agent says of itself: one address for each of the host's devices."""
_MOST_PEERS = 64
_never_ended: list[object] = []


@dataclass(frozen=True)
class Located:
    """Where in a prefill rank's memory the numbers lie.

    Args:
        address: of the first number.
        half_stride: bytes from a key to its value.
        layer_stride: bytes from a layer to the next; the numbers of one layer lie side by side.
        agent: what the rank's NIXL agent says of itself; opaque to all but NIXL.
    """

    address: int
    half_stride: int
    layer_stride: int
    agent: bytes


class NixlError(Exception):
    """NIXL can't, or can't any more; the text says what it said."""


@dataclass
class _Peer:
    name: Any
    users: int = 0
    failed: bool = False


@dataclass(frozen=True)
class _Reading:
    """What has to live for as long as a read may go on."""

    agent: Any
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
        self._opened()

    def _opened(self) -> Any:
        with self._lock:
            if self._agent is None:
                self._agent = new_agent(self._network)
            return self._agent

    def share(self, memory: Float32Array) -> None:
        """Let peers read ``memory`` until `close`; those that know this agent's ``description`` can.

        Raises:
            UsageError: NIXL can't be used, or not with this memory.
        """
        agent = self._opened()
        try:
            self._shared = agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
            self.description = agent.get_agent_metadata()
        except Exception as error:  # NIXL has a class of its own for each
            raise unusable(f"registering {memory.nbytes} bytes failed: {error}") from None
        if len(self.description) > MOST_AGENT:
            raise unusable(f"its agent's description has {len(self.description)} bytes, more than {MOST_AGENT}")

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
        agent = self._opened()
        self._end_late_reads()
        peer = self._join(agent, located.agent)
        reading, state = None, "ERR"
        try:
            reading = _begin(agent, located, target, peer)
            state = _checked(agent.transfer, reading.handle)
            while state == "PROC":
                pause(POLL_SECONDS)
                state = _checked(agent.check_xfer_state, reading.handle)
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
                self._end(agent, peer, reading)

    def close(self) -> None:
        """Forget all peers and what is shared. Idempotent."""
        self._end_late_reads()
        with self._lock:
            agent, self._agent = self._agent, None
            if agent is None:
                return
            if self._late:
                # UCX may still write to their targets: they and the agent go with the process
                _never_ended.extend(self._late)
                self._late.clear()
                return
            with contextlib.suppress(Exception):  # the peer may be gone, and we are going
                for peer in [peer for peer in self._peers.values() if not peer.users]:
                    agent.remove_remote_agent(peer.name)
            self._peers.clear()
            if self._shared is not None:
                with contextlib.suppress(Exception):
                    agent.deregister_memory(self._shared)

    def _join(self, agent: Any, description: bytes) -> _Peer:
        with self._lock:
            peer = self._peers.pop(description, None)
            if peer is None:
                peer = _Peer(_checked(agent.add_remote_agent, description))
            self._peers[description] = peer  # the last used is the last
            peer.users += 1
            idle = [known for known, other in self._peers.items() if not other.users]
            for known in idle[: max(0, len(self._peers) - self._most_peers)]:
                self._forget(agent, known)
        return peer

    def _end(self, agent: Any, peer: _Peer, reading: _Reading | None) -> None:
        """Give up what a read that has ended held."""
        if reading is not None:
            with contextlib.suppress(Exception):
                reading.agent.release_xfer_handle(reading.handle)
            with contextlib.suppress(Exception):
                reading.agent.deregister_memory(reading.registered)
        with self._lock:
            peer.users -= 1
            if peer.failed and not peer.users:  # connected anew if it is ever asked again
                for known in [known for known, other in self._peers.items() if other is peer]:
                    self._forget(agent, known)

    def _forget(self, agent: Any, description: bytes) -> None:
        peer = self._peers.pop(description)
        with contextlib.suppress(Exception):  # it may be disconnected already
            agent.remove_remote_agent(peer.name)

    def _end_late_reads(self) -> None:
        with self._lock:
            late, self._late = self._late, []
        for reading in late:
            try:
                state = _checked(reading.agent.check_xfer_state, reading.handle)
            except NixlError:
                state = "ERR"
            if state == "PROC":
                with self._lock:
                    self._late.append(reading)
            else:
                self._end(reading.agent, reading.peer, reading)


def _begin(agent: Any, located: Located, target: Float32Array, peer: _Peer) -> _Reading:
    local = _runs(target.ctypes.data, target.strides[0], target.strides[1], target)
    remote = _runs(located.address, located.half_stride, located.layer_stride, target)
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
    return _Reading(agent, handle, registered, target, peer)


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
