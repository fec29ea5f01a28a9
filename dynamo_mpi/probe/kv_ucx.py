# SPDX-License-Identifier: Apache-2.0
"""UCX itself, as the KV probe needs it: one worker, memory that others may read, and reads. In the process of a station alone.

Of UCP's interface (``ucp/api/ucp.h``) this takes what has not changed since 1.10, and structures by their field masks: what a mask does not
name is not read. Endpoints are made to report peers that fail, as TensorRT-LLM's and NIXL's are.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import threading
from ctypes import POINTER, Structure, byref, c_char, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_NAME = "libucp.so.0"
# where TensorRT-LLM's containers, HPC-X and distributions have it, behind what the loader is told
_FOLDERS = (
    "/usr/local/ucx/lib",
    "/opt/hpcx/ucx/lib",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
)
_API = (1, 10)
_FEATURE_RMA = 1 << 1
_BY_FEATURES, _BY_THREAD_MODE = 1, 1
# any thread may call it, one at a time: each conversation has its own, and there is a lock
_SERIALIZED = 1
_BY_ADDRESS_AND_ERRORS = 1 << 0 | 1 << 1 | 1 << 2
_BY_ADDRESS_AND_LENGTH = 1 << 0 | 1 << 1
_ERRORS_OF_PEERS = 1
_OK, _IN_PROGRESS, _LAST_ERROR = 0, 1, -100
_SPARE_BYTES = 256
_HEAD = struct.Struct("!I")
_ON_ERROR = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int)
_never_ended: list[object] = []


class UcxError(Exception):
    """UCX can't, or can't any more; the text says what it said."""


class _Params(Structure):
    _fields_ = (("mask", c_uint64), ("features", c_uint64), ("spare", c_char * _SPARE_BYTES))


class _WorkerParams(Structure):
    _fields_ = (("mask", c_uint64), ("thread_mode", c_int), ("spare", c_char * _SPARE_BYTES))


class _EndpointParams(Structure):
    _fields_ = (
        ("mask", c_uint64),
        ("address", c_void_p),
        ("error_mode", c_int),
        ("on_error", _ON_ERROR),
        ("on_error_argument", c_void_p),
        ("spare", c_char * _SPARE_BYTES),
    )


class _MapParams(Structure):
    _fields_ = (("mask", c_uint64), ("address", c_void_p), ("length", c_size_t), ("spare", c_char * _SPARE_BYTES))


class _RequestParams(Structure):
    _fields_ = (("mask", c_uint32), ("flags", c_uint32), ("spare", c_char * _SPARE_BYTES))


class _Peer(NamedTuple):
    endpoint: c_void_p
    key: c_void_p


def find_ucx(environ: Mapping[str, str]) -> str:
    """Return UCX's library, without loading it; nothing where there is none."""
    folders = (*environ.get("LD_LIBRARY_PATH", "").split(":"), *_FOLDERS)
    paths = (Path(folder, _NAME) for folder in folders if folder)
    return next((str(path) for path in paths if path.is_file()), "")


class UcxAgent:
    """One station's. Thread-safe.

    Raises:
        UcxError: UCX is missing, or doesn't work here.
    """

    def __init__(self) -> None:
        path = find_ucx(os.environ)
        if not path:
            raise UcxError(f"there is no {_NAME}")
        try:
            self._ucp = _library(path)
        except (OSError, AttributeError) as error:
            raise UcxError(str(error)) from None
        self._lock = threading.Lock()
        self._peers: dict[bytes, _Peer] = {}
        self._on_error = _ON_ERROR(lambda *_: None)
        self._nothing = _RequestParams()
        self.description = b""
        self._context, self._worker = c_void_p(), c_void_p()
        params = _Params(mask=_BY_FEATURES, features=_FEATURE_RMA)
        self._check("ucp_init_version", *_API, byref(params), None, byref(self._context))
        worker = _WorkerParams(mask=_BY_THREAD_MODE, thread_mode=_SERIALIZED)
        self._check("ucp_worker_create", self._context, byref(worker), byref(self._worker))

    def share(self, memory: Any) -> None:
        """Let peers that know this agent's ``description`` read an array, as long as this process lives."""
        params = _MapParams(mask=_BY_ADDRESS_AND_LENGTH, address=memory.ctypes.data, length=memory.nbytes)
        handle, key, address = c_void_p(), c_void_p(), c_void_p()
        key_size, address_size = c_size_t(), c_size_t()
        with self._lock:
            self._check("ucp_mem_map", self._context, byref(params), byref(handle))
            self._check("ucp_rkey_pack", self._context, handle, byref(key), byref(key_size))
            self._check("ucp_worker_get_address", self._worker, byref(address), byref(address_size))
            parts = ctypes.string_at(address, address_size.value), ctypes.string_at(key, key_size.value)
        self.description = _HEAD.pack(len(parts[0])) + b"".join(parts)

    def progress(self) -> None:
        """Let UCX answer those who are connecting or reading. Doesn't wait."""
        with self._lock:
            self._ucp.ucp_worker_progress(self._worker)

    def read(self, address: int, description: bytes, target: Any, look: Callable[[], None]) -> None:
        """Fill an array from a peer's memory.

        Args:
            address: of the memory, at the peer's.
            description: what the peer's agent says of itself.
            target: contiguous.
            look: called meanwhile; raises what ends the read.

        Raises:
            UcxError: it failed, or the peer is gone.
        """
        peer = self._join(description)
        with self._lock:
            request = self._ucp.ucp_get_nbx(
                peer.endpoint, target.ctypes.data, target.nbytes, address, peer.key, byref(self._nothing)
            )
        if not request:
            return
        if (failure := _failure(request)) != _OK:
            raise self._forget(description, failure)
        # until it has ended in whatever way, UCX may write to it
        _never_ended.append(target)
        while (status := self._step(request)) == _IN_PROGRESS:
            look()
        _never_ended.pop()
        with self._lock:
            self._ucp.ucp_request_free(request)
        if status != _OK:
            raise self._forget(description, status)

    def _step(self, request: int) -> int:
        with self._lock:
            self._ucp.ucp_worker_progress(self._worker)
            return int(self._ucp.ucp_request_check_status(request))

    def _join(self, description: bytes) -> _Peer:
        if description not in self._peers:
            if len(description) < _HEAD.size:
                raise UcxError("the peer's description of itself is none")
            (size,) = _HEAD.unpack_from(description)
            address, key = description[_HEAD.size : _HEAD.size + size], description[_HEAD.size + size :]
            buffer = ctypes.create_string_buffer(address, len(address))
            params = _EndpointParams(
                mask=_BY_ADDRESS_AND_ERRORS,
                address=ctypes.addressof(buffer),
                error_mode=_ERRORS_OF_PEERS,
                on_error=self._on_error,
            )
            endpoint, handle = c_void_p(), c_void_p()
            with self._lock:
                self._check("ucp_ep_create", self._worker, byref(params), byref(endpoint))
                self._check("ucp_ep_rkey_unpack", endpoint, key, byref(handle))
            self._peers[description] = _Peer(endpoint, handle)
        return self._peers[description]

    def _forget(self, description: bytes, status: int) -> UcxError:
        # connected anew if it is ever asked again; what it held goes with the process
        self._peers.pop(description, None)
        return UcxError(f"UCX: {self._words(status)}")

    def _check(self, name: str, *arguments: Any) -> None:
        status = int(getattr(self._ucp, name)(*arguments))
        if status != _OK:
            raise UcxError(f"UCX: {name}: {self._words(status)}")

    def _words(self, status: int) -> str:
        with contextlib.suppress(AttributeError):
            return str(self._ucp.ucs_status_string(status).decode())
        return f"status {status}"


def _failure(request: int) -> int:
    """Return the status that a pointer stands for, if it is none (``UCS_PTR_IS_ERR``)."""
    status = request - (1 << 64)
    return status if status >= _LAST_ERROR else _OK


def _library(path: str) -> Any:
    ucp = ctypes.CDLL(path)
    ucp.ucp_init_version.argtypes = (c_uint, c_uint, c_void_p, c_void_p, c_void_p)
    ucp.ucp_worker_create.argtypes = (c_void_p, c_void_p, c_void_p)
    ucp.ucp_mem_map.argtypes = (c_void_p, c_void_p, c_void_p)
    ucp.ucp_rkey_pack.argtypes = (c_void_p, c_void_p, c_void_p, POINTER(c_size_t))
    ucp.ucp_worker_get_address.argtypes = (c_void_p, c_void_p, POINTER(c_size_t))
    ucp.ucp_worker_progress.argtypes = (c_void_p,)
    ucp.ucp_ep_create.argtypes = (c_void_p, c_void_p, c_void_p)
    ucp.ucp_ep_rkey_unpack.argtypes = (c_void_p, ctypes.c_char_p, c_void_p)
    ucp.ucp_get_nbx.argtypes = (c_void_p, c_void_p, c_size_t, c_uint64, c_void_p, c_void_p)
    ucp.ucp_get_nbx.restype = c_void_p
    ucp.ucp_request_check_status.argtypes = (c_void_p,)
    ucp.ucp_request_free.argtypes = (c_void_p,)
    ucp.ucp_request_free.restype = None
    with contextlib.suppress(AttributeError):  # of libucs, which it brings
        ucp.ucs_status_string.argtypes = (c_int,)
        ucp.ucs_status_string.restype = ctypes.c_char_p
    return ucp
