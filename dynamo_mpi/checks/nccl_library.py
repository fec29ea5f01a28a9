# SPDX-License-Identifier: Apache-2.0
"""CUDA's driver (``cuda.h``) and NCCL (``nccl.h``) by their C interfaces, as far as the fabric check needs them. NCCL's functions used here
exist since 2.0; ``ncclCommSplit`` since 2.18.

The engine uses the same library through torch, whose import takes more than five seconds; this needs nothing of torch.
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


class CudaError(RuntimeError):
    """A call of the driver failed; the text is the driver's."""


class Cuda:
    """The CUDA driver of this machine.

    Raises:
        CudaError: it is missing, or can't be initialised.
    """

    def __init__(self) -> None:
        try:
            self._library: Any = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"the CUDA driver can't be loaded: {error}") from None
        self._call("cuInit", 0)

    @property
    def devices(self) -> int:
        """Number of GPUs that this process may use."""
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        return count.value

    def use(self, number: int) -> None:
        """Select a GPU for this thread, by its primary context, as NCCL does."""
        device, context = c_int(), c_void_p()
        self._call("cuDeviceGet", byref(device), number)
        self._call("cuDevicePrimaryCtxRetain", byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def allocate(self, size: int) -> c_uint64:
        """Return ``size`` bytes of the GPU's memory."""
        address = c_uint64()
        self._call("cuMemAlloc_v2", byref(address), c_size_t(size))
        return address

    def write(self, address: c_uint64, data: bytes) -> None:
        """Copy to the GPU, and wait until it is there: a stream of our own does not wait for it (CUDA, "API synchronization behavior")."""
        self._call("cuMemcpyHtoD_v2", address, c_char_p(data), c_size_t(len(data)))
        self._call("cuCtxSynchronize")

    def read(self, address: c_uint64, into: bytearray, size: int) -> None:
        """Copy from the GPU, to the beginning of ``into``."""
        self._call("cuMemcpyDtoH_v2", (ctypes.c_char * size).from_buffer(into), address, c_size_t(size))

    def clear(self, address: c_uint64, size: int) -> None:
        """Overwrite with a value that no message has, and wait until it is done: otherwise it could overwrite the next message."""
        self._call("cuMemsetD8_v2", address, ctypes.c_ubyte(0xFF), c_size_t(size))
        self._call("cuCtxSynchronize")

    def stream(self) -> c_void_p:
        """Return a new stream."""
        made = c_void_p()
        self._call("cuStreamCreate", byref(made), 1)  # CU_STREAM_NON_BLOCKING
        return made

    def wait(self, stream: c_void_p) -> None:
        """Wait until all work of a stream is done."""
        self._call("cuStreamSynchronize", stream)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            said = c_char_p()
            known = self._library.cuGetErrorString(code, byref(said)) == 0 and said.value
            raise CudaError(f"{name}: {said.value.decode() if known and said.value else f'error {code}'}")


ID_BYTES = 128
_INT8, _INT32, _SUM, _MIN = 0, 2, 0, 3
_NAME = "libnccl.so.2"


class NcclError(RuntimeError):
    """A call of NCCL failed, or the library is missing; the text is NCCL's."""


class _UniqueId(ctypes.Structure):
    # nccl.h declares an array of char, but ctypes would cut that at the first zero
    _fields_ = (("internal", ctypes.c_ubyte * ID_BYTES),)


class Nccl:
    """The loaded library.

    Raises:
        NcclError: it can't be loaded.
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
        # from 2.9 on, 22809 means 2.28.9
        major, rest = divmod(number.value, 10000 if number.value >= 10000 else 1000)
        return f"{major}.{rest // 100}.{rest % 100}"

    def unique_id(self) -> bytes:
        """Create the id of a communicator, which all its ranks need."""
        made = _UniqueId()
        self._call("ncclGetUniqueId", byref(made))
        return bytes(made.internal)

    def join(self, unique_id: bytes, size: int, rank: int) -> c_void_p:
        """Join a communicator. Waits for all its ranks."""
        comm = c_void_p()
        self._call("ncclCommInitRank", byref(comm), size, _UniqueId.from_buffer_copy(unique_id), rank)
        return comm

    def split(self, comm: c_void_p, colour: int, key: int) -> c_void_p:
        """Create a communicator of the ranks with the same colour. Collective over ``comm``."""
        made = c_void_p()
        self._call("ncclCommSplit", comm, colour, key, byref(made), None)
        return made

    def all_reduce(self, sent: c_uint64, got: c_uint64, size: int, comm: c_void_p, stream: c_void_p) -> None:
        """Sum 32-bit integers over all ranks."""
        self._call("ncclAllReduce", sent, got, size // 4, _INT32, _SUM, comm, stream)

    def minimum(self, sent: c_uint64, got: c_uint64, comm: c_void_p, stream: c_void_p) -> None:
        """Find the minimum of the ranks' 32-bit integers."""
        self._call("ncclAllReduce", sent, got, 1, _INT32, _MIN, comm, stream)

    def exchange(self, parts: Iterator[tuple[int, int, int, int]], comm: c_void_p, stream: c_void_p) -> None:
        """Send to and receive from several ranks at once.

        Args:
            parts: for each rank of ``comm``: its number, the address of the data to send, the address for received data, and the number of
                bytes.
            comm: the communicator.
            stream: the stream of the operation.
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
    """Load the library that torch would load: that of the package that PyPI's torch installs, otherwise the system's, as in NVIDIA's
    containers."""
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
