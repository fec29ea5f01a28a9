# SPDX-License-Identifier: Apache-2.0
"""No message says "1 ranks": a number before a noun is written by `counted`, unless it can't be one."""

from __future__ import annotations

import re

from tests.conftest import ROOT

NOUNS = "ranks|nodes|GPUs|CPUs|workers|hosts|requests|links|layers|minutes|hours|tasks"
BARE = re.compile(rf"\{{([^{{}}]+)\}} ({NOUNS})\b")
# what stands before the noun: why it is never one
NEVER_ONE = {
    "environ[VARIABLE]": "a verb",
    "sum(state.ranks for _, state in others)": "the rest of a world of several ranks",
    "len(some)": "more ranks than GPUs",
    "launch.local_size": "ranks of a node that have not all started",
    "ranks": "the words of suggestions, for a worker of several ranks",
    "nodes": "staging is planned for several nodes alone",
    "progress.ranks": "progress is shown of several ranks; of one, the sentence is another",
    "len(ranks)": "ranks on more hosts than are named",
    "visible": "more visible GPUs than ranks",
    "len(reports)": "ranks that differ",
    "launch.size": "a launch of several tasks",
    "len(per_node)": "several nodes with unequal numbers",
    "len(hosts)": "hosts of which some have no address",
    "gpus": "GPUs that don't fill nodes: one does",
    "world_size": "ranks that can't be divided",
    "self._size": "a session that didn't run everywhere",
    "MAX_RANKS": "a limit",
    "layout.tp_size": "attention DP",
    "layout.dp_size": "attention DP",
    "memory.dp_size": "shown where there are several",
    "group": "a group over several nodes",
    "copies": "copies of KV heads",
    "split": "a division that leaves a remainder",
    "ep_size": "exchange between ranks",
    "subject.cluster.world_size": "H15, of several ranks",
    "cluster.gpus_per_node": "a node of a group over several",
    "len(descriptor.ranks)": "an offer of a foreign worker, for another program",
    "sizes": "a list",
    "num_layers": "a list of layers",
    "count": "fewer layers than are handed out",
    "batch": "more requests than tokens",
    "_stages(subject)": "a list",
    "node": "GPUs of a node that has several",
    "self.nodes": "shown where there are several",
    "len(nodes)": "shown where there are several",
}


def test_numbers_are_counted() -> None:
    found = []
    for path in sorted((ROOT / "dynamo_mpi").rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.lstrip().startswith("#"):
                continue
            for value, noun in BARE.findall(line):
                if value not in NEVER_ONE and "counted(" not in value:
                    found.append(f"{path.relative_to(ROOT)}:{number}: {{{value}}} {noun}")
    assert found == []


def test_every_exception_is_needed() -> None:
    used = {value for path in (ROOT / "dynamo_mpi").rglob("*.py") for value, _ in BARE.findall(path.read_text())}
    assert sorted(set(NEVER_ONE) - used) == []
