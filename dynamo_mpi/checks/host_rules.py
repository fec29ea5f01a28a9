# SPDX-License-Identifier: Apache-2.0
"""Rules over the hosts, for a worker of TensorRT-LLM. Pure; rank 0 runs them.

| rule | requirement | |
|---|---|---|
| D10 | the packages that provide kernels and collectives have one version on all nodes | error |
| D10 | so have the other packages | warning |
| D10 | TensorRT-LLM is installed | error |
| K1 | the MPI library is Open MPI, the same everywhere | error |
| V3 | /dev/shm has room | warning |
| V4 | no earlier worker left its segments there | warning |
| V5 | a rank's threads have CPUs to run on | warning |
| V7 | what the engine reads from the environment is the same in every rank | warning |

`gpu_visibility` has V1 and K9, `gpu_rules` G6, V2, V6, V8 and V16.
"""

from __future__ import annotations

from dynamo_mpi.checks import gpu_rules
from dynamo_mpi.checks.host_facts import DECISIVE_PACKAGES, PACKAGES
from dynamo_mpi.checks.rank_facts import Requirements, by_host, groups, lines, on_hosts, where
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.finding import error, warning
from dynamo_mpi.layout.format import counted, gib, listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.checks.rank_facts import RankFacts
    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.memory import MemoryEstimate

_GIB = 2**30
# NVIDIA asks for this size in its containers (--shm-size=1g), Docker's default is 64 MiB: NCCL, Open MPI and torch each keep some tens of
# MiB for a pair of ranks there, and fail in the middle of the load if it runs out
_SHM_PER_RANK = _GIB
_MOST_VALUES = 4
# rules of their own (V5, K9) check these, and know which differences are allowed
_JUDGED_ELSEWHERE = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
_ONE_IMAGE = "start every rank in the same container image (srun --container-image=..., IMAGE), or install one set of versions everywhere"


def check_hosts(rows: Sequence[RankFacts], needs: Requirements) -> list[Finding]:
    """Apply every rule about hosts and GPUs to the rows, which stand in rank order."""
    ours = (finding for rule in RULES for finding in rule(rows))
    return [*gpu_rules.check_gpus(rows, needs), *ours]


def weights_by_rank(estimate: MemoryEstimate | None) -> tuple[int, ...]:
    """Return the bytes of each rank's weights, by rank; empty if they aren't known. Ranks of a stage are consecutive."""
    if estimate is None:
        return ()
    stages = sorted(estimate.stages, key=lambda stage: stage.first_rank)
    return tuple(stage.loaded_bytes for stage in stages for _ in range(stage.ranks))


def check_packages(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    """D10: all nodes have the same versions. Every rank selects its kernels and its MoE backend from what its own node has; if two ranks
    select different ones, the collectives between them hang (MOE_DEVELOPER_GUIDE, "Cross-rank agreement")."""
    speakers = [row for row in rows if row.facts.speaks_for_node]
    differing = {}
    for package in PACKAGES:
        versions: dict[str, list[str]] = {}
        for row in speakers:
            versions.setdefault(row.facts.version(package) or "missing", []).append(row.host)
        if len(versions) > 1:
            differing[package] = f"{package}: {groups(versions)}"
    decisive = [package for package in differing if package in DECISIVE_PACKAGES]
    others = [package for package in differing if package not in DECISIVE_PACKAGES]
    if decisive:
        yield error(
            "D10",
            f"the nodes have different versions of {listed(decisive)}",
            found=lines([differing[package] for package in decisive]),
            expected="the same on all nodes: each rank picks its kernels by what its node has, and collectives between unlike ones hang",
            fix=_ONE_IMAGE,
        )
    if others:
        yield warning(
            "D10",
            f"the nodes have different versions of {listed(others)}",
            found=lines([differing[package] for package in others]),
            expected="the same on all nodes",
            fix=_ONE_IMAGE,
        )


def check_engine(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    """D10: TensorRT-LLM is installed on at least one node; if only some nodes have it, the versions differ, and that is reported."""
    speakers = [row for row in rows if row.facts.speaks_for_node]
    if speakers and not any(row.facts.version("tensorrt_llm") for row in speakers):
        yield error(
            "D10",
            "TensorRT-LLM isn't installed",
            found=f"no distribution tensorrt_llm on {on_hosts(row.host for row in speakers)}",
            expected="tensorrt_llm in the Python that runs the ranks",
            fix="run inside Dynamo's TensorRT-LLM container (srun --container-image=..., IMAGE); check that this Python is the container's, "
            "or use --engine reference",
        )


def check_mpi(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    """K1: the MPI library is Open MPI, the same on every rank: TensorRT-LLM splits the world with a constant that only Open MPI has."""
    libraries: dict[str, list[RankFacts]] = {}
    for row in rows:
        libraries.setdefault(row.facts.mpi_library or "unknown", []).append(row)
    foreign = {name: some for name, some in libraries.items() if not name.startswith("Open MPI")}
    if foreign:
        yield error(
            "K1",
            f"the MPI library isn't Open MPI: {where([row for some in foreign.values() for row in some], rows)}",
            found=lines([f"{name}: {where(some, rows)}" for name, some in foreign.items()]),
            expected="Open MPI: importing tensorrt_llm splits the world with Open MPI's own kind of split",
            fix="use the container's mpi4py and Open MPI, and start with srun --mpi=pmix or Open MPI's mpirun",
        )
    elif len(libraries) > 1:
        yield error(
            "K1",
            "the ranks run on different versions of Open MPI",
            found=lines([f"{name}: {where(some, rows)}" for name, some in libraries.items()]),
            expected="one version in all ranks",
            fix=_ONE_IMAGE,
        )


def check_shared_memory(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    """V3: /dev/shm has 1 GiB free for each rank of the node: NCCL, Open MPI and torch keep buffers there."""
    short = []
    most = 0
    for host, some in by_host(rows).items():
        facts = next((row.facts for row in some if row.facts.speaks_for_node), None)
        if facts is None or facts.shm_free >= len(some) * _SHM_PER_RANK:
            continue
        most = max(most, len(some))
        size = f"{gib(facts.shm_free)} of {gib(facts.shm_bytes)} free" if facts.shm_bytes else "not there"
        short.append(f"{host}: {facts.shm_path} {size}, {counted(len(some), 'rank')}")
    if short:
        size_needed = most * _SHM_PER_RANK // _GIB
        yield warning(
            "V3",
            "there is little room in shared memory",
            found=lines(short),
            expected="1 GiB for each rank of a node: NCCL, Open MPI and torch fail in the middle of the load if it runs out",
            fix=f"docker run --shm-size={size_needed}g (or --ipc=host); where a container sees the host's own /dev/shm, as under enroot and "
            f"Apptainer, on the host as root: mount -o remount,size={size_needed}G /dev/shm",
        )


def check_leftovers(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    """V4: no earlier worker left segments of its load balancer in /dev/shm: they take memory, and a new one of the same name can't be made
    (``moe_load_balancer.py``: ``FileExistsError``)."""
    found, paths = [], []
    for row in rows:
        left = row.facts.leftovers
        if not left:
            continue
        total, youngest = sum(one.size for one in left), min(one.age for one in left)
        names = listed([one.name for one in left[:3]]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        found.append(f"{row.host}: {names}: {gib(total)}, written {_age(youngest)} ago or earlier")
        paths.append(row.facts.shm_path)
    if found:
        yield warning(
            "V4",
            "earlier workers of yours may have left segments in shared memory",
            found=lines(found),
            expected="none, unless another worker of yours runs there now: they take memory, and a load balancer fails on names that exist",
            fix=f"if none runs there: rm {paths[0]}/moe_* on {on_hosts(row.host for row in rows if row.facts.leftovers)}",
        )


def _age(seconds: int) -> str:
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            return counted(seconds // size, unit)
    return counted(seconds, "second")


def check_threads(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    """V5: OMP_NUM_THREADS is set, and all ranks of a node with as many threads each fit its CPUs; no rank is bound to a single CPU."""
    unset: list[RankFacts] = []
    crowded: list[str] = []
    values: list[int] = []
    for host, some in by_host(rows).items():
        cpus = len({cpu for row in some for cpu in row.facts.cpus})
        if not cpus:
            continue
        asked = {row.rank: _threads(row) for row in some}
        fits = max(1, cpus // len(some))
        total = sum(count or 0 for count in asked.values())
        # not set, or no number: each library then starts a thread for every CPU, in every rank
        if bare := [row for row in some if asked[row.rank] is None and len(some) * len(row.facts.cpus) > cpus]:
            unset += bare
            values.append(fits)
        elif total > cpus and total > len(some):
            crowded.append(
                f"{host}: {counted(len(some), 'rank')} x {max(count or 0 for count in asked.values())} threads on {counted(cpus, 'CPU')}"
            )
            values.append(fits)
    if unset:
        yield warning(
            "V5",
            f"OMP_NUM_THREADS is not set: {where(unset, rows)}",
            found="each rank would start a thread for each CPU that it may use, on CPUs that it shares",
            expected="the CPUs of a node, shared out among its ranks",
            fix=f"export OMP_NUM_THREADS={min(values)}",
        )
    if crowded:
        yield warning(
            "V5",
            "OMP_NUM_THREADS asks for more threads than there are CPUs",
            found=lines(crowded),
            expected="ranks on the node x OMP_NUM_THREADS <= CPUs of the node",
            fix=f"export OMP_NUM_THREADS={min(values)}",
        )
    if bound := [row for row in rows if len(row.facts.cpus) == 1]:
        yield warning(
            "V5",
            f"ranks may run on one CPU only: {where(bound, rows)}",
            found="one CPU for all threads of a rank: the engine's, NCCL's, MPI's",
            expected="several CPUs for each rank",
            fix="mpirun --bind-to none, srun --cpus-per-task=N (or --cpu-bind=none)",
        )


def _threads(row: RankFacts) -> int | None:
    """Read OMP_NUM_THREADS; of a list for nested loops the first."""
    first = (row.facts.variable("OMP_NUM_THREADS") or "").split(",")[0].strip()
    return int(first) if first.isascii() and first.isdecimal() and len(first) < 7 and int(first) else None


def check_variables(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    """V7: the engine reads many switches from each rank's own environment, and ranks with different ones do different things (D10, D12)."""
    names = sorted({name for row in rows for name, _ in row.facts.variables} - set(_JUDGED_ELSEWHERE))
    found = []
    for name in names:
        values: dict[str, list[RankFacts]] = {}
        for row in rows:
            value = row.facts.variable(name)
            values.setdefault("unset" if value is None else repr(value), []).append(row)
        if len(values) > 1:
            parts = [f"{value} on {where(some, rows)}" for value, some in values.items()]
            more = [f"{len(parts) - _MOST_VALUES} more values"] if len(parts) > _MOST_VALUES else []
            found.append(f"{name}: " + "; ".join([*parts[:_MOST_VALUES], *more]))
    if found:
        yield warning(
            "V7",
            "environment variables that the engine reads differ between ranks",
            found=lines(found),
            expected="the same in every rank, or none",
            fix="set them where the job starts (srun --export=ALL, mpirun -x NAME), not in a shell profile of some nodes",
        )


RULES = (
    check_packages,
    check_engine,
    check_mpi,
    check_shared_memory,
    check_leftovers,
    check_threads,
    check_variables,
)
