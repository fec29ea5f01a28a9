# SPDX-License-Identifier: Apache-2.0
"""Binds this rank to its GPU's CPUs and memory node, as rank 0 has decided (`checks.binding`).

It happens after the verdict, as only then the ranks' GPUs are known to be right, and a refused start changes nothing; and before the hardware
checks and the engine, so that all of the engine's threads and memory, and on rank 0 those of ``dynamo.trtllm``, begin in the right place.
Threads that MPI has started are bound too; what they have allocated, some MiB, stays where it is.
"""

from __future__ import annotations

from dynamo_mpi.common.affinity import (
    POLICY_BIND,
    POLICY_DEFAULT,
    POLICY_PREFERRED,
    bind_threads,
    memory_policy,
    parse_list,
    set_memory_policy,
)
from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

ENGINE_VARIABLE = "TLLM_NUMA_AWARE_WORKER_AFFINITY"
"""TensorRT-LLM's: 1 to bind, anything else to leave ranks as they are; unset, it binds a rank that isn't bound and *unbinds* one that is."""
BOUND, FITS = "bound", "fits"
"""Kinds of `binding.RankBinding` that TensorRT-LLM is made to keep: bound by us; by the launcher, to the right CPUs."""


def bind_rank(
    packed: str,
    rank: int,
    environ: MutableMapping[str, str],
    warn: Callable[[str], object],
    note: Callable[[str], object],
) -> None:
    """Do for this rank what rank 0 has decided. Never raises: a rank that can't be bound runs as before, but its memory is still kept out of
    the GPUs' own nodes.

    Args:
        packed: from `binding.pack`.
        rank: this rank.
        environ: its environment: TensorRT-LLM is made to keep the binding, unless the user has decided.
        warn: called with a problem.
        note: called with what is no problem, but worth a line in a debug log.
    """
    for part in packed.split(";"):
        ranks, kind, cpus, node, host_nodes = part.split("|") if part else ("",) * 5
        if rank in parse_list(ranks):
            break
    else:
        return
    is_bound = kind == BOUND and _bind(cpus, warn)
    if is_bound or kind == FITS:
        environ.setdefault(ENGINE_VARIABLE, "0")
    try:
        if memory_policy() != POLICY_DEFAULT:
            note("memory: the policy that launcher or user have set (numactl) is kept")
        elif host_nodes:
            set_memory_policy(POLICY_BIND, parse_list(host_nodes))
        elif is_bound and int(node) >= 0:
            # a preference: where the node is full, memory of another is slower, but no reason to be killed
            set_memory_policy(POLICY_PREFERRED, (int(node),))
    except OSError as error:
        if host_nodes:
            warn(
                f"memory can't be kept out of the GPUs' own NUMA nodes: {error.strerror}\n"
                f"  expected: set_mempolicy is allowed, to allocate on nodes {host_nodes} only\n"
                "  fix:      docker run --cap-add SYS_NICE; or start the ranks under numactl --membind"
            )
        else:
            # the kernel then allocates where a thread runs, which is the same node
            note(f"memory: no policy can be set ({error.strerror})")


def _bind(cpus: str, warn: Callable[[str], object]) -> bool:
    try:
        bind_threads(parse_list(cpus))
    except OSError as error:
        warn(
            f"this rank can't be bound to its GPU's CPUs, {cpus}: {error.strerror}\n"
            "  expected: sched_setaffinity is allowed for a process's own threads, and the job keeps its CPUs\n"
            "  fix:      --cpu-bind none (DYN_MPI_CPU_BIND), or allow it in the container's seccomp profile"
        )
        return False
    return True
