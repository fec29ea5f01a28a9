# SPDX-License-Identifier: Apache-2.0
"""NCCL by its C interface (``nccl.h``), which has kept since 2.0 what is used here; ``ncclCommSplit`` came with 2.18.

The engine gets to the same library through torch, whose import takes five seconds and more. Nothing of torch is needed to ask it.
"""

from __future__ import annotations

import contextlib
import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint64, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ID_BYTES = 128
_INT8, _INT32, _SUM, _MIN = 0, 2, 0, 3
_NAME = "libnccl.so.2"


class NcclError(RuntimeError):
    """NCCL refuses a call, or isn't there; in its words."""


class _UniqueId(ctypes.Structure):
    # declared as an array of char; as such ctypes would cut it at the first zero
    _fields_ = (("internal", ctypes.c_ubyte * ID_BYTES),)


class Nccl:
    """The library.

    Raises:
        NcclError: it isn't there.
    """

    def __init__(self) -> None:
        self._library = _load()
        self._library.ncclGetErrorString.restype = c_char_p
        self._library.ncclCommInitRank.argtypes = [POINTER(c_void_p), c_int, _UniqueId, c_int]
        buffers = [c_uint64, c_uint64, c_size_t, c_int]
        self._library.ncclAllReduce.argtypes = [*buffers, c_int, c_void_p, c_void_p]
        for name in ("ncclSend", "ncclRecv"):
            getattr(self._library, name).argtypes = [c_uint64, c_size_t, c_int, c_int, c_void_p, c_void_p]

    @property
    def version(self) -> str:
        """Its version, ``2.28.9``."""
        number = c_int()
        self._call("ncclGetVersion", byref(number))
        # 2.9 and later write 2.28.9 as 22809
        major, rest = divmod(number.value, 10000 if number.value >= 10000 else 1000)
        return f"{major}.{rest // 100}.{rest % 100}"

    def unique_id(self) -> bytes:
        """Make the id of a communicator, which all its ranks have to know."""
        made = _UniqueId()
        self._call("ncclGetUniqueId", byref(made))
        return bytes(made.internal)

    def join(self, unique_id: bytes, size: int, rank: int) -> c_void_p:
        """Become a rank of a communicator. Waits for all of them."""
        comm = c_void_p()
        self._call("ncclCommInitRank", byref(comm), size, _UniqueId.from_buffer_copy(unique_id), rank)
        return comm

    def split(self, comm: c_void_p, colour: int, key: int) -> c_void_p:
        """Make a communicator of the ranks with the same colour. Collective over ``comm``."""
        made = c_void_p()
        self._call("ncclCommSplit", comm, colour, key, byref(made), None)
        return made

    def all_reduce(self, sent: c_uint64, got: c_uint64, size: int, comm: c_void_p, stream: c_void_p) -> None:
        """Add up whole numbers of four bytes."""
        self._call("ncclAllReduce", sent, got, size // 4, _INT32, _SUM, comm, stream)

    def least(self, sent: c_uint64, got: c_uint64, comm: c_void_p, stream: c_void_p) -> None:
        """Find the least of the ranks' whole numbers of four bytes."""
        self._call("ncclAllReduce", sent, got, 1, _INT32, _MIN, comm, stream)

    def exchange(self, parts: Iterator[tuple[int, int, int, int]], comm: c_void_p, stream: c_void_p) -> None:
        """Send to and receive from several ranks at once.

        Args:
            parts: for each rank of ``comm``: its number, where its data are, where what it sends goes, and how many bytes.
            comm: the communicator.
            stream: what orders it.
        """
        self._call("ncclGroupStart")
        for peer, sent, got, size in parts:
            self._call("ncclSend", sent, size, _INT8, peer, comm, stream)
            self._call("ncclRecv", got, size, _INT8, peer, comm, stream)
        self._call("ncclGroupEnd")

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            said = self._library.ncclGetErrorString(code)
            raise NcclError(f"{name}: {said.decode('utf-8', 'replace') if said else f'error {code}'}")


def _load() -> Any:
    """Load it from where torch would: the package that PyPI's torch brings, else the system's, as in NVIDIA's containers."""
    spec = None
    with contextlib.suppress(ImportError):
        spec = find_spec("nvidia.nccl")
    places = [str(Path(folder) / "lib" / _NAME) for folder in (spec.submodule_search_locations or [] if spec else [])]
    reasons = []
    for place in (*(place for place in places if Path(place).exists()), _NAME):
        try:
            return ctypes.CDLL(place)
        except OSError as error:
            reasons.append(str(error))
    raise NcclError(f"NCCL can't be loaded: {'; '.join(reasons)}")
