# SPDX-License-Identifier: Apache-2.0
"""Workers and failures as an operator sees them, read from what stands in etcd, whoever wrote it. An older version's fields lack. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_mpi.operating.untrusted import Fields, parse, shown

WORLDS, FAILURES = "dynamo_mpi/v1/worlds/", "dynamo_mpi/v1/failures/"
_SCHEMA = 1
_MOST_HOSTS = 4096
_ERROR_CHARACTERS, _REPORT_CHARACTERS = 1024, 8192


@dataclass(frozen=True)
class Progress:
    """How far a phase is.

    Args:
        done: ranks that have done it; None where they don't tell.
        ranks: all of them.
        slowest_rank: the one that is waited for.
        slowest_host: its node.
        seconds: that it has taken.
        read: bytes that all ranks together have read; None where that isn't known.
    """

    done: int | None
    ranks: int
    slowest_rank: int | None
    slowest_host: str | None
    seconds: float | None
    read: int | None = None


@dataclass(frozen=True)
class Layout:
    """How a world is divided."""

    tp_size: int
    pp_size: int
    cp_size: int
    ep_size: int
    attention_dp: bool
    ranks: int

    def __str__(self) -> str:
        sizes = (("EP", self.ep_size), ("PP", self.pp_size), ("CP", self.cp_size))
        parts = [f"TP{self.tp_size}", *(f"{name}{size}" for name, size in sizes if size > 1)]
        return "/".join(parts) + (" ADP" if self.attention_dp else "")


@dataclass(frozen=True)
class Worker:
    """What a world record says. Times are in seconds since 1970; None where it doesn't say.

    Args:
        key: where it stands in etcd.
        namespace: Dynamo's.
        component: Dynamo's.
        model: the name that clients ask for.
        role: ``agg``, ``prefill``, ``decode`` or ``encode``.
        phase: what it does now.
        host: rank 0's node.
        pid: rank 0's process.
        started: when this start of it began.
        phase_since: when the phase began.
        in_flight: requests that it is at.
        progress: of the phase.
        layout: how it is divided.
        hosts: its nodes.
        engine: what runs the model.
        endpoint: ``dyn://…``.
        attempt: which start of it this is.
        job: Slurm's job.
        step: Slurm's step.
        launch: what `dynamo-mpi launch` calls it.
        instance: Dynamo's id of it.
        system: URL of its health and metrics.
        trace: W3C's traceparent.
        dynamo_mpi: version.
        trtllm: version.
    """

    key: str
    namespace: str
    component: str
    model: str
    role: str
    phase: str
    host: str
    pid: int
    started: float | None
    phase_since: float | None
    in_flight: int | None
    progress: Progress | None
    layout: Layout | None
    hosts: tuple[str, ...]
    engine: str | None
    endpoint: str | None
    attempt: int
    job: str | None
    step: str | None
    launch: str | None
    instance: str | None
    system: str | None
    trace: str | None
    dynamo_mpi: str | None
    trtllm: str | None

    @property
    def serves(self) -> bool:
        """Does it answer requests?"""
        return self.phase == "serve"


@dataclass(frozen=True)
class Failure:
    """How a worker has failed. Times are in seconds since 1970.

    Args:
        key: where it stands in etcd: with the same last part as the worker's record did.
        namespace: Dynamo's.
        component: Dynamo's.
        model: the name that clients ask for.
        role: the worker's.
        exit_code: that all its ranks left with.
        time: when.
        phase: in which.
        rank: that failed first.
        host: its node.
        cause: how it became known.
        error: in short.
        report: all that was told.
        launch: what `dynamo-mpi launch` calls the worker.
        attempt: which start of it that was.
        job: Slurm's job.
        step: Slurm's step.
    """

    key: str
    namespace: str
    component: str
    model: str
    role: str
    exit_code: int
    time: float
    phase: str | None
    rank: int | None
    host: str | None
    cause: str | None
    error: str
    report: str | None
    launch: str | None
    attempt: int
    job: str | None
    step: str | None

    @property
    def lease(self) -> str:
        """The id that it has in common with the record of the worker that failed."""
        return self.key.rpartition("/")[2]

    def is_followed_by(self, worker: Worker) -> bool:
        """Is ``worker`` a newer start of the one that failed, or of another in its place?"""
        ours = (self.namespace, self.component, self.role)
        if (worker.namespace, worker.component, worker.role) != ours or worker.key.endswith(f"/{self.lease}"):
            return False
        if self.launch != worker.launch:
            return False
        is_later = worker.started is not None and worker.started >= self.time
        return is_later or (self.launch is not None and worker.attempt > self.attempt)


def read_worker(key: str, data: bytes) -> tuple[Worker, list[str]]:
    """Read a world record.

    Returns:
        The worker, and what is odd about its record.

    Raises:
        ValueError: it is none.
    """
    fields = Fields(parse(data, _SCHEMA))
    known = fields.needed("namespace", "component", "model", "role", "phase", "host")
    _require_place(key, WORLDS, known)
    pid = fields.count("pid")
    if pid is None:
        raise ValueError("without pid")
    worker = Worker(
        key=shown(key),
        **known,
        pid=pid,
        started=fields.number("started"),
        phase_since=fields.number("phase_since"),
        in_flight=fields.count("in_flight"),
        progress=_progress(fields.fields("progress")),
        layout=_layout(fields.fields("layout")),
        hosts=fields.texts("hosts", _MOST_HOSTS),
        engine=fields.text("engine"),
        endpoint=fields.text("endpoint"),
        attempt=fields.count("attempt") or 1,
        job=fields.text("job"),
        step=fields.text("step"),
        launch=fields.text("launch"),
        instance=fields.text("instance"),
        system=fields.text("system"),
        trace=fields.text("trace"),
        dynamo_mpi=fields.text("dynamo_mpi"),
        trtllm=fields.text("trtllm"),
    )
    return worker, fields.odd


def read_failure(key: str, data: bytes) -> tuple[Failure, list[str]]:
    """Read a failure; as `read_worker`."""
    fields = Fields(parse(data, _SCHEMA))
    known = fields.needed("namespace", "component", "model", "role")
    _require_place(key, FAILURES, known)
    code, time = fields.count("exit_code"), fields.number("time")
    if code is None or time is None:
        raise ValueError("without exit_code and time")
    error = fields.lines("error", _ERROR_CHARACTERS) or ""
    failure = Failure(
        key=shown(key),
        **known,
        # what a process can't end with would wrap around, to 0 even
        exit_code=code if 0 < code < 256 else 1,
        time=time,
        phase=fields.text("phase"),
        rank=fields.rank("rank"),
        host=fields.text("host"),
        cause=fields.text("cause"),
        error=error.strip().partition("\n")[0],
        report=fields.lines("report", _REPORT_CHARACTERS),
        launch=fields.text("launch"),
        attempt=fields.count("attempt") or 1,
        job=fields.text("job"),
        step=fields.text("step"),
    )
    return failure, fields.odd


def _require_place(key: str, root: str, known: dict[str, str]) -> None:
    """Make sure that it says of itself what its key says: rights in etcd go by keys."""
    if key.rpartition("/")[0] != f"{root}{known['namespace']}/{known['component']}":
        raise ValueError(f"of {shown(known['namespace'], 40)}/{shown(known['component'], 40)}, and stands elsewhere")


def _progress(fields: Fields | None) -> Progress | None:
    if fields is None:
        return None
    done, ranks = fields.count("done"), fields.count("ranks")
    if ranks is None:
        return None
    host = fields.text("slowest_host")
    return Progress(done, ranks, fields.rank("slowest_rank"), host, fields.number("seconds"), fields.count("read"))


def _layout(fields: Fields | None) -> Layout | None:
    if fields is None:
        return None
    sizes = [fields.count(name) for name in ("tp_size", "pp_size", "cp_size", "ep_size", "ranks")]
    if any(size is None for size in sizes):
        return None
    tp, pp, cp, ep, ranks = (size or 0 for size in sizes)
    return Layout(tp, pp, cp, ep, fields.switch("attention_dp"), ranks)
