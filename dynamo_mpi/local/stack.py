# SPDX-License-Identifier: Apache-2.0
"""The stack as a whole: what starts after what, when it is ready, and how it ends.

etcd and NATS come up while the model's files are written; then the frontend and the worlds of ranks start side by side. Ready
means three things at once: every rank 0 wrote its ready file, the frontend lists the model, and a completion came back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynamo_mpi.errors import EngineError, UsageError
from dynamo_mpi.local.ask import Answer, NotServedYet, ask
from dynamo_mpi.local.model import prepare_model
from dynamo_mpi.local.parts import POLL_SECONDS, Parts
from dynamo_mpi.local.ranks import Ranks
from dynamo_mpi.local.services import RequestPlane, discovery_environment
from dynamo_mpi.local.worlds import AGG_TP_SIZE, World
from dynamo_mpi.services import programs
from dynamo_mpi.services.etcd import Etcd
from dynamo_mpi.services.frontend import Frontend
from dynamo_mpi.services.interrupts import Interrupts
from dynamo_mpi.services.nats import Nats
from dynamo_mpi.services.news import News
from dynamo_mpi.services.ports import LOOPBACK, is_free

NEWS_SECONDS = (5.0, 30.0)


@dataclass(frozen=True)
class StackSettings:
    """What the user may choose.

    Args:
        worlds: what to run, in the order in which they are told to stop.
        model: folder or GGUF file; None takes the installed model.
        http_port: of the frontend; None takes a free one.
        request_plane: how the frontend hands requests to the workers.
        engine_options: further keys of the engines' YAML.
        mpirun: the launcher's command line; None finds one.
        timeout_seconds: from the start to the first completion.
        timeline: where to draw the start; None for nowhere.
    """

    worlds: tuple[World, ...] = (World("agg", AGG_TP_SIZE),)
    model: Path | None = None
    http_port: int | None = None
    request_plane: RequestPlane = "tcp"
    engine_options: Mapping[str, int] = field(default_factory=dict)
    mpirun: str | None = None
    timeout_seconds: float = 120.0
    timeline: Path | None = None


@dataclass(frozen=True)
class Ready:
    """A stack that serves.

    Args:
        model: the served name.
        port: the frontend's.
        workers: the ready files' contents, by role, in the order of the settings' worlds.
        seconds: since the start, by milestone.
    """

    model: str
    port: int
    workers: dict[str, dict[str, Any]]
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
        self.rank_logs = folder / "ranks"
        self._scratch = folder / "scratch"
        self._parts = Parts(folder, self._scratch, interrupts, say, settings.timeout_seconds)
        self._ranks: list[Ranks] = []

    @property
    def processes(self) -> dict[str, list[int]]:
        """The living processes of each part."""
        return self._parts.processes

    def start(self) -> Ready:
        """Start all parts and wait until the workers are registered and the model is listed.

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
        self._scratch.mkdir()

        parts = self._parts
        starting_etcd = parts.begin(lambda port: Etcd(etcd_binary, port, self._folder / "etcd"))
        starting_nats = parts.begin(lambda port: Nats(nats_binary, port, self._folder / "nats"))
        model, name = prepare_model(self._settings.model, self._folder / "model")
        parts.mark("model", f"model {name}")
        etcd, nats = parts.settle(starting_etcd), parts.settle(starting_nats)
        discovery = discovery_environment(etcd, nats, self._settings.request_plane)

        starting_frontend = parts.begin(lambda port: Frontend(port, discovery, self._scratch), http_port)
        for world in self._settings.worlds:
            self._launch(world, mpirun, model, name, discovery)
        frontend = parts.settle(starting_frontend)
        workers = self._await_workers()
        while name not in frontend.models():
            parts.wait_a_little(frontend.name, f"it does not list {name}")
        parts.seconds["ready"] = parts.age
        return Ready(name, frontend.port, workers, parts.seconds)

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
                self._parts.wait_a_little("frontend", f"it serves no completion: {error}")
            except EngineError:
                self._interrupts.check()  # a signal closes the connection: say that, not what it looked like
                self._parts.check()
                raise

    def watch(self) -> None:
        """Return never: raises ``Interrupted``, or ``PartEnded`` when a part ends."""
        while True:
            self._parts.check()
            self._interrupts.pause(4 * POLL_SECONDS)

    def stop(self, *, drain: bool = True) -> None:
        """End everything, the workers first. A further signal, or time, turns asking into killing. Idempotent.

        Args:
            drain: let the workers finish what is in flight.
        """
        # at most one: a second may have come since the first was noticed
        signals_before = min(self._interrupts.count, 1)
        if drain:
            for ranks in self._ranks:
                self._parts.drain(ranks, signals_before)
        self._parts.end([ranks.name for ranks in self._ranks], signals_before)
        for name in ("frontend", "nats", "etcd"):
            self._parts.end([name], signals_before)

    def draw(self) -> None:
        """Draw the start, where that is wanted, once the workers have ended.

        Raises:
            UsageError: it can't be written.
        """
        if self._settings.timeline is not None:
            from dynamo_mpi.local.timeline import draw_stack

            pages = [ranks.timeline for ranks in self._ranks if ranks.timeline is not None]
            now = time.time()
            draw_stack(self._settings.timeline, pages, now - self._parts.age, now, self._parts.seconds)

    def _launch(
        self, world: World, mpirun: tuple[str, ...], model: Path, name: str, discovery: Mapping[str, str]
    ) -> None:
        alone = len(self._settings.worlds) == 1
        ranks = Ranks(
            mpirun=mpirun,
            world=world,
            model=model,
            served_model_name=name,
            engine_config=self._write_engine_config(world),
            ready_file=self._folder / f"{world.name}.json",
            rank_logs=self.rank_logs if alone else self.rank_logs / world.name,
            scratch=self._scratch,
            discovery=discovery,
            timeline=self._folder / f"{world.name}.html" if self._settings.timeline else None,
        )
        ranks.rank_logs.mkdir(parents=True)
        self._ranks.append(ranks)
        self._parts.launch(ranks)

    def _write_engine_config(self, world: World) -> Path:
        options = {"tensor_parallel_size": world.tp_size, **self._settings.engine_options}
        path = self._folder / f"{world.name}.yaml"
        path.write_text("".join(f"{key}: {value}\n" for key, value in options.items()))
        return path

    def _await_workers(self) -> dict[str, dict[str, Any]]:
        news = News(*NEWS_SECONDS)
        found: dict[str, dict[str, Any]] = {}
        while missing := self._look_for_ready(found):
            self._parts.wait_a_little(missing[0].name, "it has not registered")
            if seconds := news.due():
                names = " and ".join(ranks.name for ranks in missing)
                self._say(f"waiting for {names} to register, {seconds:.0f} s")
        return {ranks.world.role: found[ranks.name] for ranks in self._ranks}

    def _look_for_ready(self, found: dict[str, dict[str, Any]]) -> Sequence[Ranks]:
        """Add the ready files that have come to ``found``, and return those that are still missing."""
        for ranks in self._ranks:
            if ranks.name not in found and (worker := ranks.ready()) is not None:
                found[ranks.name] = worker
                self._parts.mark(ranks.name, f"{ranks.name} registered, tp {ranks.world.tp_size}")
        return [ranks for ranks in self._ranks if ranks.name not in found]
