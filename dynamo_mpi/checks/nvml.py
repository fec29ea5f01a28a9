# SPDX-License-Identifier: Apache-2.0
"""NVML, by nvidia-ml-py: opened for a while, and asked for what a GPU, a driver or nvidia-ml-py may not have. It starts no CUDA context."""

from __future__ import annotations

from contextlib import contextmanager

from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def open_nvml() -> Iterator[Any]:
    """Provide nvidia-ml-py, with NVML open.

    Raises:
        ImportError: nvidia-ml-py isn't installed.
        Exception: NVML's own, of a class for each kind: there is no driver, for instance.
    """
    from importlib import import_module

    nvml = import_module("pynvml")
    nvml.nvmlInit()
    try:
        yield nvml
    finally:
        optional(nvml, "nvmlShutdown")


def optional(nvml: Any, name: str, *args: Any) -> Any:
    """Call what some GPUs, drivers or versions of nvidia-ml-py don't have or don't permit; None then."""
    try:
        return getattr(nvml, name)(*args)
    except Exception:
        return None


def is_hidden(error: Exception) -> bool:
    """Return whether a GPU can't be read as a cgroup keeps it from this process: NVML counts it, CUDA doesn't."""
    return type(error).__name__ == "NVMLError_NoPermission"


def to_text(value: str | bytes) -> str:
    """Return one of NVML's texts, which older releases of nvidia-ml-py give as bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
