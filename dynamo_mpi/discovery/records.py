# SPDX-License-Identifier: Apache-2.0
"""The worker record: what a worker publishes about itself in etcd, for its partner and for its operator."""

from __future__ import annotations

from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar
from dynamo_mpi.common.record_codec import parse_object, read_fields, write_object
from dynamo_mpi.layout.contract import Contract

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dynamo_mpi.discovery.etcd import EtcdClient, KeyValue


class _Named(Protocol):
    @property
    def namespace(self) -> str: ...

    @property
    def component(self) -> str: ...


T = TypeVar("T")
R = TypeVar("R", bound=_Named)

SCHEMA = 1
"""Increases if a field is removed or changes its meaning; new fields need no new schema."""
LAUNCH_VARIABLE = "DYN_MPI_LAUNCH"
"""The variable by which `dynamo-mpi launch` names a worker to its ranks."""
_ROOT = "dynamo_mpi/v1/worlds/"


@dataclass(frozen=True)
class RecordedLayout:
    """A worker's layout.

    Args:
        tp_size: tensor-parallel size.
        pp_size: pipeline stages.
        cp_size: context-parallel size.
        ep_size: expert-parallel size.
        attention_dp: attention is data-parallel.
        ranks: number of ranks.
        gpus_per_node: number of GPUs, and ranks, on each node.
    """

    tp_size: int
    pp_size: int
    cp_size: int
    ep_size: int
    attention_dp: bool
    ranks: int
    gpus_per_node: int

    def __str__(self) -> str:
        sizes = (("EP", self.ep_size), ("PP", self.pp_size), ("CP", self.cp_size))
        parts = [f"TP{self.tp_size}", *(f"{name}{size}" for name, size in sizes if size > 1)]
        return "/".join(parts) + (" ADP" if self.attention_dp else "")

    @property
    def is_known(self) -> bool:
        """Whether a tolerant reader has found all sizes."""
        return all((self.tp_size, self.pp_size, self.cp_size, self.ep_size, self.ranks))


_NO_LAYOUT = RecordedLayout(0, 0, 0, 0, False, 0, 0)


@dataclass(frozen=True)
class Progress:
    """The ranks' progress in the record's phase.

    Args:
        done: ranks that have finished it; None if they don't report that, as with ``dynamo.trtllm``.
        ranks: all of them.
        slowest_rank: the rank that is furthest behind; None if there is none.
        slowest_host: its node.
        seconds: since the phase began.
        read: bytes that all ranks together have read since they started; None if that isn't known.
    """

    done: int | None
    ranks: int
    slowest_rank: int | None
    slowest_host: str | None
    seconds: float
    read: int | None = None


@dataclass(frozen=True)
class WorkerRecord:
    """One worker.

    Args:
        role: ``agg``, ``prefill``, ``decode`` or ``encode``.
        engine: ``trtllm`` or ``reference``.
        namespace: Dynamo's.
        component: Dynamo's.
        endpoint: ``dyn://namespace.component.endpoint``.
        model: the name that clients ask for.
        phase: its current phase, as in `common.phases`.
        layout: its layout.
        hosts: its nodes, in the order of their first rank.
        contract: what its partner must agree with; None if it has no partner.
        dynamo_mpi: version.
        trtllm: version; None if it isn't installed.
        job: Slurm's job id; None outside Slurm.
        step: Slurm's step id.
        started: seconds since 1970.
        pid: rank 0's process.
        host: rank 0's node.
        instance: Dynamo's id of it, which is its lease's too, hexadecimal as in etcd; None until it is registered.
        launch: `dynamo-mpi launch`'s name for it; None without `launch`.
        attempt: the number of this start of the worker, from 1 on.
        phase_since: when the phase began, in seconds since 1970; None from an older writer.
        in_flight: requests that have started and not ended; None if that isn't known, as with ``dynamo.trtllm``.
        progress: of the phase; None if there is nothing to report.
        system: URL of ``/health``, ``/live`` and ``/metrics``; None if they aren't served.
        trace: the W3C ``traceparent`` it runs under.
        probe: the measurements of the hardware checks, by check; None if none ran.
        process_start: when rank 0's process began, as ``BOOT_ID:TICKS`` (since boot); None if that isn't known, or from an older writer.
        stage: what copying the model to the nodes took: path, bytes, nodes and seconds; None if it wasn't copied.
        binding: the CPUs and the NUMA node decided for each rank, by ranks: kind, cpus, node; None if they aren't known.
        caches: how the compile caches were seeded, and what was written back; None if they were left alone.
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
    process_start: str | None = None
    stage: dict[str, Any] | None = None
    binding: dict[str, Any] | None = None
    caches: dict[str, Any] | None = None

    def pack(self) -> bytes:
        """Encode as JSON."""
        return write_object(self, SCHEMA)

    @classmethod
    def unpack(cls, data: bytes, problems: list[str] | None = None) -> WorkerRecord:
        """Decode what `pack` made, here or in another version.

        Args:
            data: JSON.
            problems: None to be strict, a list to be tolerant, as for `record_codec.read_fields`.

        Raises:
            ValueError: it isn't a record, or has an unknown schema.
        """
        content = parse_object(data, SCHEMA)
        strict = problems is None

        def nested(kind: type[T], name: str, *needed: str) -> T | None:
            value = content.get(name)
            if value is None:
                return None
            try:
                return read_fields(kind, value, problems, needed)
            except ValueError as error:
                if problems is None:
                    raise
                problems.append(f"{name} is not an object" if not isinstance(value, dict) else f"{name}: {error}")
                return None

        layout = nested(RecordedLayout, "layout")
        if layout is None and strict:
            raise ValueError("layout is missing")
        return read_fields(
            cls,
            content,
            problems,
            needed=("namespace", "component", "model", "role", "phase", "host", "pid"),
            layout=layout or _NO_LAYOUT,
            contract=nested(Contract, "contract"),
            progress=nested(Progress, "progress", "ranks"),
            probe=probe if isinstance(probe := content.get("probe"), dict) else None,
            stage=stage if isinstance(stage := content.get("stage"), dict) else None,
            binding=binding if isinstance(binding := content.get("binding"), dict) else None,
            caches=caches if isinstance(caches := content.get("caches"), dict) else None,
        )

    @property
    def is_serving(self) -> bool:
        """Whether the worker answers requests."""
        return self.phase == "serve"

    @property
    def place(self) -> str:
        """Name the worker as its operator knows it: ``decode worker on n1, n2 (job 12.0)``."""
        job = f"job {self.job}{'' if self.step is None else f'.{self.step}'}" if self.job else f"pid {self.pid}"
        shown = self.hosts if len(self.hosts) <= 4 else (*self.hosts[:2], "…", self.hosts[-1])
        return f"{self.role} worker on {', '.join(shown)} ({job})"


class StoredRecord(NamedTuple):
    """A record in etcd.

    Args:
        key: its key.
        create_revision: etcd's revision when the key was written first: of two workers, the first has the smaller one.
        record: the worker's.
        lease: the record's; 0 if it isn't known.
    """

    key: str
    create_revision: int
    record: WorkerRecord
    lease: int = 0


def list_workers(
    etcd: EtcdClient, namespace: str = "", problems: dict[str, list[str]] | None = None
) -> tuple[list[StoredRecord], dict[str, str]]:
    """Read the records of a namespace, or of all of them.

    Args:
        etcd: where they are.
        namespace: Dynamo's; empty for all.
        problems: None to leave out every record with a problem. A dict to be tolerant: it gets the problems of the records, by key.

    Returns:
        The records, and by key why others can't be read: another program's, or a newer version's.

    Raises:
        DiscoveryError: etcd does not answer.
        AuthorizationError: it rejects our credentials.
    """
    found, unreadable = read_stored(etcd.get_prefix(worlds_of(namespace)), WorkerRecord.unpack, _ROOT, problems)
    return [StoredRecord(entry.key, entry.create_revision, record, entry.lease) for entry, record in found], unreadable


def read_stored(
    entries: Iterable[KeyValue],
    unpack: Callable[[bytes, list[str] | None], R],
    root: str,
    problems: dict[str, list[str]] | None,
) -> tuple[list[tuple[KeyValue, R]], dict[str, str]]:
    """Decode entries of etcd; arguments and results are those of `list_workers`.

    A record must name the same worker as its key: rights in etcd are given by keys.
    """
    found, unreadable = [], {}
    for entry in entries:
        own: list[str] | None = None if problems is None else []
        try:
            record = unpack(entry.value, own)
        except ValueError as error:
            unreadable[entry.key] = str(error)
            continue
        if entry.key.rpartition("/")[0] != f"{root}{record.namespace}/{record.component}":
            name = f"{sanitize(record.namespace, 40)}/{sanitize(record.component, 40)}"
            unreadable[entry.key] = f"of {name}, under the key of another worker"
            continue
        found.append((entry, record))
        if problems is not None and own:
            problems[entry.key] = own
    return found, unreadable


def record_key(record: WorkerRecord, lease: int) -> str:
    """Return the record's key: it ends with the lease's id, as Dynamo writes instances, so that no two workers share one."""
    return f"{worlds_of(record.namespace)}{record.component}/{lease:x}"


def worlds_of(namespace: str) -> str:
    """Return the prefix of the records of a namespace; of all namespaces without one."""
    return f"{_ROOT}{namespace}/" if namespace else _ROOT
