# SPDX-License-Identifier: Apache-2.0
"""For what host code is compiled on this node: the CPU's instructions, the C library, the distribution and the CUDA toolkit.

It is read before the preflight result, so it imports nothing that ranks don't have by then.
"""

from __future__ import annotations

import os

from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_INSTRUCTIONS = ("avx", "sse", "ssse", "fma", "bmi", "amx", "f16c", "popcnt", "sve", "asimd", "neon", "i8mm", "bf16")
_RELEASE = ("ID", "VERSION_ID")
_MOST_BYTES = 1 << 16


def host_platform(environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return names with values; what isn't known has none. Does not raise.

    Args:
        environ: the rank's environment, which may name the CUDA toolkit.
    """
    facts = {
        "cpu": cpu_kind(),
        "libc": libc_version(),
        "system": os_release(),
        "cuda toolkit": toolkit_version(environ),
    }
    return tuple((name, value) for name, value in facts.items() if value)


def cpu_kind(path: str = "/proc/cpuinfo") -> str:
    """Return a short text that differs between CPUs with other instructions."""
    from binascii import crc32

    words: list[str] = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    words = sorted(word for word in line.partition(":")[2].split() if word.startswith(_INSTRUCTIONS))
                    break
    except OSError:
        pass
    return f"{os.uname().machine}-{crc32(' '.join(words).encode()):08x}"


def libc_version() -> str:
    """Return the C library's name and version: ``glibc 2.39``; empty if it isn't glibc."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError):
        return ""


def os_release(path: str = "/etc/os-release") -> str:
    """Return the distribution and its version: ``ubuntu 24.04``. Source: os-release(5)."""
    found: dict[str, str] = {}
    for line in _text(path).splitlines():
        name, _, value = line.partition("=")
        found[name.strip()] = value.strip().strip("\"'")
    return " ".join(filter(None, (found.get(name, "") for name in _RELEASE)))


def toolkit_version(environ: Mapping[str, str], usual: str = "/usr/local/cuda") -> str:
    """Return the version of the CUDA toolkit that libraries compile with; empty if none is found.

    It is where torch looks for it (``torch/utils/cpp_extension.py:_find_cuda_home``): ``CUDA_HOME``, ``CUDA_PATH``, the one of nvcc on
    ``PATH``, the usual folder. An nvcc may be a script that is elsewhere, so the first of them that has a version counts.
    """
    homes = [environ.get("CUDA_HOME", ""), environ.get("CUDA_PATH", "")]
    homes += [
        os.path.dirname(os.path.realpath(folder))
        for folder in environ.get("PATH", "").split(os.pathsep)
        if _has_nvcc(folder)
    ]
    return next((version for home in (*homes, usual) if home and (version := _version_in(home))), "")


def _has_nvcc(folder: str) -> bool:
    return os.access(os.path.join(folder, "nvcc"), os.X_OK)


def _version_in(home: str) -> str:
    # {"cuda": {"name": ..., "version": "13.0.1"}, ...}; not all packages have it
    after = _text(os.path.join(home, "version.json")).partition('"cuda"')[2].partition("}")[0]
    if version := after.partition('"version"')[2].partition('"')[2].partition('"')[0]:
        return version
    number = _text(os.path.join(home, "include/cuda.h")).partition("#define CUDA_VERSION ")[2].split("\n")[0].strip()
    return f"{int(number) // 1000}.{int(number) % 1000 // 10}" if number.isascii() and number.isdecimal() else ""


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_MOST_BYTES)
    except OSError:
        return ""
