# SPDX-License-Identifier: Apache-2.0
"""The stack of ``dynamo-mpi local``: the order of its start, its readiness, and its end.

etcd and NATS start while the model's files are written; then the frontend and the workers start side by side. The stack is ready
when every rank 0 has written its ready file, the frontend lists the model, and a completion was answered.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynamo_mpi.common.errors import EngineError, ExitCode, LayoutError, UsageError
from dynamo_mpi.common.log_tail import last_lines, last_text
from dynamo_mpi.common.os_errors import exhausted
from dynamo_mpi.common.ports import LOOPBACK, is_free, loopback_ports, require_loopback
from dynamo_mpi.common.signals import Interrupts
from dynamo_mpi.common.subprocess import LoggedProcess, await_exit, stop
from dynamo_mpi.common.waiting import ReminderSchedule
from dynamo_mpi.deploy import programs
from dynamo_mpi.deploy.local.ask import Answer, NotServedYet, ask
from dynamo_mpi.deploy.local.run_folder import LocalRunFolder
from dynamo_mpi.deploy.local.workers import AGG_TP_SIZE, MpirunWorker, WorkerSpec, prepare_model
from dynamo_mpi.deploy.programs import RequestPlane, discovery_environment, local_environment, local_services
from dynamo_mpi.deploy.service_stack import ServiceStack
from dynamo_mpi.deploy.services import LOG_LINES, Etcd, Frontend, Nats
from dynamo_mpi.deploy.timeline import draw_stack, require_writable
from dynamo_mpi.layout.finding import errors
from dynamo_mpi.layout.library import Worker, check

REMINDER_SECONDS = (5.0, 30.0)
# measured: 126 MiB, of which etcd's log is 122; Open MPI wants some room for each rank
FOLDER_MIB, RANK_MIB, _MIB = 130, 4, 1 << 20
# longer than a worker's own limit for its requests
DRAIN_SECONDS, WORKER_STOP_SECONDS = 40.0, 5.0
# they start within seconds, and refuse by themselves
_FEW_RANKS = 16


@dataclass(frozen=True)
class StackSettings:
    """The stack's settings.

    Args:
        workers: the workers, in the order in which they are stopped.
        model: folder or GGUF file; None for the installed model.
        http_port: the frontend's port; None for a free one.
        request_plane: how the frontend sends requests to the workers.
        engine_options: additional keys of the engines' YAML.
        mpirun: the launcher's command line; None to find one.
        timeout_seconds: time limit from the start to the first completion.
        timeline: file for the timeline of the start; None for no timeline.
        credentials: whether clients of etcd and NATS must authenticate.
    """

    workers: tuple[WorkerSpec, ...] = (WorkerSpec("agg", AGG_TP_SIZE),)
    model: Path | None = None
    http_port: int | None = None
    request_plane: RequestPlane = "tcp"
    engine_options: Mapping[str, int] = field(default_factory=dict)
    mpirun: str | None = None
    timeout_seconds: float = 120.0
    timeline: Path | None = None
    credentials: bool = True


@dataclass(frozen=True)
class Ready:
    """A stack that serves.

    Args:
        model: the served name.
        port: the frontend's.
        workers: the ready files' contents, by role, in the order of the settings' workers.
        seconds: since the start, by milestone.
        run_dir: the run folder, for `status`, `wait` and `down`.
    """

    model: str
    port: int
    workers: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    run_dir: Path


class LocalStack(ServiceStack):
    """The services and the workers of this machine. Use it from the main thread.

    Args:
        settings: the stack's settings.
        folder: private folder for everything that is written.
        interrupts: checked in every wait.
        say: prints one line of progress.
    """

    def __init__(
        self, settings: StackSettings, folder: Path, interrupts: Interrupts, say: Callable[[str], None]
    ) -> None:
        super().__init__(folder, interrupts, say, settings.timeout_seconds)
        self._settings = settings
        self.rank_logs = folder / "ranks"
        self._run_folder = LocalRunFolder(folder, settings.workers)
        self._workers: dict[str, MpirunWorker] = {}

    def start(self) -> Ready:
        """Start all processes and wait until the workers are registered and the model is listed.

        Raises:
            UsageError: something is missing, or a setting can't be used.
            ProcessExited: a process ended.
            StartTimeout: a process was not ready in time.
            Interrupted: a signal requests the end.
            OSError: the current folder doesn't exist any more, or no process can be started.
        """
        etcd_binary, nats_binary = programs.find_etcd(os.environ.get("DYN_MPI_ETCD")), programs.find_nats_server()
        mpirun = programs.find_mpirun(self._settings.mpirun)
        programs.require_packages()
        http_port = self._settings.http_port
        if http_port is not None and not is_free(http_port):
            raise UsageError(
                f"port {http_port} of {LOOPBACK} is taken", expected="a free port", fix="choose another --http-port"
            )
        if self._settings.timeline is not None:
            require_writable(self._settings.timeline)
        os.getcwd()  # mpirun needs one: raise before anything is started
        require_loopback()
        self._require_space()
        self._scratch.mkdir()
        prepared = self._prepare_checked()

        variables = local_environment(os.environ, self._scratch)
        credentials = self.make_credentials(LOOPBACK, "localhost") if self._settings.credentials else None
        certificates = None if credentials is None else credentials.certificates
        starting_etcd = self.start_service(
            lambda port: Etcd(etcd_binary, port, self._folder / "etcd", host=LOOPBACK, certificates=certificates),
            loopback_ports(),
            variables,
        )
        starting_nats = self.start_service(
            lambda port: Nats(nats_binary, port, self._folder / "nats", host=LOOPBACK, credentials=credentials),
            loopback_ports(),
            variables,
        )
        model, name = prepared or self._prepare_model()
        self._run_folder.describe(name)
        self.mark("model", f"model {name}")
        etcd, nats = self.wait_ready(starting_etcd), self.wait_ready(starting_nats)
        plane = self._settings.request_plane
        clients = local_services(etcd, nats, plane, credentials)
        discovery = {**self.write_services(clients), **discovery_environment(plane)}

        starting_frontend = self.start_service(
            lambda port: Frontend(port, discovery, self._scratch), loopback_ports(http_port), variables
        )
        for spec in self._settings.workers:
            self._start_worker(spec, mpirun, model, name, discovery, variables)
        frontend = self.wait_ready(starting_frontend)
        self._run_folder.publish(frontend.url, clients)
        workers = self._await_workers()
        while name not in frontend.models():
            self.wait(frontend.name, f"it does not list {name}")
        self.seconds["ready"] = self.age
        self._run_folder.write_timeline(time.time() - self.age, self.seconds)
        return Ready(name, frontend.port, workers, self.seconds, self._folder)

    def _prepare_model(self) -> tuple[Path, str]:
        return prepare_model(self._settings.model, self._folder / "model")

    def _prepare_checked(self) -> tuple[Path, str] | None:
        """For a worker of many ranks, which take long to start, prepare the model first, and refuse what the ranks would refuse.

        Raises:
            LayoutError: the model can't run in this layout.
        """
        if max(spec.tp_size for spec in self._settings.workers) <= _FEW_RANKS:
            return None
        model, name = self._prepare_model()
        for spec in self._settings.workers:
            keys = {"tensor_parallel_size": spec.tp_size, **self._settings.engine_options}
            report = check(model, keys, Worker(spec.role, gpus_per_node=spec.tp_size, engine="reference"))
            for finding in errors(report.findings)[:1]:
                raise LayoutError(finding.message, expected=finding.expected, fix=finding.fix)
        return model, name

    def ask(self, ready: Ready, text: str, *, max_tokens: int, on_text: Callable[[str], None]) -> Answer:
        """Send one question to the model. Until the first answer the frontend may report that it has no worker.

        Raises:
            EngineError: the answer is an error.
            ProcessExited: a process ended.
            StartTimeout: the frontend had no worker for the model within the time limit.
            Interrupted: a signal requests the end.
        """
        while True:
            try:
                return ask(
                    ready.port,
                    ready.model,
                    text,
                    max_tokens=max_tokens,
                    timeout_seconds=self._settings.timeout_seconds,
                    interruptible=self._interrupts.closing,
                    on_text=on_text,
                )
            except NotServedYet as error:
                self.wait("frontend", f"it serves no completion: {error}")
            except EngineError:
                self._interrupts.check()  # a signal closes the connection: report the signal, not the network error
                self.check()
                raise

    def stop(self, *, drain: bool = True) -> None:
        """End all processes, the workers first. After another signal, or at the time limit, they are killed. Idempotent.

        Args:
            drain: let the workers finish requests in flight.
        """
        signals_before = min(self._interrupts.count, 1)
        if drain:
            for worker in self._workers.values():
                self._drain(worker, signals_before)
        workers = [self._processes[name] for name in self._workers if name in self._processes]
        stop(workers, WORKER_STOP_SECONDS, self._interrupts, signals_before)
        super().stop()

    def check(self) -> None:
        self._run_folder.check()
        super().check()

    def draw(self) -> None:
        """Write the timeline of the start, if requested, after the workers have ended.

        Raises:
            UsageError: it can't be written.
        """
        if self._settings.timeline is not None:
            pages = [worker.timeline for worker in self._workers.values()]
            now = time.time()
            draw_stack(self._settings.timeline, pages, now - self.age, now, self.seconds)

    def _start_worker(
        self,
        spec: WorkerSpec,
        mpirun: tuple[str, ...],
        model: Path,
        name: str,
        discovery: Mapping[str, str],
        variables: Mapping[str, str],
    ) -> None:
        alone = len(self._settings.workers) == 1
        worker = MpirunWorker(
            mpirun=mpirun,
            spec=spec,
            model=model,
            served_model_name=name,
            engine_config=self._write_engine_config(spec),
            ready_file=self._folder / f"{spec.name}.json",
            rank_logs=self.rank_logs if alone else self.rank_logs / spec.name,
            scratch=self._scratch,
            discovery=discovery,
            timeline=self._run_folder.timeline(spec),
            launch=self._run_folder.launch_name(spec),
        )
        worker.rank_logs.mkdir(parents=True)
        self._workers[spec.name] = worker
        self.spawn(spec.name, worker.command(), {**variables, **worker.environment()})

    def _require_space(self) -> None:
        """Raise `UsageError` if the folder's file system has too little space; later, each process would report that in its own way."""
        state = os.statvfs(self._folder)
        ranks = sum(spec.tp_size for spec in self._settings.workers)
        free, needed = state.f_bavail * state.f_frsize // _MIB, FOLDER_MIB + RANK_MIB * ranks
        if free < needed:
            raise UsageError(
                f"{self._folder.parent} has {free} MiB of free space",
                expected=f"{needed} MiB for etcd's log and the ranks' shared memory, until the end of this run",
                fix="free some, or set TMPDIR to a folder with more",
            )

    def _write_engine_config(self, spec: WorkerSpec) -> Path:
        options = {"tensor_parallel_size": spec.tp_size, **self._settings.engine_options}
        path = self._folder / f"{spec.name}.yaml"
        path.write_text("".join(f"{key}: {value}\n" for key, value in options.items()))
        return path

    def _await_workers(self) -> dict[str, dict[str, Any]]:
        reminders = ReminderSchedule(*REMINDER_SECONDS)
        found: dict[str, dict[str, Any]] = {}
        while missing := self._look_for_ready(found):
            self.wait(missing[0], "it has not registered")
            if seconds := reminders.due():
                self._say(f"waiting for {' and '.join(missing)} to register, {seconds:.0f} s")
        return {worker.spec.role: found[name] for name, worker in self._workers.items()}

    def _look_for_ready(self, found: dict[str, dict[str, Any]]) -> Sequence[str]:
        """Add the contents of new ready files to ``found``, and return the names of the workers that have none yet."""
        for name, worker in self._workers.items():
            if name not in found and (content := worker.ready()) is not None:
                found[name] = content
                self.mark(name, f"{name} registered, tp {worker.spec.tp_size}")
        return [name for name in self._workers if name not in found]

    def _drain(self, worker: MpirunWorker, signals_before: int) -> None:
        """Let a worker drain, and wait for its end, at most until another signal arrives or the time limit is reached."""
        process = self._processes.get(worker.name)
        leader = None if process is None else worker.rank_zero()
        if process is None or leader is None or leader not in process.members():
            return  # `stop` ends its launcher
        with contextlib.suppress(ProcessLookupError):
            os.kill(leader, signal.SIGTERM)
        await_exit([process], DRAIN_SECONDS, self._interrupts, signals_before)

    def _status_of(self, process: LoggedProcess) -> int:
        # a worker that ends by itself with code 0 has lost its lease, or was stopped by another process
        return (
            super()._status_of(process) if process.name not in self._workers else process.exit_code() or ExitCode.ENGINE
        )

    def _log_of(self, process: LoggedProcess) -> str:
        """For a worker that ended in order, return rank 0's log, which has the report; otherwise the end of each rank's log and of the
        launcher's."""
        if process.name not in self._workers:
            return super()._log_of(process)
        rank_logs = self._workers[process.name].rank_logs
        rank_zero = rank_logs / "rank-0.log"
        if process.exit_code() in set(ExitCode) and rank_zero.is_file():
            return last_text(rank_zero).rstrip("\n")
        sources = [*sorted(rank_logs.glob("rank-*.log")), process.log]
        return "\n".join(f"[{log.stem}] {line}" for log in sources for line in last_lines(log, LOG_LINES))

    def _exit_fix(self, process: LoggedProcess) -> str:
        if lacked := exhausted(self._folder, self._log_of(process) + process.output()):
            return lacked
        if process.name in self._workers and process.exit_code() not in set(ExitCode):
            return "read the lines above: those of the ranks, of MPI and of its launcher"
        return super()._exit_fix(process)

    def _timeout_fix(self, process: LoggedProcess) -> str:
        return "a longer --timeout, or --verbose"
