# SPDX-License-Identifier: Apache-2.0
"""The part of CUDA's driver API that the fabric check needs: memory on one GPU, and a stream. Names are those of ``cuda.h``."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint64, c_void_p
from typing import Any


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
