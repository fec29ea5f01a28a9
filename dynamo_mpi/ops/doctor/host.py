# SPDX-License-Identifier: Apache-2.0
"""Doctor's checks of this host: shared memory with its unused files, limits, CPUs, memory, the folder for temporary files."""

from __future__ import annotations

import os
import resource
import shlex
import socket
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.checks.gpu_facts import NodeGpus, device_files
from dynamo_mpi.checks.host_facts import HostFacts, room
from dynamo_mpi.checks.host_rules import check_shared_memory
from dynamo_mpi.checks.rank_facts import RankFacts
from dynamo_mpi.common.cgroup import CgroupLimits, read_limits
from dynamo_mpi.common.process import SERVING_FILES
from dynamo_mpi.layout.format import counted, gib, listed
from dynamo_mpi.ops.doctor.check import Check, Context, Probe, Section, error_or_warning, of_finding, ok, warning
from dynamo_mpi.ops.doctor.staged import check_staged
from dynamo_mpi.supervisor.leftovers import paths_in_use

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

# no process has a file open for a moment while it is created
_YOUNG_SECONDS = 60.0


class Segment(NamedTuple):
    """A file of this user in shared memory.

    Args:
        path: its path.
        size: its bytes.
        age: seconds since the last write.
    """

    path: str
    size: int
    age: float


def own_segments(folder: str) -> list[Segment]:
    """Return this user's files in the folder and its subfolders."""
    now = time.time()
    found = []
    for path in _files(folder):
        try:
            stat = os.lstat(path)
        except OSError:
            continue  # removed since
        if stat.st_uid == os.getuid():
            found.append(Segment(path, stat.st_size, max(0.0, now - stat.st_mtime)))
    return found


def unused(segments: Iterable[Segment], in_use: set[str]) -> list[Segment]:
    """Return the files that no process has mapped or open, the largest first."""
    left = [one for one in segments if one.path not in in_use and one.age > _YOUNG_SECONDS]
    return sorted(left, key=lambda one: -one.size)


def _files(folder: str) -> Iterable[str]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            try:
                yield from sorted(one.path for one in os.scandir(entry.path) if one.is_file(follow_symlinks=False))
            except OSError:
                continue
        else:
            yield entry.path


SHM = "/dev/shm"  # noqa: S108 - not a temporary file: the mount that MPI and NCCL use
# engines on many GPUs, their caches and a frontend's clients stay well below it
_FILES = 4096
_MOST_NAMES, _MOST_REMOVED = 3, 20
_GIB = 2**30
_NEARLY_FULL = 0.95
_TMP_BYTES = _GIB


def check_shm(context: Context) -> Iterator[Check]:
    """Check whether shared memory is large enough for the ranks of this node."""
    size, free = room(SHM)
    yield judge_shm(size, free, ranks_here(context))


def ranks_here(context: Context) -> int:
    """Return the number of ranks on this node, or, outside a worker, its number of GPUs."""
    return context.launch.local_size or max(1, device_files())


def judge_shm(size: int, free: int, ranks: int) -> Check:
    """Evaluate shared memory by the preflight's rule V3."""
    facts = HostFacts(True, "", shm_path=SHM, shm_bytes=size, shm_free=free)
    rows = [RankFacts(0, socket.gethostname(), facts, NodeGpus())] * ranks
    for finding in check_shared_memory(rows):
        return of_finding("shm", finding)
    return ok("shm", f"{SHM}: {gib(free)} of {gib(size)} free, for {counted(ranks, 'rank')}")


def check_leftovers(context: Context) -> Iterator[Check]:
    """Check for files of earlier processes in shared memory."""
    segments = own_segments(SHM)
    yield judge_leftovers(unused(segments, paths_in_use(SHM)) if segments else [])


def judge_leftovers(left: Sequence[Segment]) -> Check:
    """Evaluate this user's files that no visible process uses."""
    if not left:
        return ok("leftovers", f"{SHM} holds nothing of yours that isn't in use")
    paths = [one.path for one in left]
    more = len(paths) - _MOST_NAMES
    return warning(
        "leftovers",
        f"{counted(len(left), 'file')} of yours that no process seen from here has open, {gib(sum(one.size for one in left))}: "
        + listed(paths[:_MOST_NAMES])
        + (f" and {more} more" if more > 0 else ""),
        "none: they take memory until they are removed, and some names can't be created twice (V4)",
        "if nothing of yours runs in another container on this node, and you have put none of it there to keep: "
        f"rm {shlex.join(paths[:_MOST_REMOVED])}",
    )


def check_limits(context: Context) -> Iterator[Check]:
    """Check the limits of this process, which ranks inherit."""
    rdma = os.path.isdir("/dev/infiniband")
    yield judge_locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK), needed=rdma)
    connections = max(0, context.launch.size - 1)
    yield judge_open_files(resource.getrlimit(resource.RLIMIT_NOFILE), connections)
    yield judge_core(resource.getrlimit(resource.RLIMIT_CORE))


def judge_locked_memory(limit: tuple[int, int], *, needed: bool) -> Check:
    """Evaluate the limit of locked memory: RDMA locks its buffers."""
    soft = limit[0]
    if soft == resource.RLIM_INFINITY:
        return ok("memlock", "unlimited")
    found = f"{soft // 1024} KiB may be locked"
    if not needed:
        return ok("memlock", f"{found}; enough without RDMA devices")
    fix = "ulimit -l unlimited where ranks are started, LimitMEMLOCK=infinity of slurmd's unit, docker run --ulimit memlock=-1"
    return warning("memlock", found, "unlimited: UCX and NCCL lock what RDMA sends from", fix)


def judge_open_files(limit: tuple[int, int], connections: int) -> Check:
    """Evaluate the limit of open files. Rank 0 raises a soft limit itself, but not a hard one.

    Args:
        limit: soft, hard.
        connections: number of rank 0's connections to the other ranks of the current world.
    """
    hard, needed = limit[1], connections + SERVING_FILES
    if hard == resource.RLIM_INFINITY or hard >= max(_FILES, needed):
        return ok("open-files", "unlimited" if hard == resource.RLIM_INFINITY else f"up to {hard}")
    fix = f"ulimit -n {max(_FILES, needed)}, LimitNOFILE= of slurmd's unit, docker run --ulimit nofile="
    wanted = f"{max(_FILES, needed)}: rank 0 holds a connection to every other rank, and serves"
    return error_or_warning("open-files", f"at most {hard}", wanted, fix, fatal=hard < needed and connections > 0)


def judge_core(limit: tuple[int, int]) -> Check:
    """Report whether a crash writes a core file."""
    soft = limit[0]
    size = "without a limit" if soft == resource.RLIM_INFINITY else "none" if soft == 0 else f"up to {gib(soft)}"
    return ok("core", f"core dumps: {size}")


def check_processor(context: Context) -> Iterator[Check]:
    """Check CPUs and memory within the cgroup's limits."""
    limits = read_limits()
    yield judge_cpus(len(os.sched_getaffinity(0)), os.cpu_count() or 1, limits, in_rank=context.in_rank)
    yield judge_memory(limits, _available(Path("/proc/meminfo")))


def judge_cpus(usable: int, there: int, limits: CgroupLimits, *, in_rank: bool) -> Check:
    """Evaluate the CPUs on which this process may run (V5)."""
    share = f", of which the cgroup gives the time of {limits.cpus:g}" if limits.cpus is not None else ""
    found = f"{usable} of {counted(there, 'CPU')}{share}"
    if in_rank and usable == 1 and there > 1:
        needed = "several CPUs for each rank: the engine, NCCL and MPI have threads of their own (V5)"
        return warning("cpus", found, needed, "srun --cpus-per-task=N (or --cpu-bind=none), mpirun --bind-to none")
    return ok("cpus", found)


def judge_memory(limits: CgroupLimits, available: int) -> Check:
    """Evaluate the memory that is still available to this process."""
    if limits.memory is None:
        return ok("memory", f"{gib(available)} available, no limit of a cgroup")
    found = (
        f"{gib(limits.memory_used)} of the cgroup's {gib(limits.memory)} used; {gib(available)} available on the host"
    )
    if limits.memory_used > limits.memory * _NEARLY_FULL:
        needed = "memory for the next processes: the kernel kills a process that exceeds the limit, with SIGKILL"
        return warning("memory", found, needed, "srun --mem=0 takes all of a node's; end what isn't needed")
    return ok("memory", found)


def check_temporary(context: Context) -> Iterator[Check]:
    """Check whether files can be created in the folder that MPI and the engine use."""
    folder = context.environ.get("TMPDIR") or "/tmp"  # noqa: S108 - what everybody else takes; nothing is written by a fixed name
    try:
        with tempfile.TemporaryFile(dir=folder):
            problem = ""
    except OSError as failure:
        problem = failure.strerror or type(failure).__name__
    yield judge_temporary(folder, problem, room(folder)[1])


def judge_temporary(folder: str, problem: str, free: int) -> Check:
    """Evaluate the folder for temporary files."""
    if problem:
        needed = "a folder that can be written: MPI keeps its session there"
        return error_or_warning("tmp", f"{folder}: {problem}", needed, "TMPDIR names another", fatal=True)
    if free < _TMP_BYTES:
        return warning(
            "tmp",
            f"{folder}: {gib(free)} free",
            f"{gib(_TMP_BYTES)}",
            "remove what isn't needed, or TMPDIR names another",
        )
    return ok("tmp", f"{folder}: {gib(free)} free")


def _available(path: Path) -> int:
    """Return the available memory in bytes, from /proc/meminfo."""
    try:
        rows = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines() if ":" in line)
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return 0


SECTION = Section(
    "host",
    (
        Probe("shm", check_shm),
        Probe("leftovers", check_leftovers),
        Probe("limits", check_limits),
        Probe("cpus", check_processor),
        Probe("tmp", check_temporary),
        Probe("staged", check_staged),
    ),
)
