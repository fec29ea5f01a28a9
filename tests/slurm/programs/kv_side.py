# SPDX-License-Identifier: Apache-2.0
"""One side of the KV probe on a node, without a world.

Usage: kv_side.py station ROLE RANK: a rank's station, for a minute; prints its node, address and port as JSON.
       kv_side.py ask SECONDS STATIONS: the decode worker's rank 0, whose own station comes last in STATIONS; prints the findings.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any, NamedTuple

from dynamo_mpi.common.process import host_name
from dynamo_mpi.control_plane.records import WorkerRecord
from dynamo_mpi.probe.kv import judge_kv
from dynamo_mpi.probe.kv_answer import Between
from dynamo_mpi.probe.kv_child import Ready, StationChild
from dynamo_mpi.probe.kv_lead import lead_kv
from dynamo_mpi.probe.kv_terms import KvTerms, Offer, Station
from tests.unit.worlds import world

TOKENS = {"prefill": "ab" * 32, "decode": "cd" * 32}


class Place(NamedTuple):
    host: str


class Registry:
    """etcd's part."""

    def __init__(self, prefill: list[Station]) -> None:
        contract = {"num_layers": 4, "kv_heads": len(prefill)}
        offer = Offer(TOKENS["prefill"], "tcp", (), tuple(prefill)).as_json()
        self.peer = world("prefill", {**contract, "tp_size": len(prefill)}, phase="load", probe_kv=offer)
        self.own = world("decode", {**contract, "tp_size": 1})

    def offer_kv(self, _offer: dict[str, Any]) -> tuple[WorkerRecord, list[WorkerRecord]]:
        return self.own, [self.peer]


def station(role: str, rank: int) -> None:
    child = StationChild(KvTerms(role, 60, TOKENS[role]), rank, os.environ)
    ready = child.ready(20)
    ended = threading.Event()
    child.keep(lambda _: None, ended.set)
    print(json.dumps([host_name(), ready.address, ready.port]), flush=True)
    ended.wait()


def ask(seconds: float, told: list[list[Any]]) -> None:
    *prefill, decode = [Station(*one) for one in told]
    terms = KvTerms("decode", 60, TOKENS["decode"])
    answers = [Ready("", decode.address, decode.port).pack()]
    end = time.monotonic() + seconds
    ((answer,),) = lead_kv(answers, [Place(decode.node)], terms, "tcp", Registry(prefill), end)
    outcome = judge_kv([Between.read(json.loads(answer))], terms)
    findings = [finding.as_json() for finding in outcome.findings]
    print(json.dumps({"findings": findings, "line": outcome.line}))


if __name__ == "__main__":
    if sys.argv[1] == "station":
        station(sys.argv[2], int(sys.argv[3]))
    else:
        ask(float(sys.argv[2]), json.loads(sys.argv[3]))
