# SPDX-License-Identifier: Apache-2.0
"""A fault on demand in one rank, to see what follows: for tests, and for operators who want to know before it matters.

    DYN_MPI_ALLOW_FAULTS=1 DYN_MPI_FAULT=rank3:load:kill          the rank, the phase in which it happens, what happens
    DYN_MPI_FAULT=rank1:serve+5:exit0                             five seconds after the phase has begun
    DYN_MPI_FAULT=rank1:serve@/path:stop                          in that phase, as soon as this file exists

Nothing imports this module unless ``DYN_MPI_FAULT`` is set.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.phases import FORMER_NAMES, PHASES

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.common.phases import PhaseTracker
    from dynamo_mpi.mpi.launcher import LaunchInfo
    from dynamo_mpi.supervisor.heartbeat_client import HeartbeatClient

VARIABLE, ALLOW_VARIABLE = "DYN_MPI_FAULT", "DYN_MPI_ALLOW_FAULTS"
ACTIONS = {
    "kill": "is killed (SIGKILL)",
    "stop": "is stopped (SIGSTOP)",
    "hang": "hangs with Python's lock held",
    "exception": "raises an exception",
    "exit": "leaves at once with code {value:g}",
    "slow": "sleeps for {value:g} s",
    "corrupt": "sends wrong data in the fabric probe",
}
# without a value
_USUAL = {"slow": 5.0}
_FORM = re.compile(
    r"rank(\d{1,9}):([a-z_]+)(?:\+(\d+(?:\.\d+)?)|@(/.*))?:([a-z]+)(?:(?<=exit)(\d{1,3})|=(\d+(?:\.\d+)?))?"
)
_LOOK_SECONDS = 0.02
_MUTEX_BYTES = 64
# the phases that a rank other than 0 goes through by itself; from the load on rank 0 leads
_OWN = ("environment", "mpi_init", "preflight", "hardware_check")


class FaultError(RuntimeError):
    """The exception that was asked for. No error of ours, so that it looks like one that nobody has foreseen."""


class Fault(NamedTuple):
    """What is to happen.

    Args:
        rank: where.
        phase: when, at the earliest.
        action: one of `ACTIONS`.
        value: an exit code, or seconds.
        delay: seconds from the phase's beginning.
        trigger: a file that has to exist; empty for none.
    """

    rank: int
    phase: str
    action: str
    value: float = 0.0
    delay: float = 0.0
    trigger: str = ""

    def __str__(self) -> str:
        when = f"{self.delay:g} s after {self.phase} begins" if self.delay else f"in {self.phase}"
        if self.trigger:
            when += f" once {self.trigger} exists"
        return f"{ACTIONS[self.action].format(value=self.value)} {when}"


def parse_fault(text: str) -> Fault:
    """Read ``rankN:PHASE:ACTION``.

    Raises:
        UsageError: it isn't that.
    """
    match = _FORM.fullmatch(text.strip())
    if match is not None:
        rank, phase, delay, trigger, action, code, value = match.groups()
        phase = FORMER_NAMES.get(phase, phase)
        right_value = (action == "exit") == (code is not None) and (value is None or action == "slow")
        if phase in PHASES and action in ACTIONS and right_value and int(code or 0) < 256:
            number = float(code or value or _USUAL.get(action, 0.0))
            return Fault(int(rank), phase, action, number, float(delay or 0.0), trigger or "")
    raise UsageError(
        f"{VARIABLE}={text!r} is no fault",
        needed="rankN:PHASE:ACTION, with PHASE+SECONDS for later in that phase, or PHASE@/PATH for when that file exists; "
        f"phases: {', '.join(PHASES)}; actions: kill, stop, hang, exception, exitCODE, slow, slow=SECONDS, corrupt",
        fix=f"for instance {VARIABLE}=rank1:load:kill; or unset it",
    )


def arm(environ: Mapping[str, str], launch: LaunchInfo, phases: PhaseTracker, log: RankLogger) -> InjectedFault:
    """Read ``DYN_MPI_FAULT``, and have the fault happen in its rank and phase. Rank 0 warns of it. Call it from the main thread.

    Raises:
        UsageError: it can't be read, no rank has that number, or ``DYN_MPI_ALLOW_FAULTS`` isn't 1.
    """
    fault = parse_fault(environ[VARIABLE])
    if environ.get(ALLOW_VARIABLE) != "1":
        raise UsageError(
            f"{VARIABLE}={environ[VARIABLE]} asks for a fault, and faults aren't allowed here",
            needed=f"{ALLOW_VARIABLE}=1 where faults are wanted: this worker would be broken on purpose",
            fix=f"unset {VARIABLE}, or set {ALLOW_VARIABLE}=1 as well",
        )
    # a launcher of unknown size says 0
    if launch.size and fault.rank >= launch.size:
        raise UsageError(
            f"{VARIABLE}={environ[VARIABLE]}: there is no rank {fault.rank}",
            needed=f"a rank of this world, 0 to {launch.size - 1}",
            fix="name one of them",
        )
    if launch.rank == 0:
        name = "this rank" if fault.rank == 0 else f"rank {fault.rank}"
        log.warning(f"a fault is armed ({VARIABLE}): {name} {fault}")
    armed = InjectedFault(fault, launch.rank, phases, log)
    if launch.rank == fault.rank:
        # a late exception has to come up in the main thread, in the middle of whatever it does: a signal gets it out of what blocks in C too
        signal.signal(_interruption(), armed.interrupt)
        phases.on_phase(armed.begins)
    return armed


class InjectedFault:
    """A fault that waits for its phase. Each method may be called from any thread.

    Args:
        fault: what is to happen.
        rank: this one.
        phases: what it is doing.
        log: says that it happens.
    """

    def __init__(self, fault: Fault, rank: int, phases: PhaseTracker, log: RankLogger) -> None:
        self._fault, self._rank, self._phases, self._log = fault, rank, phases, log
        self._lock = threading.Lock()
        self._reached = False
        self._task: asyncio.Task[object] | None = None

    def follow(self, lifeline: HeartbeatClient) -> None:
        """Learn from rank 0 which phase the world has begun; a rank other than 0 drains, say, without knowing."""
        if self._fault.rank == self._rank:
            lifeline.on_phase(self._world_begins)

    def begins(self, phase: str) -> None:
        """Hear that this rank begins a phase. May raise, or not return."""
        # what a rank other than 0 begins first after the verdict, whatever it calls it, is its part of the load
        self._reach(phase if self._rank == 0 or phase in _OWN else "load")

    def interrupt(self, _: int, __: object) -> None:
        """Have it happen in the main thread. Handles a signal."""
        self._happen()

    def _world_begins(self, phase: str) -> None:
        if phase not in ("hardware_check", "load"):
            self._reach(phase)

    def _reach(self, phase: str) -> None:
        with self._lock:
            if self._reached or phase != self._fault.phase:
                return
            self._reached = True
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and not self._fault.delay and not self._fault.trigger:
            self._happen()
        else:
            self._task = _current_task() if in_main else None
            threading.Thread(target=self._wait, name="watch", daemon=True).start()

    def _wait(self) -> None:
        time.sleep(self._fault.delay)
        while self._fault.trigger and not os.path.exists(self._fault.trigger):
            time.sleep(_LOOK_SECONDS)
        main = threading.main_thread().ident
        if self._fault.action not in ("exception", "slow") or main is None:
            self._happen()
        elif self._task is not None:
            self._task.get_loop().call_soon_threadsafe(self._happen_to, self._task)
        else:
            signal.pthread_kill(main, _interruption())

    def _happen_to(self, task: asyncio.Task[object]) -> None:
        """Have it happen in a task: its event loop would log an exception in a callback or a signal's handler, and go on."""
        try:
            self._happen()
        except FaultError as error:
            _raise_in(task, error)

    def _happen(self) -> None:
        action, value = self._fault.action, self._fault.value
        self._log.info(
            f"fault: {action}{'' if action not in ('exit', 'slow') else f' {value:g}'} in {self._fault.phase}"
        )
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action == "hang":
            hold_the_interpreter()
        elif action == "exit":
            os._exit(int(value))
        elif action == "slow":
            time.sleep(value)
        elif action == "corrupt":
            from dynamo_mpi.common.fabric_payload import corrupt_payload

            corrupt_payload()
        else:
            raise FaultError(f"a fault on demand, in {self._fault.phase}")


def hold_the_interpreter() -> NoReturn:
    """Wait for ever in native code with Python's lock held, as a library of C++ in a deadlock does. No signal but SIGKILL ends it."""
    with contextlib.suppress(OSError, AttributeError):
        # called this way, a function keeps Python's lock; and zeros are a mutex that is free
        lock = ctypes.PyDLL(None).pthread_mutex_lock
        mutex = ctypes.create_string_buffer(_MUTEX_BYTES)
        lock(mutex)
        lock(mutex)
    while True:  # where C has no such lock, this rank at least does nothing
        time.sleep(_LOOK_SECONDS)


def _current_task() -> asyncio.Task[object] | None:
    if "asyncio" not in sys.modules:
        return None
    import asyncio

    with contextlib.suppress(RuntimeError):  # no event loop runs
        return asyncio.current_task()
    return None


def _raise_in(task: asyncio.Task[object], error: Exception) -> None:
    """Let a task's `await` raise."""
    awaited = getattr(task, "_fut_waiter", None)
    try:
        awaited.set_exception(error)  # type: ignore[union-attr] # None is as good as a future that is done
    except Exception:  # it is just about to go on, or waits for another task
        task.get_loop().call_later(_LOOK_SECONDS, _raise_in, task, error)


def _interruption() -> int:
    # a real-time signal that neither the C library nor MPI uses
    return signal.SIGRTMIN + 9
