# SPDX-License-Identifier: Apache-2.0
"""The CPUs on which this process runs, and the memory nodes from which it allocates, as the kernel has them.

Both are attributes of a thread. A new thread or process inherits those of the thread that starts it.
"""

from __future__ import annotations

import contextlib
import os

from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

POLICY_DEFAULT, POLICY_PREFERRED, POLICY_BIND = 0, 1, 2
"""The kernel's numbers (``linux/mempolicy.h``): allocate where the thread runs; on one node if it has room; only on these nodes."""
# more than any kernel is built for: those that don't exist are ignored
_MOST_CPUS = 8192
_MOST_NODES = 1024
# set_mempolicy and get_mempolicy: glibc has no functions for them
_CALLS = {"x86_64": (238, 239), "aarch64": (237, 236)}
_MOST_PASSES = 10


def parse_list(text: str) -> frozenset[int]:
    """Read a list of numbers as sysfs writes it: ``0-3,8``.

    Raises:
        ValueError: ``text`` isn't such a list.
    """
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if part:
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def format_list(numbers: Iterable[int]) -> str:
    """Write numbers as sysfs does: ``0-3,8``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def allowed_cpus() -> tuple[int, ...]:
    """Return all CPUs that the job's or container's cpuset allows, whatever this thread is bound to; empty if that isn't known.

    The kernel itself answers, for any version of cgroups and in any container: asked for all CPUs, it gives those that are allowed.
    The thread's binding is restored at once. CPUs that the machine's administrator isolated (``isolcpus``) are left out.
    """
    try:
        mine = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, range(_MOST_CPUS))
            return tuple(sorted(os.sched_getaffinity(0) - _isolated()))
        finally:
            os.sched_setaffinity(0, mine)
    except OSError:
        return ()


def _isolated() -> frozenset[int]:
    try:
        with open("/sys/devices/system/cpu/isolated", encoding="utf-8") as stream:
            return parse_list(stream.read())
    except (OSError, ValueError):
        return frozenset()


def bind_threads(cpus: Iterable[int]) -> None:
    """Bind all threads of this process: MPI's, for one, run before the GPU's CPUs are known.

    Raises:
        OSError: the kernel refuses; some threads may be bound.
    """
    chosen, done = frozenset(cpus), set[int]()
    for _ in range(_MOST_PASSES):  # a thread that isn't bound yet may have started another
        fresh = {int(name) for name in os.listdir("/proc/self/task")} - done
        if not fresh:
            return
        for thread in fresh:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(thread, chosen)
        done |= fresh


def memory_policy() -> int:
    """Return the policy by which this thread allocates memory.

    Raises:
        OSError: the kernel refuses, or has no NUMA.
    """
    from ctypes import byref, c_int

    mode = c_int()
    _call(1, byref(mode), None, 0, None, 0)
    return mode.value & 0xFFF  # without the flags


def set_memory_policy(policy: int, nodes: Iterable[int] = ()) -> None:
    """Set the policy by which this thread, and those that it starts, allocate memory from now on.

    Args:
        policy: one of ``POLICY_*``.
        nodes: NUMA nodes; none for ``POLICY_DEFAULT``.

    Raises:
        OSError: the kernel refuses (Docker allows it only with ``--cap-add SYS_NICE``), or has no NUMA.
    """
    from ctypes import c_ulong, sizeof

    bits = 8 * sizeof(c_ulong)
    mask = (c_ulong * (_MOST_NODES // bits))()
    for node in nodes:
        mask[node // bits] |= 1 << node % bits
    # the kernel reads one bit fewer than it is given
    _call(0, policy, mask if any(mask) else None, _MOST_NODES + 1 if any(mask) else 0)


def release() -> None:
    """Let this thread, and those that it starts, run on all CPUs of the job again, and allocate where they run. A binding to several memory
    nodes stays: it keeps memory out of the GPUs'."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, range(_MOST_CPUS))
    with contextlib.suppress(OSError):
        if memory_policy() == POLICY_PREFERRED:
            set_memory_policy(POLICY_DEFAULT)


def _call(which: int, *arguments: object) -> None:
    import ctypes
    import errno

    numbers = _CALLS.get(os.uname().machine)
    if numbers is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    library = ctypes.CDLL(None, use_errno=True)
    if library.syscall(ctypes.c_long(numbers[which]), *words) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
