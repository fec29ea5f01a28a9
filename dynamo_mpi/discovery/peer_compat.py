# SPDX-License-Identifier: Apache-2.0
"""Rules between this worker and earlier ones of the other role: their KV must be compatible. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.layout.contract import check_contracts
from dynamo_mpi.layout.finding import Severity, error, errors, render

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.discovery.records import StoredRecord, WorkerRecord
    from dynamo_mpi.layout.finding import Finding

_PARTNER = {"prefill": "decode", "decode": "prefill"}


def peers_of(own: WorkerRecord, all_workers: Sequence[StoredRecord]) -> list[StoredRecord]:
    """Return the workers that send KV to ``own`` or receive it: those of the other role, with the same model and namespace."""
    wanted = (own.namespace, own.model, _PARTNER.get(own.role))
    found = [peer for peer in all_workers if (peer.record.namespace, peer.record.model, peer.record.role) == wanted]
    return sorted(found, key=lambda peer: peer.create_revision)


def check_peer(own: WorkerRecord, peer: WorkerRecord) -> list[Finding]:
    """P5, I1-I8, F11: the rules between two workers that transfer KV to each other."""
    if found := list(_engines(own, peer)):
        return found
    prefill, decode = (side.contract for side in _in_order(own, peer))
    return check_contracts(prefill, decode) if prefill is not None and decode is not None else []


def _engines(own: WorkerRecord, peer: WorkerRecord) -> Iterator[Finding]:
    """P5: both sides of a pair run the same engine: the reference engine and TensorRT-LLM transfer KV in different ways."""
    if own.engine != peer.engine:
        yield error(
            "P5",
            "prefill and decode run different engines: one can't use the other's KV",
            found=", ".join(f"{side.role} {side.engine}" for side in _in_order(own, peer)),
            expected="the same engine",
            fix="set the same --engine on both sides",
        )


def _in_order(own: WorkerRecord, peer: WorkerRecord) -> tuple[WorkerRecord, WorkerRecord]:
    return (own, peer) if own.role == "prefill" else (peer, own)


def incompatibility(own: WorkerRecord, earlier: Sequence[StoredRecord], seconds: int) -> str:
    """Return why ``own`` can't be started beside earlier peers; empty if it can.

    Args:
        own: this worker.
        earlier: the peers that started earlier.
        seconds: how long the record of a killed peer may remain.
    """
    parts = []
    for peer in earlier:
        findings = check_peer(own, peer.record)
        if stopping := errors(findings):
            count = "1 error" if len(stopping) == 1 else f"{len(stopping)} errors"
            parts.append(
                f"this {own.role} worker does not fit the {describe(peer.record)}: {count}, nothing was loaded\n"
                f"{render(findings)}"
            )
    if not parts:
        return ""
    hint = (
        f"the worker that starts later must fit: change this worker, or end the other one first "
        f"(the record of a killed one expires after {seconds} s); --no-peer-check starts it all the same"
    )
    return "\n".join((*parts, hint))


def warnings(own: WorkerRecord, earlier: Sequence[StoredRecord]) -> list[str]:
    """Return the report on earlier peers if ``own`` starts: which ones it fits, and the warnings."""
    lines = []
    for peer in earlier:
        findings = [found for found in check_peer(own, peer.record) if found.severity is not Severity.INFO]
        how = "does not fit" if errors(findings) else "fits"
        lines.append(f"{how} the {describe(peer.record)}" + (f"\n{render(findings)}" if findings else ""))
    return lines


def describe(record: WorkerRecord) -> str:
    """Name a peer, with its endpoint and its phase, which shows if its record is stale."""
    return f"{record.place} at {record.endpoint}, phase {record.phase}"


def describe_changes(own: WorkerRecord, before: Sequence[StoredRecord], now: Sequence[StoredRecord]) -> list[str]:
    """Return a line for each peer that appeared, disappeared or changed since the last look, with what doesn't fit."""
    old, new = ({peer.key: peer.record for peer in peers} for peers in (before, now))
    lines = []
    for key, record in new.items():
        if key not in old:
            lines.append(f"peer: a {record.place} has appeared{_verdict(own, record)}")
        elif _terms(record) != _terms(old[key]):
            lines.append(f"peer: the {record.place} has changed{_verdict(own, record)}")
    lines += [f"peer: the {record.place} has disappeared" for key, record in old.items() if key not in new]
    return lines


def _terms(record: WorkerRecord) -> tuple[object, ...]:
    return (record.engine, record.contract, record.layout, record.hosts)


def _verdict(own: WorkerRecord, peer: WorkerRecord) -> str:
    wrong = errors(check_peer(own, peer))
    if not wrong:
        return ""
    return ", and does not fit: " + "; ".join(f"{found.rule} {found.message} ({found.found})" for found in wrong)


RULES = (_engines,)
