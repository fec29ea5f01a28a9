# SPDX-License-Identifier: Apache-2.0
"""The world record: what a worker says of itself in etcd, for its partner and for its operator. Pure."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from dynamo_mpi.control_plane.plain_data import read_fields, read_object
from dynamo_mpi.parallelism.contract import Contract

SCHEMA = 1
"""Grows when something is taken away or changes its meaning; what is only added is no new schema."""
LAUNCH_VARIABLE = "DYN_MPI_LAUNCH"
"""What `dynamo-mpi launch` calls the worker, for its ranks."""
_ROOT = "dynamo_mpi/v1/worlds/"


@dataclass(frozen=True)
class RecordedLayout:
    """How a world is divided.

    Args:
        tp_size: tensor-parallel size.
        pp_size: pipeline stages.
        cp_size: context-parallel size.
        ep_size: expert-parallel size.
        attention_dp: attention is data-parallel.
        ranks: of the world.
        gpus_per_node: GPUs, and ranks, of each node.
    """

    tp_size: int
    pp_size: int
    cp_size: int
    ep_size: int
    attention_dp: bool
    ranks: int
    gpus_per_node: int


@dataclass(frozen=True)
class Progress:
    """How far the ranks have come in the phase that the record names.

    Args:
        done: ranks that have done their part of it; None where they don't tell, as with ``dynamo.trtllm``.
        ranks: of the world.
        slowest_rank: the one that is furthest behind; None where none is.
        slowest_host: its node.
        seconds: since the phase began.
        read: bytes that all ranks together have read since they began; None where that isn't known.
    """

    done: int | None
    ranks: int
    slowest_rank: int | None
    slowest_host: str | None
    seconds: float
    read: int | None = None


@dataclass(frozen=True)
class WorldRecord:
    """One world.

    Args:
        role: ``agg``, ``prefill``, ``decode`` or ``encode``.
        engine: ``trtllm`` or ``reference``.
        namespace: Dynamo's.
        component: Dynamo's.
        endpoint: ``dyn://namespace.component.endpoint``.
        model: the name that clients ask for.
        phase: what it does now, as `supervision.phases` names it.
        layout: how it is divided.
        hosts: its nodes, in the order of their first rank.
        contract: what its partner has to share; None where it has no partner.
        dynamo_mpi: version.
        trtllm: version; None where it isn't installed.
        job: Slurm's job id; None outside Slurm.
        step: Slurm's step id.
        started: seconds since 1970.
        pid: rank 0's process.
        host: rank 0's node.
        instance: Dynamo's id of it, which is its lease's, hexadecimal as in etcd; None until it is registered.
        launch: what `dynamo-mpi launch` calls it; None where nobody did.
        attempt: which start of this worker it is, from 1 on.
        phase_since: when the phase began, in seconds since 1970; None from a writer that doesn't tell.
        in_flight: requests that have begun and not ended; None where that isn't known, as with ``dynamo.trtllm``.
        progress: of the phase; None where there is nothing to tell.
        system: URL of ``/health``, ``/live`` and ``/metrics``; None where they aren't served.
        trace: the W3C ``traceparent`` it runs under.
        probe: what the probes have measured, by probe; None where none ran.
    """

    role: str
    engine: str
    namespace: str
    component: str
    endpoint: str
    model: str
    phase: str
    layout: RecordedLayout
    hosts: tuple[str, ...]
    contract: Contract | None
    dynamo_mpi: str
    trtllm: str | None
    job: str | None
    step: str | None
    started: float
    pid: int
    host: str
    instance: str | None = None
    launch: str | None = None
    attempt: int = 1
    phase_since: float | None = None
    in_flight: int | None = None
    progress: Progress | None = None
    system: str | None = None
    trace: str | None = None
    probe: dict[str, Any] | None = None

    def pack(self) -> bytes:
        """Encode as JSON."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, data: bytes) -> WorldRecord:
        """Decode what `pack` made, here or in another version.

        Raises:
            ValueError: it isn't a record, or one of a schema that isn't known here.
        """
        content = read_object(data, SCHEMA)
        contract, progress = content.get("contract"), content.get("progress")
        return read_fields(
            cls,
            content,
            layout=read_fields(RecordedLayout, content.get("layout")),
            contract=None if contract is None else read_fields(Contract, contract),
            progress=None if progress is None else read_fields(Progress, progress),
            probe=probe if isinstance(probe := content.get("probe"), dict) else None,
        )

    @property
    def place(self) -> str:
        """Name the worker as its operator knows it: ``decode worker on n1, n2 (job 12.0)``."""
        job = f"job {self.job}{'' if self.step is None else f'.{self.step}'}" if self.job else f"pid {self.pid}"
        shown = self.hosts if len(self.hosts) <= 4 else (*self.hosts[:2], "…", self.hosts[-1])
        return f"{self.role} worker on {', '.join(shown)} ({job})"


class Posted(NamedTuple):
    """A record as it stands in etcd.

    Args:
        key: where.
        came: etcd's revision when it was made: of two worlds, the first has the smaller one.
        record: what it says.
    """

    key: str
    came: int
    record: WorldRecord


def record_key(record: WorldRecord, lease: int) -> str:
    """Return where the record stands: with the lease's id as Dynamo writes instances, so that no two worlds share a key."""
    return f"{worlds_of(record.namespace)}{record.component}/{lease:x}"


def worlds_of(namespace: str) -> str:
    """Return where the records of a namespace stand; every namespace's without one."""
    return f"{_ROOT}{namespace}/" if namespace else _ROOT
