# SPDX-License-Identifier: Apache-2.0
"""The stack as a whole: what starts after what, when it is ready, and how it ends.

etcd and NATS come up while the model's files are written; then the frontend and the ranks start side by side. Ready
means three things at once: rank 0 wrote its ready file, the frontend lists the model, and a completion came back.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from dynamo_mpi.errors import EngineError, UsageError
from dynamo_mpi.local.ask import Answer, NotServedYet, ask
from dynamo_mpi.local.failures import PartEnded, PartLate
from dynamo_mpi.local.model import prepare_model
from dynamo_mpi.local.services import (
    Ranks,
    RequestPlane,
    base_environment,
    discovery_environment,
)
from dynamo_mpi.services import programs
from dynamo_mpi.services.etcd import Etcd
from dynamo_mpi.services.frontend import Frontend
from dynamo_mpi.services.interrupts import Interrupts
from dynamo_mpi.services.nats import Nats
from dynamo_mpi.services.ports import LOOPBACK, free_port, holds_port, is_free
from dynamo_mpi.services.processes import Child

POLL_SECONDS = 0.05
PORT_ATTEMPTS = 5
FIRST_NEWS_SECONDS, LONGEST_NEWS_SECONDS = 5.0, 30.0
DRAIN_SECONDS = 40.0  # longer than the worker gives its requests
STOP_SECONDS = 5.0


@dataclass(frozen=True)
class StackSettings:
    """What the user may choose.

    Args:
        tp_size: ranks of the world, which is tensor parallelism over all of them.
        model: folder or GGUF file; None takes the installed model.
        http_port: of the frontend; None takes a free one.
        request_plane: how the frontend hands requests to the worker.
        engine_options: further keys of the engine's YAML.
        mpirun: the launcher's command line; None finds one.
        timeout_seconds: from the start to the first completion.
    """

    tp_size: int = 3
    model: Path | None = None
    http_port: int | None = None
    request_plane: RequestPlane = "tcp"
    engine_options: Mapping[str, int] = field(default_factory=dict)
    mpirun: str | None = None
    timeout_seconds: float = 120.0


class Service(Protocol):
    """A part with one port."""

    @property
    def name(self) -> str: ...
    @property
    def port(self) -> int: ...
    def command(self) -> tuple[str, ...]: ...
    def environment(self) -> dict[str, str]: ...
    def answers(self) -> bool: ...


ServiceT = TypeVar("ServiceT", bound=Service)


@dataclass
class _Start(Generic[ServiceT]):
    """A service on its way up."""

    make: Callable[[int], ServiceT]
    service: ServiceT
    fixed_port: bool
    attempts: int = 1


@dataclass(frozen=True)
class Ready:
    """A stack that serves.

    Args:
        model: the served name.
        port: the frontend's.
        worker: the ready file's contents.
        seconds: since the start, by milestone.
    """

    model: str
    port: int
    worker: dict[str, Any]
    seconds: dict[str, float]


class LocalStack:
    """Everything that was started, and its end. Use it from the main thread.

    Args:
        settings: what to start.
        folder: private folder for everything that is written.
        interrupts: looked at wherever we wait.
        say: takes one line of progress.
    """

    def __init__(
        self, settings: StackSettings, folder: Path, interrupts: Interrupts, say: Callable[[str], None]
    ) -> None:
        self._settings, self._folder, self._interrupts, self._say = settings, folder, interrupts, say
        self._started = time.monotonic()
        self._deadline = self._started + settings.timeout_seconds
        self._seconds: dict[str, float] = {}
        self._children: dict[str, Child] = {}
        self.rank_logs = folder / "ranks"
        self._scratch = folder / "scratch"

    @property
    def processes(self) -> dict[str, list[int]]:
        """The living processes of each part."""
        return {name: child.members() for name, child in self._children.items()}

    def start(self) -> Ready:
        """Start all parts and wait until the worker is registered and listed.

        Raises:
            UsageError: something is missing or can't be as asked.
            PartEnded: a part ended.
            PartLate: a part was not ready in time.
            Interrupted: the user wants an end.
        """
        etcd_binary, nats_binary = programs.find_etcd(), programs.find_nats_server()
        mpirun = programs.find_mpirun(self._settings.mpirun)
        programs.require_packages()
        http_port = self._settings.http_port
        if http_port is not None and not is_free(http_port):
            raise UsageError(f"port {http_port} of {LOOPBACK} is taken", fix="choose another --http-port")
        for folder in (self.rank_logs, self._scratch):
            folder.mkdir()

        starting_etcd = self._begin(lambda port: Etcd(etcd_binary, port, self._folder / "etcd"))
        starting_nats = self._begin(lambda port: Nats(nats_binary, port, self._folder / "nats"))
        model, name = prepare_model(self._settings.model, self._folder / "model")
        self._mark("model", f"model {name}")
        etcd, nats = self._settle(starting_etcd), self._settle(starting_nats)
        discovery = discovery_environment(etcd, nats, self._settings.request_plane)

        starting_frontend = self._begin(lambda port: Frontend(port, discovery, self._scratch), http_port)
        ranks = Ranks(
            mpirun=mpirun,
            tp_size=self._settings.tp_size,
            model=model,
            served_model_name=name,
            engine_config=self._write_engine_config(),
            ready_file=self._folder / "ready.json",
            rank_logs=self.rank_logs,
            scratch=self._scratch,
            discovery=discovery,
        )
        self._spawn(ranks)
        frontend = self._settle(starting_frontend)
        worker = self._await_worker(ranks)
        self._await_listing(frontend, name)
        self._seconds["ready"] = time.monotonic() - self._started
        return Ready(name, frontend.port, worker, self._seconds)

    def ask(self, ready: Ready, text: str, *, max_tokens: int, on_text: Callable[[str], None]) -> Answer:
        """Ask the model. Until the first answer the frontend may still say that it knows no worker.

        Raises:
            EngineError: the answer is an error.
            PartEnded: a part ended.
            PartLate: still no worker for the model when the time was up.
            Interrupted: the user wants an end.
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
                self._wait_a_little("frontend", f"it serves no completion: {error}")
            except EngineError:
                self._interrupts.check()  # a signal closes the connection: say that, not what it looked like
                self._check_parts()
                raise

    def watch(self) -> None:
        """Return never: raises ``Interrupted``, or ``PartEnded`` when a part ends."""
        while True:
            self._check_parts()
            self._interrupts.pause(4 * POLL_SECONDS)

    def stop(self, *, drain: bool = True) -> None:
        """End everything, the worker first. A further signal, or time, turns asking into killing. Idempotent.

        Args:
            drain: let the worker finish what is in flight.
        """
        signals_before = self._interrupts.count
        worker = self._children.get("worker")
        if worker is not None:
            leader = self._rank_zero(worker) if drain else None
            if leader is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(leader, signal.SIGTERM)
                self._await_end(worker, DRAIN_SECONDS, signals_before)
            self._end(worker, signals_before)
        for name in ("frontend", "nats", "etcd"):
            if name in self._children:
                self._end(self._children[name], signals_before)

    def _begin(self, make: Callable[[int], ServiceT], port: int | None = None) -> _Start[ServiceT]:
        service = make(free_port() if port is None else port)
        self._spawn(service)
        return _Start(make, service, fixed_port=port is not None)

    def _settle(self, start: _Start[ServiceT]) -> ServiceT:
        """Wait until a service answers; if its port was taken meanwhile, start it on another."""
        while True:
            service, child = start.service, self._children[start.service.name]
            if child.exit_code() is not None:
                taken = any("already in use" in line for line in child.last_lines(20))
                if not taken or start.fixed_port or start.attempts == PORT_ATTEMPTS:
                    raise PartEnded.of(child)
                start.service = start.make(free_port())
                start.attempts += 1
                self._spawn(start.service)
            elif holds_port(child.pid, service.port) and service.answers():
                self._mark(service.name, f"{service.name} on {LOOPBACK}:{service.port}")
                return service
            self._wait_a_little(service.name, "it does not answer", watch=False)

    def _spawn(self, part: Service | Ranks) -> None:
        self._interrupts.check()
        environment = base_environment(os.environ, self._scratch) | part.environment()
        log = self._folder / f"{part.name}.log"
        self._children[part.name] = Child.start(part.name, part.command(), environment=environment, log=log)

    def _write_engine_config(self) -> Path:
        options = {"tensor_parallel_size": self._settings.tp_size, **self._settings.engine_options}
        path = self._folder / "engine.yaml"
        path.write_text("".join(f"{key}: {value}\n" for key, value in options.items()))
        return path

    def _await_worker(self, ranks: Ranks) -> dict[str, Any]:
        began = time.monotonic()
        period = FIRST_NEWS_SECONDS
        news = began + period
        while (worker := ranks.ready()) is None:
            self._wait_a_little("worker", "it has not registered")
            if time.monotonic() >= news:
                self._say(f"waiting for the worker, {time.monotonic() - began:.0f} s")
                period = min(2 * period, LONGEST_NEWS_SECONDS)
                news = time.monotonic() + period
        self._mark("worker", f"worker registered, tp {ranks.tp_size}")
        return worker

    def _await_listing(self, frontend: Frontend, name: str) -> None:
        while name not in frontend.models():
            self._wait_a_little("frontend", f"it does not list {name}")

    def _wait_a_little(self, part: str, state: str, *, watch: bool = True) -> None:
        if watch:
            self._check_parts()
        if time.monotonic() > self._deadline:
            raise PartLate.of(self._children[part], state, self._settings.timeout_seconds, self.rank_logs)
        self._interrupts.pause(POLL_SECONDS)

    def _check_parts(self) -> None:
        for child in self._children.values():
            if child.exit_code() is not None:
                raise PartEnded.of(child, self.rank_logs)

    def _mark(self, milestone: str, text: str) -> None:
        self._seconds[milestone] = time.monotonic() - self._started
        self._say(f"{self._seconds[milestone]:5.1f} s  {text}")

    def _rank_zero(self, worker: Child) -> int | None:
        """Return rank 0's process id, as its ready file gives it, if that process is one of ours."""
        try:
            pid = json.loads((self._folder / "ready.json").read_text())["pid"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return pid if pid in worker.members() else None

    def _end(self, child: Child, signals_before: int) -> None:
        child.send(signal.SIGTERM)
        self._await_end(child, STOP_SECONDS, signals_before)
        child.kill()

    def _await_end(self, child: Child, seconds: float, signals_before: int) -> None:
        end = time.monotonic() + seconds
        while child.exit_code() is None and time.monotonic() < end and self._interrupts.count == signals_before:
            self._interrupts.sleep(POLL_SECONDS)
