# SPDX-License-Identifier: Apache-2.0
"""Facts about a rank's host, read before the engine is imported: importing TensorRT-LLM is itself a collective (K1).

Facts about the whole node, the versions and /dev/shm, are read by one of its ranks: if every rank read the metadata of hundreds of
packages, a shared file system would be overloaded.
"""

from __future__ import annotations

import os

from dynamo_mpi.common.affinity import allowed_cpus, format_list, parse_list
from dynamo_mpi.common.distributions import installed_versions
from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# distributions that ranks compute or communicate with
DECISIVE_PACKAGES = (
    "tensorrt_llm",
    "torch",
    "flashinfer-python",
    "deep_gemm",
    "nvidia-cutlass-dsl",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
# distributions whose versions must agree on all nodes
PACKAGES = (
    *DECISIVE_PACKAGES,
    "mpi4py",
    "nvidia-modelopt",
    "ai-dynamo",
    "ai-dynamo-runtime",
)
UNKNOWN_VERSION = "of unknown version"
# the segments of TensorRT-LLM's expert load balancer have such names: moe_shared_l3_lr0_all
LEFTOVER_PREFIX = "moe_"
_PREFIXES = ("TLLM_", "TRTLLM_", "TRT_LLM_")
_OTHERS = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NCCL_ALGO", "NCCL_PROTO")
# these may differ between ranks: the channel to the leader, logs, caches and diagnostics
_FREE = ("TLLM_SPAWN_PROXY_PROCESS", "TLLM_LOG_", "TLLM_PROFILE_", "TRTLLM_CACHE_DIR", "TRTLLM_PRINT_STACKS_PERIOD")
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
_LONGEST_VALUE = 200
_HEAD = 11


class StaleFile(NamedTuple):
    """A file in /dev/shm that an earlier worker of this user may have left.

    Args:
        name: its name there.
        size: its bytes.
        age: seconds since the last write.
    """

    name: str
    size: int
    age: int


class HostFacts(NamedTuple):
    """One rank's host.

    Args:
        speaks_for_node: whether this rank read the facts of the node; others have no ``versions``, ``platform``, ``shm_*``, ``leftovers``.
        mpi_library: the first words of the MPI library's own version text.
        cpus: the CPUs that this rank may run on.
        variables: environment variables that affect the engine, with their values; variables that aren't set are left out.
        versions: distributions with their versions; those that aren't installed are left out.
        shm_path: the folder of shared memory.
        shm_bytes: its size; 0 if it can't be read.
        shm_free: free bytes in it.
        leftovers: files of this user in it that look like an earlier worker's.
        allowed: the CPUs that the job or container allows it; more than ``cpus`` if launcher or user have bound it.
        platform: for what host code is compiled here, from `host_platform`.
    """

    speaks_for_node: bool
    mpi_library: str
    cpus: tuple[int, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    shm_path: str = "/dev/shm"  # noqa: S108 - not a temporary file: the mount that MPI and NCCL use
    shm_bytes: int = 0
    shm_free: int = 0
    leftovers: tuple[StaleFile, ...] = ()
    allowed: tuple[int, ...] = ()
    platform: tuple[tuple[str, str], ...] = ()

    def variable(self, name: str) -> str | None:
        """Return the value of an environment variable; None if it isn't set."""
        return dict(self.variables).get(name)

    def version(self, package: str) -> str | None:
        """Return the version of a distribution; None if it isn't installed."""
        return dict(self.versions).get(package)

    def pack(self) -> tuple[str, ...]:
        """Write it as a flat list of strings, for `dynamo_mpi.common.codec`."""
        counts = (len(self.variables), len(self.versions), len(self.platform), len(self.leftovers))
        return (
            "node" if self.speaks_for_node else "",
            self.mpi_library,
            format_list(self.cpus),
            format_list(self.allowed),
            self.shm_path,
            str(self.shm_bytes),
            str(self.shm_free),
            *map(str, counts),
            *(text for pair in (*self.variables, *self.versions, *self.platform) for text in pair),
            *(str(field) for leftover in self.leftovers for field in leftover),
        )

    @classmethod
    def unpack(cls, values: Sequence[str]) -> HostFacts:
        """Read what `pack` wrote.

        Raises:
            ValueError: ``values`` isn't such a list.
        """
        if len(values) < _HEAD:
            raise ValueError(f"{len(values)} fields are too few for the facts of a host")
        node, library, cpus, allowed, path, size, free = values[:7]
        counts = [int(count) for count in values[7:_HEAD]]
        variables, versions, platform, leftovers = counts
        end = _HEAD + 2 * (variables + versions + platform)
        if min(counts) < 0 or len(values) != end + 3 * leftovers:
            raise ValueError(f"{len(values)} fields can't be the facts of a host")
        pairs = [(values[at], values[at + 1]) for at in range(_HEAD, end, 2)]
        left = (StaleFile(values[at], int(values[at + 1]), int(values[at + 2])) for at in range(end, len(values), 3))
        return cls(
            node == "node",
            library,
            tuple(sorted(parse_list(cpus))),
            tuple(pairs[:variables]),
            tuple(pairs[variables : variables + versions]),
            path,
            int(size),
            int(free),
            tuple(left),
            tuple(sorted(parse_list(allowed))),
            tuple(pairs[variables + versions :]),
        )


def collect(
    mpi_library: str,
    environ: Mapping[str, str],
    *,
    speaks_for_node: bool,
    shm: str = "/dev/shm",  # noqa: S108 - see HostFacts.shm_path
) -> HostFacts:
    """Read the facts of this host. Never raises: what can't be read is left out.

    Args:
        mpi_library: the MPI library's version text, from `world.load_mpi_library`.
        environ: this rank's environment.
        speaks_for_node: also read the facts of the node; one rank of each is enough.
        shm: the folder of shared memory.
    """
    cpus, variables = _cpus(), _variables(environ)
    library = " ".join(mpi_library.replace("\0", "").strip().split("\n")[0].split(",")[0].split())
    allowed = allowed_cpus()
    if not speaks_for_node:
        return HostFacts(False, library, cpus, variables, shm_path=shm, allowed=allowed)
    from dynamo_mpi.common.host_platform import host_platform

    size, free = room(shm)
    left = tuple(_leftovers(shm))
    versions, platform = tuple(_versions()), host_platform(environ)
    return HostFacts(True, library, cpus, variables, versions, shm, size, free, left, allowed, platform)


def _cpus() -> tuple[int, ...]:
    try:
        return tuple(sorted(os.sched_getaffinity(0)))
    except OSError:
        return ()


def _variables(environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return the variables on which ranks must agree. They include no secret: these values are sent to rank 0 and appear in findings."""
    matter = (
        name
        for name in sorted(environ)
        if name in _OTHERS
        or (name.startswith(_PREFIXES) and not name.startswith(_FREE) and not any(word in name for word in _SECRETS))
    )
    return tuple((name, environ[name][:_LONGEST_VALUE]) for name in matter)


def _versions() -> Iterable[tuple[str, str]]:
    found = installed_versions(PACKAGES)
    # a checkout on PYTHONPATH has no metadata
    if "tensorrt_llm" not in found and _can_be_imported("tensorrt_llm"):
        found["tensorrt_llm"] = UNKNOWN_VERSION
    for package in PACKAGES:
        if package in found:
            yield package, found[package] or UNKNOWN_VERSION


def version_of(package: str, module: str = "") -> str | None:
    """Return the version of a distribution without importing it, or None if it isn't installed.

    Args:
        package: the distribution.
        module: the module that it provides; if that can be imported but has no metadata, the version is `UNKNOWN_VERSION`.
    """
    version = installed_versions([package]).get(package)
    if version is None:
        return UNKNOWN_VERSION if module and _can_be_imported(module) else None
    return version or UNKNOWN_VERSION


def _can_be_imported(package: str) -> bool:
    """Look for a package without importing it."""
    from importlib.util import find_spec

    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def room(path: str) -> tuple[int, int]:
    """Return the size of a file system and its free space, in bytes; 0 if they can't be read."""
    try:
        stat = os.statvfs(path)
    except OSError:
        return 0, 0
    return stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize


def _leftovers(path: str) -> Iterable[StaleFile]:
    """Yield this user's segments. A process in another container may still use one; that can't be seen from here."""
    import time

    try:
        names = sorted(name for name in os.listdir(path) if name.startswith(LEFTOVER_PREFIX))
    except OSError:
        return
    for name in names:
        try:
            stat = os.lstat(os.path.join(path, name))
        except OSError:
            continue  # removed since
        if stat.st_uid == os.getuid():
            yield StaleFile(name, stat.st_size, max(0, int(time.time() - stat.st_mtime)))
