# SPDX-License-Identifier: Apache-2.0
"""Whether a node can run a worker again: ``python -m dynamo_mpi.checks.node_probe``, one process on the node, without MPI.

`dynamo-mpi launch` runs it after a failure, on the worker's nodes, and in full on spare nodes before they are needed. It prints a line at
once, which shows that the node takes a step, and its result at the end, as JSON. It waits until the ended worker's GPU memory is given back,
and reads the GPUs' health; in full it also runs NCCL between them, and writes down what a worker's preflight would compare.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.checks.gpu_check import HealthRow, check_health
from dynamo_mpi.checks.gpu_health import health_of_node
from dynamo_mpi.checks.gpu_rules import describe_holders, is_busy
from dynamo_mpi.common.process import host_name
from dynamo_mpi.layout.finding import Severity
from dynamo_mpi.layout.format import gib

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dynamo_mpi.checks.gpu_facts import GpuFacts
    from dynamo_mpi.checks.gpu_health import GpuHealth
    from dynamo_mpi.layout.finding import Finding

PREFIX = "dynamo_mpi node probe: "
HERE = f"{PREFIX}here"
# a driver takes seconds to free the memory of a killed process; an orphan never does
MEMORY_SECONDS = 30.0
_LOOK_SECONDS = 0.5
# the rules name ranks, which there are none of here
_RANKS = re.compile(r"(?:rank|GPU) \d+ on [^\s,:]+[,:] ")
# with one of these an engine ends sooner or later; a slow or an odd GPU still computes
_UNFIT = ("V9", "V10", "V12", "V13", "V15")


class ProbeResult(NamedTuple):
    """What a probe found.

    Args:
        problems: why the node can't run a worker; empty if it can.
        domain: the NVLink domain that its GPUs share with those of other nodes; empty if there is none.
    """

    problems: tuple[str, ...] = ()
    domain: str = ""

    @property
    def line(self) -> str:
        """The line that `read_result` reads."""
        return PREFIX + json.dumps({"problems": self.problems, "domain": self.domain})


def read_result(output: str) -> ProbeResult | None:
    """Return what a probe's output reports; None if it has no result (yet)."""
    for line in reversed(output.splitlines()):
        _, found, text = line.partition(PREFIX)
        if found and text.startswith("{"):
            try:
                content = json.loads(text)
                return ProbeResult(tuple(map(str, content["problems"])), str(content.get("domain", "")))
            except (ValueError, KeyError, TypeError):
                return None
    return None


def domain_of(gpus: Sequence[GpuHealth]) -> str:
    """Return the NVLink domain of a node's GPUs, cluster and clique; empty if they have none, or aren't in one."""
    return domain_of_facts([gpu.facts for gpu in gpus if not gpu.problem])


def domain_of_facts(gpus: Sequence[GpuFacts]) -> str:
    """Return the same of GPUs as the preflight reads them."""
    found = {gpu.fabric for gpu in gpus}
    fabric = found.pop() if len(found) == 1 else None
    # a cluster of zero doesn't leave the node
    return "" if fabric is None or fabric.problem or not fabric.cluster else f"{fabric.cluster}.{fabric.clique}"


def wait_for_memory(
    seconds: float, read: Callable[[], list[GpuHealth]] = health_of_node, sleep: Callable[[float], None] = time.sleep
) -> list[GpuHealth]:
    """Read all GPUs, again and again while one has memory in use.

    Args:
        seconds: the longest time.
        read: reads them.
        sleep: waits.
    """
    end = time.monotonic() + seconds
    while True:
        gpus = read()
        if not any(_holds(gpu) for gpu in gpus) or time.monotonic() >= end:
            return gpus
        sleep(_LOOK_SECONDS)


def problems_of(host: str, gpus: Sequence[GpuHealth], waited: float) -> list[str]:
    """Return why a worker can't run on these GPUs.

    Args:
        host: the node's name.
        gpus: all its GPUs.
        waited: seconds for which their memory was waited for.
    """
    kept = [
        f"GPU {gpu.facts.number} has {gib(gpu.facts.used_bytes)} in use {waited:.0f} s after its worker ended: "
        f"{describe_holders(gpu.facts)}"
        for gpu in gpus
        if _holds(gpu)
    ]
    return [*kept, *unfit(check_health([HealthRow(host, gpu) for gpu in gpus]))]


def unfit(findings: Sequence[Finding]) -> list[str]:
    """Return the findings with which a node isn't used."""
    return [describe(each) for each in findings if each.severity is Severity.ERROR or each.rule in _UNFIT]


def describe(finding: Finding) -> str:
    """Return a finding in a line, without ranks."""
    return f"{finding.rule}: {_RANKS.sub('', ' '.join(finding.found.split())) or finding.message}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the probe; return 0, whatever it found."""
    parser = argparse.ArgumentParser(prog="python -m dynamo_mpi.checks.node_probe", description=__doc__)
    parser.add_argument("--full", action="store_true", help="also run NCCL between the GPUs")
    parser.add_argument("--facts", metavar="FILE", help="gets what a preflight compares, of this node and its model")
    parser.add_argument(
        "--engine-config", action="append", default=[], metavar="FILE", help="an engine config of a worker"
    )
    arguments = parser.parse_args(argv)
    print(HERE, flush=True)
    began = time.monotonic()
    gpus = wait_for_memory(MEMORY_SECONDS)
    problems = problems_of(host_name(), gpus, time.monotonic() - began)
    if arguments.facts:
        problems += _write_facts(arguments.facts, arguments.engine_config)
    if arguments.full and gpus and not problems:
        from dynamo_mpi.checks.local_check import check_this_host

        problems = unfit(check_this_host().findings)
    print(ProbeResult(tuple(problems), domain_of(gpus)).line, flush=True)
    return 0


def _write_facts(path: str, engine_configs: Sequence[str]) -> list[str]:
    """Write down what the preflight of a worker would compare; return why it would refuse this node whatever the others have."""
    from dynamo_mpi.checks.node_facts import facts_of_node
    from dynamo_mpi.common.own_files import make_folder, write_own

    facts = facts_of_node(os.environ.get("MODEL_PATH", ""), engine_configs, os.environ)
    try:
        make_folder(os.path.dirname(path))
        write_own(path, json.dumps(facts._asdict()).encode())
    except OSError as error:
        print(f"{path} can't be written: {error.strerror}", file=sys.stderr)
    return facts.problems


def _holds(gpu: GpuHealth) -> bool:
    return not gpu.problem and is_busy(gpu.facts)


if __name__ == "__main__":
    sys.exit(main())
