# SPDX-License-Identifier: Apache-2.0
"""The running parts of the stack: started, waited for, watched, and ended. Which ones and in which order is `stack.py`'s."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from dynamo_mpi.local.failures import PartEnded, PartLate
from dynamo_mpi.local.ranks import Ranks
from dynamo_mpi.local.services import base_environment
from dynamo_mpi.services.interrupts import Interrupts
from dynamo_mpi.services.ports import LOOPBACK, free_port
from dynamo_mpi.services.processes import Child
from dynamo_mpi.services.service import Service, ServiceT, is_up, lost_its_port

POLL_SECONDS = 0.05
PORT_ATTEMPTS = 5
DRAIN_SECONDS = 40.0  # longer than a worker gives its requests
STOP_SECONDS = 5.0


@dataclass
class Start(Generic[ServiceT]):
    """A service on its way up."""

    make: Callable[[int], ServiceT]
    service: ServiceT
    fixed_port: bool
    attempts: int = 1


class Parts:
    """Everything that was started. Use it from the main thread.

    Args:
        folder: private folder; each part's log goes there.
        scratch: the parts' folder for temporary files.
        interrupts: looked at wherever we wait.
        say: takes one line of progress.
        timeout_seconds: from here to ready.
    """

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        interrupts: Interrupts,
        say: Callable[[str], None],
        timeout_seconds: float,
    ) -> None:
        self._folder, self._scratch, self._interrupts, self._say = folder, scratch, interrupts, say
        self._timeout = timeout_seconds
        self._started = time.monotonic()
        self._children: dict[str, Child] = {}
        self._rank_logs: dict[str, Path] = {}
        self.seconds: dict[str, float] = {}

    @property
    def processes(self) -> dict[str, list[int]]:
        """The living processes of each part."""
        return {name: child.members() for name, child in self._children.items()}

    @property
    def age(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def mark(self, milestone: str, text: str) -> None:
        """Write down when something was reached, and say so."""
        self.seconds[milestone] = self.age
        self._say(f"{self.seconds[milestone]:5.1f} s  {text}")

    def begin(self, make: Callable[[int], ServiceT], port: int | None = None) -> Start[ServiceT]:
        """Start a service on a port; on a free one if None."""
        service = make(free_port() if port is None else port)
        self._spawn(service)
        return Start(make, service, fixed_port=port is not None)

    def settle(self, start: Start[ServiceT]) -> ServiceT:
        """Wait until a service answers; if its port was taken meanwhile, start it on another.

        Raises:
            PartEnded: it ended.
            PartLate: the time is up.
            Interrupted: the user wants an end.
        """
        while True:
            service, child = start.service, self._children[start.service.name]
            if child.exit_code() is not None:
                if not lost_its_port(child) or start.fixed_port or start.attempts == PORT_ATTEMPTS:
                    raise PartEnded.of(child)
                start.service = start.make(free_port())
                start.attempts += 1
                self._spawn(start.service)
            elif is_up(service, child):
                self.mark(service.name, f"{service.name} on {LOOPBACK}:{service.port}")
                return service
            self._wait(service.name, "it does not answer")

    def launch(self, ranks: Ranks) -> None:
        """Start a world of ranks."""
        self._rank_logs[ranks.name] = ranks.rank_logs
        self._spawn(ranks)

    def wait_a_little(self, part: str, state: str) -> None:
        """Sleep for a moment.

        Args:
            part: whom we wait for.
            state: what keeps it from being ready.

        Raises:
            PartEnded: any part ended.
            PartLate: the time is up.
            Interrupted: the user wants an end.
        """
        self.check()
        self._wait(part, state)

    def check(self) -> None:
        """Raise ``PartEnded`` if a part has ended."""
        for name, child in self._children.items():
            if child.exit_code() is not None:
                raise PartEnded.of(child, self._rank_logs.get(name))

    def drain(self, ranks: Ranks, signals_before: int) -> None:
        """Let a world finish what is in flight, and wait for its end, unless a further signal or time ends that.

        Args:
            ranks: the world.
            signals_before: how many signals had come when the end began.
        """
        child = self._children.get(ranks.name)
        leader = None if child is None else ranks.rank_zero()
        if child is None or leader is None or leader not in child.members():
            return  # its launcher is asked, by `end`
        with contextlib.suppress(ProcessLookupError):
            os.kill(leader, signal.SIGTERM)
        self._await_end(child, time.monotonic() + DRAIN_SECONDS, signals_before)

    def end(self, names: Sequence[str], signals_before: int) -> None:
        """Ask parts to end, all at once; then kill what is left of them. Names of parts that never started are ignored."""
        children = [self._children[name] for name in names if name in self._children]
        for child in children:
            child.send(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for child in children:
            self._await_end(child, deadline, signals_before)
            child.kill()

    def _spawn(self, part: Service | Ranks) -> None:
        self._interrupts.check()
        environment = base_environment(os.environ, self._scratch) | part.environment()
        log = self._folder / f"{part.name}.log"
        self._children[part.name] = Child.start(part.name, part.command(), environment=environment, log=log)

    def _wait(self, part: str, state: str) -> None:
        if self.age > self._timeout:
            raise PartLate.of(self._children[part], state, self._timeout, self._rank_logs.get(part))
        self._interrupts.pause(POLL_SECONDS)

    def _await_end(self, child: Child, deadline: float, signals_before: int) -> None:
        while child.exit_code() is None and time.monotonic() < deadline and self._interrupts.count == signals_before:
            child.resume()
            self._interrupts.sleep(POLL_SECONDS)
