# SPDX-License-Identifier: Apache-2.0
"""Rules over which GPUs each rank sees, and which it would use. Pure; rank 0 runs them.

| rule | requirement | |
|---|---|---|
| V1 | every rank sees a GPU, and NVML can be read | error |
| K9 | every rank sees all GPUs of its node, the same as its neighbours, and has one for itself | error |
| K9 | as many GPUs are visible as ranks are on the node | warning |

The engine assigns GPU ``rank % device_count()``. If each node has as many ranks as visible GPUs, that is the local rank.
"""

from __future__ import annotations

from dynamo_mpi.checks.rank_facts import by_host, lines, on_hosts, where
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.finding import error, warning
from dynamo_mpi.layout.format import counted, listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.checks.rank_facts import RankFacts
    from dynamo_mpi.layout.finding import Finding

_ALL_GPUS = "every rank sees all GPUs of its node: the engine gives a rank number rank % device_count() of them"
_WHOLE_NODE = (
    "ask for the GPUs of a node, not of a task: srun --gpus-per-node={count} without --gpus-per-task and --gpu-bind"
)


def check_seen(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    """V1: every rank sees a GPU, or nothing could be loaded; ``--allow-no-gpu`` skips all rules about GPUs."""
    blind = [row for row in rows if not row.gpus.visible or row.gpus.problem]
    if not blind:
        return
    reasons: dict[str, list[RankFacts]] = {}
    for row in blind:
        reasons.setdefault(_why_blind(row), []).append(row)
    if len(blind) == len(rows) and not any(row.gpus.visible for row in rows):
        message = "no rank sees a GPU"
        details = [f"{reason}: {on_hosts(row.host for row in some)}" for reason, some in reasons.items()]
    else:
        message = f"some ranks can't see a GPU, or not all: {where(blind, rows)}"
        details = [f"{reason}: {where(some, rows)}" for reason, some in reasons.items()]
    yield error(
        "V1",
        message,
        found=lines(details),
        expected="NVIDIA GPUs in every rank, and NVML to look at them before anything is loaded",
        fix="ask for GPUs (sbatch or srun --gpus-per-node=N), and start the container with them; where there are to be none, "
        "--allow-no-gpu leaves these checks out",
    )


def _why_blind(row: RankFacts) -> str:
    if row.gpus.problem:
        return row.gpus.problem
    said = row.facts.variable("CUDA_VISIBLE_DEVICES")
    if not row.gpus.gpus or said is None:
        return "NVML shows no GPU"
    count = len(row.gpus.gpus)
    return (
        f"CUDA_VISIBLE_DEVICES={said!r} hides {'the only GPU' if count == 1 else f'all {count} GPUs'}"
        if said
        else "CUDA_VISIBLE_DEVICES is empty"
    )


def check_visible(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    """K9: every rank sees all GPUs of its node, and its neighbours see the same ones. One visible GPU for each rank suits the engine's choice
    of a device, but nothing else in it (``base_worker.py``, ``LLM.__init__``)."""
    single: list[RankFacts] = []
    unequal: list[RankFacts] = []
    for some in by_host(rows).values():
        seen = {frozenset(row.gpus.visible) for row in some}
        if len(seen) > 1 and all(len(names) == 1 for names in seen):
            single += some
        elif len({row.gpus.visible for row in some}) > 1 and all(seen):  # V1 reports ranks that see none
            unequal += some
    if single:
        per_node = max(map(len, by_host(single).values()))
        yield error(
            "K9",
            f"each rank sees one GPU only, and not the same: {where(single, rows)}",
            found=_seen(single),
            expected=_ALL_GPUS,
            fix=_WHOLE_NODE.format(count=per_node),
        )
    if unequal:
        per_node = max(len(row.gpus.visible) for row in unequal)
        yield error(
            "K9",
            f"ranks of one node see different GPUs, or in another order: {where(unequal, rows)}",
            found=_seen(unequal),
            expected=_ALL_GPUS,
            fix=f"{_WHOLE_NODE.format(count=per_node)}, and leave CUDA_VISIBLE_DEVICES to Slurm",
        )
    if not single and not unequal:
        yield from _spare_gpus(rows)


def _seen(some: Sequence[RankFacts]) -> str:
    said = {
        row.rank: f"CUDA_VISIBLE_DEVICES={value}"
        for row in some
        if (value := row.facts.variable("CUDA_VISIBLE_DEVICES")) is not None
    }
    return lines(
        [
            f"rank {row.rank} on {row.host} sees {_short(row.gpus.visible)} of {len(row.gpus.gpus)}"
            + (f" ({said[row.rank]})" if row.rank in said else "")
            for row in some
        ]
    )


def _short(names: Sequence[str]) -> str:
    """Shorten names of GPUs to the part that identifies them."""
    return listed(name if len(name) <= 12 else f"{name[:12]}…" for name in names) or "none"


def _spare_gpus(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    """Report GPUs that no rank uses, if the engine would assign the wrong ones or it is likely a mistake."""
    nodes = by_host(rows)
    for some in nodes.values():
        visible, there = len(some[0].gpus.visible), len(some[0].gpus.gpus)
        astray = any(row.rank % visible != place for place, row in enumerate(some)) if visible else False
        if visible > len(some) and (visible < there or (astray and len(nodes) > 1)):
            yield warning(
                "K9",
                f"each rank sees {visible} GPUs, but a node has only {counted(len(some), 'rank')}",
                found=f"{where(some, rows)}: {visible} of {counted(there, 'GPU')} visible; "
                f"rank {some[0].rank} takes number {some[0].rank % visible}",
                expected="as many visible GPUs as ranks on each node: a rank takes GPU rank % visible, whatever its place on the node",
                fix=f"srun --gpus-per-node={len(some)}, or {visible} ranks on each node",
            )
            return


def check_shared(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    """K9: no two ranks take one GPU, on a node with fewer GPUs than ranks or in two containers of one machine."""
    short = [some for some in by_host(rows).values() if 0 < len(some[0].gpus.visible) < len(some) and agree(some)]
    if short:
        ranks, gpus = len(short[0]), len(short[0][0].gpus.visible)
        all_short = [row for some in short for row in some]
        yield error(
            "K9",
            f"{ranks} ranks would share {counted(gpus, 'GPU')}: {where(all_short, rows)}",
            found=lines([_few(some) for some in short]),
            expected="a GPU for each rank",
            fix=f"srun --gpus-per-node={ranks}, or --ntasks-per-node={gpus} with a layout for as many ranks",
        )
    takers: dict[str, list[RankFacts]] = {}
    for row in rows:
        if (name := row.gpus.taken_by(row.rank)) and not name.startswith("#"):
            takers.setdefault(name, []).append(row)
    twice = {name: some for name, some in takers.items() if len({row.host for row in some}) > 1}
    if twice:
        yield error(
            "K9",
            "ranks in different hosts or containers would take the same GPU",
            found=lines([f"{name}: {where(some, rows)}" for name, some in twice.items()]),
            expected="a GPU for each rank",
            fix="give each container GPUs of its own, or start one container for each node",
        )


def _few(some: Sequence[RankFacts]) -> str:
    """Describe what the ranks of one node see, and what hides the rest of its GPUs."""
    first = some[0]
    text = f"{first.host}: {len(some)} ranks see {counted(len(first.gpus.visible), 'GPU')}"
    said = first.facts.variable("CUDA_VISIBLE_DEVICES")
    if said is None or len(first.gpus.gpus) <= len(first.gpus.visible):
        return text
    return f"{text} of {len(first.gpus.gpus)} (CUDA_VISIBLE_DEVICES={said})"


def agree(some: Sequence[RankFacts]) -> bool:
    """Return whether all ranks of a node see the same GPUs."""
    return len({row.gpus.visible for row in some}) == 1


RULES = (check_seen, check_visible, check_shared)
