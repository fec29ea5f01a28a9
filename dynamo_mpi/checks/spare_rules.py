# SPDX-License-Identifier: Apache-2.0
"""Whether a spare node can take the place of a worker's node: the preflight's rules over the two, before the spare is needed. Pure.

What the preflight would refuse, and any difference of versions, makes a spare unfit. Files that differ make it doubtful: one that was
edited after the worker's start is the same for both at its next one. Another difference is a note: a worker starts with it, with a warning.
MPI's placement, variables and threads are the ranks' own, and can't be judged before there are ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.checks import gpu_rules, host_rules
from dynamo_mpi.checks.node_facts import UNREADABLE
from dynamo_mpi.checks.node_probe import describe
from dynamo_mpi.checks.rank_facts import RankFacts
from dynamo_mpi.layout.finding import Severity, error
from dynamo_mpi.layout.format import listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.checks.node_facts import NodeFacts
    from dynamo_mpi.layout.finding import Finding

# a warning, but a difference of versions
_DECISIVE = ("D10",)


class Comparison(NamedTuple):
    """What speaks against a spare.

    Args:
        problems: why no worker can run there together with the other nodes.
        files: files that differ from those with which the worker has started.
        notes: what a worker's preflight would warn of.
    """

    problems: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def compare(worker: NodeFacts, spare: NodeFacts) -> Comparison:
    """Compare a spare with a node of a worker that serves."""
    findings = _findings(worker, spare)
    decisive = [each for each in findings if each.severity is Severity.ERROR or each.rule in _DECISIVE]
    notes = [each for each in findings if each not in decisive]
    problems = (*_software(worker, spare), *map(describe, decisive))
    return Comparison(problems, tuple(_files(worker, spare)), (*map(describe, notes), *_caches(worker, spare)))


def _software(worker: NodeFacts, spare: NodeFacts) -> Iterator[str]:
    if spare.version != worker.version:
        yield f"P4: dynamo_mpi {spare.version}, on {worker.host} {worker.version}"
    if spare.python != worker.python:
        yield f"P4: Python is {spare.python}, on {worker.host} {worker.python}"


def _files(worker: NodeFacts, spare: NodeFacts) -> Iterator[str]:
    """P2, P3: the files that the ranks of a worker must have alike."""
    if worker.model_dir == spare.model_dir and worker.weight_names != spare.weight_names:
        counts = f"{spare.weights} of them, {worker.weights} on {worker.host}"
        yield f"P3: {spare.model_dir} has other weight files: {counts}"
    for path, digest in worker.files.items():
        is_model = bool(spare.model_dir) and path.startswith(f"{worker.model_dir}/")
        if path not in spare.files and is_model and worker.model_dir == spare.model_dir:
            yield f"P3: {path} isn't there"
        elif path in spare.files and digest != spare.files[path]:
            yield f"{'P3' if is_model else 'P2'}: {path} differs from that on {worker.host}"


def _caches(worker: NodeFacts, spare: NodeFacts) -> Iterator[str]:
    """Say why the worker's compile caches wouldn't be found from the spare: their key has the platform, GPU and driver of each rank."""
    if spare.caches.startswith(UNREADABLE):
        yield f"compile caches: {spare.caches.removeprefix(UNREADABLE)}, so a start here compiles kernels"
    if not spare.caches or worker.facts is None or spare.facts is None:
        return
    theirs = {**dict(worker.facts.platform), **_gpu_of(worker)}
    own = {**dict(spare.facts.platform), **_gpu_of(spare)}
    if unlike := [name for name in {**theirs, **own} if theirs.get(name) != own.get(name)]:
        yield f"compile caches: those for {worker.host} aren't for this node's {listed(unlike)}, so a first start here compiles kernels"


def _gpu_of(node: NodeFacts) -> dict[str, str]:
    gpus = node.gpus
    kinds = sorted({gpu.name for gpu in gpus.visible_gpus})
    return {"GPU": ", ".join(kinds), "driver": gpus.driver}


def _findings(worker: NodeFacts, spare: NodeFacts) -> list[Finding]:
    hosts, gpus = (worker.facts, spare.facts), (worker.gpus, spare.gpus)
    if hosts[0] is None or hosts[1] is None:
        return []
    pair = [RankFacts(0, worker.host, hosts[0], gpus[0]), RankFacts(1, spare.host, hosts[1], gpus[1])]
    # as many ranks would share the node's shared memory
    alone = [pair[1]._replace(rank=rank) for rank in range(max(1, len(gpus[0].visible)))]
    found = [*host_rules.check_packages(pair), *host_rules.check_leftovers(alone[:1])]
    if hosts[1].mpi_library:
        found += host_rules.check_mpi(pair)
    found += host_rules.check_shared_memory(alone)
    return [*found, *_gpu_findings(pair)] if worker.gpu_facts else found


def _gpu_findings(pair: Sequence[RankFacts]) -> Iterator[Finding]:
    worker, spare = (row.gpus for row in pair)
    if worker.visible and not spare.visible:
        why = f": {spare.problem}" if spare.problem else ""
        yield error(
            "V1",
            "no GPU is seen there",
            found=f"no GPU is seen there{why}",
            expected="the GPUs that the workers' nodes have",
            fix="look at nvidia-smi there, and at the job's --gres or --gpus-per-node",
        )
        return
    for rule in (gpu_rules.check_alike, gpu_rules.check_drivers):
        yield from rule(pair)
    yield from gpu_rules.check_instances([pair[1]._replace(rank=0)])
    # a step of its own may see more than a worker's
    if len(spare.visible) < len(worker.visible):
        yield from gpu_rules.check_counts(pair)
