# SPDX-License-Identifier: Apache-2.0
"""The KV check (`dynamo_mpi.checks.kv`) as a step of a deployment: when it runs, its command line, and its report. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.deploy.code_location import CodeLocation
    from dynamo_mpi.deploy.deployment import Worker
    from dynamo_mpi.deploy.settings import LaunchSettings

NAME = "kv-check"
_ERROR = "error in kv check: "
# the beginnings of a report's lines after the first
_MORE = re.compile(r"  |(?:error|warning|info) T\d+: ")


def nodes_of(workers: Sequence[Worker], *roles: str) -> tuple[str, ...]:
    """Return the nodes of all workers of some roles, each once."""
    return tuple(dict.fromkeys(node for worker in workers if worker.role in roles for node in worker.nodes))


def needs_kv_check(settings: LaunchSettings, workers: Sequence[Worker]) -> bool:
    """Return whether the check runs: both roles have workers, on nodes of their own, and it isn't turned off."""
    prefill, decode = nodes_of(workers, "prefill"), nodes_of(workers, "decode")
    return settings.kv_check != "off" and bool(prefill and decode) and not set(prefill) & set(decode)


def kv_check_words(settings: LaunchSettings, source: CodeLocation, workers: Sequence[Worker]) -> tuple[str, ...]:
    """Return the command line of the check's ranks."""
    roles = ("--prefill", ",".join(nodes_of(workers, "prefill")), "--decode", ",".join(nodes_of(workers, "decode")))
    # the reference engine transfers KV only by TCP
    transport = ("--transport", "tcp") if settings.engine == "reference" else ()
    # the same interface as for the workers
    words = settings.worker_args
    network: tuple[str, ...] = ()
    for place, word in enumerate(words):
        if word == "--kv-network":
            network = tuple(words[place : place + 2])
        elif word.startswith("--kv-network="):
            network = (word,)
    return (*source.entry("check_kv.sh"), *roles, *transport, *network)


def report_of_kv_check(words: str) -> str:
    """Return the failure report of the check's rank 0, without srun's labels; empty if there is none."""
    label, report = "", list[str]()
    for line in words.splitlines():
        if _ERROR in line and not report:
            label = line[: line.index("dynamo_mpi: ")] if "dynamo_mpi: " in line else ""
            report.append(line.partition(_ERROR)[2])
        elif report and line.startswith(label) and _MORE.match(line[len(label) :]):
            report.append(line[len(label) :])
    return "\n".join(report)
