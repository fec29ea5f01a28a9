# SPDX-License-Identifier: Apache-2.0
"""Injects a fault into one rank, for tests and for operators who want to see its consequences.

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

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple
from dynamo_mpi.common.phases import FORMER_PHASES, PHASES

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping
    from typing import NoReturn

    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.common.phases import PhaseTracker
    from dynamo_mpi.mpi.launcher import LaunchInfo
    from dynamo_mpi.supervisor.heartbeat_client import HeartbeatClient

VARIABLE, ALLOW_VARIABLE = "DYN_MPI_FAULT", "DYN_MPI_ALLOW_FAULTS"
ACTIONS = {
    "kill": "is killed (SIGKILL)",
    "stop": "is stopped (SIGSTOP)",
    "hang": "hangs with the GIL held",
    "exception": "raises an exception",
    "exit": "exits at once with code {value:g}",
    "slow": "sleeps for {value:g} s",
    "corrupt": "sends wrong data in the fabric probe",
}
# without a value
_DEFAULT_VALUES = {"slow": 5.0}
_PATTERN = re.compile(
    r"rank(\d{1,9}):([a-z_]+)(?:\+(\d+(?:\.\d+)?)|@(/.*))?:([a-z]+)(?:(?<=exit)(\d{1,3})|=(\d+(?:\.\d+)?))?"
)
_POLL_SECONDS = 0.02
_MUTEX_BYTES = 64
# the phases that a rank other than 0 begins by itself; from the load on, rank 0 leads
_LOCAL_PHASES = ("environment", "mpi_init", "preflight", "hardware_check", "stage")


class FaultError(RuntimeError):
    """The requested exception. Not a `DynamoMpiError`, so that it is handled like an unexpected one."""


class Fault(NamedTuple):
    """A requested fault.

    Args:
        rank: the rank in which it happens.
        phase: the phase in which it happens at the earliest.
        action: one of `ACTIONS`.
        value: an exit code, or seconds.
        delay: seconds from the phase's beginning.
        trigger: a file that must exist first; empty for none.
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
    """Parse ``rankN:PHASE:ACTION``.

    Raises:
        UsageError: the text has another form.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is not None:
        rank, phase, delay, trigger, action, code, value = match.groups()
        phase = FORMER_PHASES.get(phase, phase)
        right_value = (action == "exit") == (code is not None) and (value is None or action == "slow")
        if phase in PHASES and action in ACTIONS and right_value and int(code or 0) < 256:
            number = float(code or value or _DEFAULT_VALUES.get(action, 0.0))
            return Fault(int(rank), phase, action, number, float(delay or 0.0), trigger or "")
    raise UsageError(
        f"{VARIABLE}={text!r} is not a valid fault",
        expected="rankN:PHASE:ACTION, with PHASE+SECONDS for later in that phase, or PHASE@/PATH for when that file exists; "
        f"phases: {', '.join(PHASES)}; actions: kill, stop, hang, exception, exitCODE, slow, slow=SECONDS, corrupt",
        fix=f"set for instance {VARIABLE}=rank1:load:kill, or unset it",
    )


def arm(environ: Mapping[str, str], launch: LaunchInfo, phases: PhaseTracker, log: RankLogger) -> InjectedFault:
    """Read ``DYN_MPI_FAULT`` and schedule the fault in its rank and phase. Rank 0 logs a warning. Call it from the main thread.

    Raises:
        UsageError: it can't be parsed, no rank has that number, or ``DYN_MPI_ALLOW_FAULTS`` isn't 1.
    """
    fault = parse_fault(environ[VARIABLE])
    if environ.get(ALLOW_VARIABLE) != "1":
        raise UsageError(
            f"{VARIABLE}={environ[VARIABLE]} requests a fault, but faults aren't allowed here",
            expected=f"{ALLOW_VARIABLE}=1 where faults are wanted: this worker would be broken on purpose",
            fix=f"unset {VARIABLE}, or set {ALLOW_VARIABLE}=1 as well",
        )
    # the size is 0 if the launcher doesn't set it
    if launch.size and fault.rank >= launch.size:
        raise UsageError(
            f"{VARIABLE}={environ[VARIABLE]}: there is no rank {fault.rank}",
            expected=f"a rank of this world, 0 to {launch.size - 1}",
            fix="name one of them",
        )
    if launch.rank == 0:
        name = "this rank" if fault.rank == 0 else f"rank {fault.rank}"
        log.warning(f"a fault is armed ({VARIABLE}): {name} {fault}")
    armed = InjectedFault(fault, launch.rank, phases, log)
    if launch.rank == fault.rank:
        # a delayed exception must be raised in the main thread, whatever it does: a signal also interrupts blocking C calls
        signal.signal(_exception_signal(), armed.interrupt)
        phases.on_phase(armed.on_phase_begin)
    return armed


class InjectedFault:
    """A fault that waits for its phase. Thread-safe.

    Args:
        fault: the fault.
        rank: this rank.
        phases: this rank's phases.
        log: logs that the fault happens.
    """

    def __init__(self, fault: Fault, rank: int, phases: PhaseTracker, log: RankLogger) -> None:
        self._fault, self._rank, self._phases, self._log = fault, rank, phases, log
        self._lock = threading.Lock()
        self._is_triggered = False
        self._task: asyncio.Task[object] | None = None

    def follow(self, client: HeartbeatClient) -> None:
        """Follow the world's phase, which rank 0 sends: a rank other than 0 has no phase of its own for a drain, for instance."""
        if self._fault.rank == self._rank:
            client.on_phase(self._on_world_phase)

    def on_phase_begin(self, phase: str) -> None:
        """Handle the begin of a phase of this rank. May raise, or not return."""
        # the first phase of a rank other than 0 after preflight is its part of the load, whatever its name
        self._on_phase_reached(phase if self._rank == 0 or phase in _LOCAL_PHASES else "load")

    def interrupt(self, _: int, __: object) -> None:
        """Execute the fault in the main thread. A signal handler."""
        self._execute()

    def _on_world_phase(self, phase: str) -> None:
        if phase not in ("hardware_check", "stage", "load"):
            self._on_phase_reached(phase)

    def _on_phase_reached(self, phase: str) -> None:
        with self._lock:
            if self._is_triggered or phase != self._fault.phase:
                return
            self._is_triggered = True
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and not self._fault.delay and not self._fault.trigger:
            self._execute()
        else:
            self._task = _current_task() if in_main else None
            threading.Thread(target=self._wait, name="watch", daemon=True).start()

    def _wait(self) -> None:
        time.sleep(self._fault.delay)
        while self._fault.trigger and not os.path.exists(self._fault.trigger):
            time.sleep(_POLL_SECONDS)
        main = threading.main_thread().ident
        if self._fault.action not in ("exception", "slow") or main is None:
            self._execute()
        elif self._task is not None:
            self._task.get_loop().call_soon_threadsafe(self._execute_in_task, self._task)
        else:
            signal.pthread_kill(main, _exception_signal())

    def _execute_in_task(self, task: asyncio.Task[object]) -> None:
        """Execute the fault in a task: an event loop only logs an exception of a callback or signal handler."""
        try:
            self._execute()
        except FaultError as error:
            _raise_in(task, error)

    def _execute(self) -> None:
        action, value = self._fault.action, self._fault.value
        self._log.info(
            f"fault: {action}{'' if action not in ('exit', 'slow') else f' {value:g}'} in {self._fault.phase}"
        )
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action == "hang":
            hang_with_gil()
        elif action == "exit":
            os._exit(int(value))
        elif action == "slow":
            time.sleep(value)
        elif action == "corrupt":
            from dynamo_mpi.common.fabric_payload import corrupt_payload

            corrupt_payload()
        else:
            raise FaultError(f"a fault on demand, in {self._fault.phase}")


def hang_with_gil() -> NoReturn:
    """Block forever in native code with the GIL held, like a C++ library in a deadlock. Only SIGKILL ends it."""
    with contextlib.suppress(OSError, AttributeError):
        # `PyDLL` calls functions with the GIL held; a mutex of zeros is unlocked
        lock = ctypes.PyDLL(None).pthread_mutex_lock
        mutex = ctypes.create_string_buffer(_MUTEX_BYTES)
        lock(mutex)
        lock(mutex)
    while True:  # if the C library has no such mutex, this rank at least does nothing
        time.sleep(_POLL_SECONDS)


def _current_task() -> asyncio.Task[object] | None:
    if "asyncio" not in sys.modules:
        return None
    import asyncio

    with contextlib.suppress(RuntimeError):  # no event loop runs
        return asyncio.current_task()
    return None


def _raise_in(task: asyncio.Task[object], error: Exception) -> None:
    """Make a task's `await` raise an error."""
    awaited = getattr(task, "_fut_waiter", None)
    try:
        awaited.set_exception(error)  # type: ignore[union-attr] # None is handled like a future that is done
    except Exception:  # the task is about to resume, or waits for another task
        task.get_loop().call_later(_POLL_SECONDS, _raise_in, task, error)


def _exception_signal() -> int:
    # a real-time signal that neither the C library nor MPI uses
    return signal.SIGRTMIN + 9
