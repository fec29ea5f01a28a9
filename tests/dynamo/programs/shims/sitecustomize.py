# SPDX-License-Identifier: Apache-2.0
"""Holds a rank up, for tests of signals: first on PYTHONPATH, so that it is imported before the worker.

SHIM_SLEEPER=N: while it loads, rank N hangs in C, and the others wait for it in MPI_Barrier.
SHIM_LEAVER=N: rank N hangs in C when its engine has closed.
SHIM_FINALIZER=N: rank N hangs in C before its own MPI_Finalize, so that the others wait for it in MPI_Finalize.
SHIM_BREAKER=N: rank 0's engine breaks when it has run N steps.
SHIM_TELLTALE=N: rank N can't build its engine, and fails with all of SHIM_SECRETS.
SHIM_STARTER=N: when it has loaded, rank N starts processes in sessions of their own that outlive it, one anew and one only forked, and
writes their pids into the file SHIM_STARTED.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

RANK = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("SLURM_PROCID")


def hang_in_c() -> None:
    """Wait for a lock that this thread holds itself: a signal's handler would end a mere sleep."""
    library, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(lock)
    library.pthread_mutex_lock(lock)


def load_never(self: Any) -> None:
    from mpi4py import MPI

    where = "in C" if os.environ["SHIM_SLEEPER"] == RANK else "in a collective"
    os.write(2, f"rank {RANK} is in load, {where}\n".encode())
    if where == "in C":
        hang_in_c()
    MPI.COMM_WORLD.Barrier()


def print_secrets_and_fail(*_: Any, **__: Any) -> None:
    print("the engine's own words", file=sys.stderr, flush=True)
    raise RuntimeError(f"no weights there: {os.environ['SHIM_SECRETS']}")


def hang_after(follow: Any) -> Any:
    def follow_and_hang(self: Any) -> None:
        follow(self)
        hang_in_c()

    return follow_and_hang


def break_after(run_step: Any, steps: int) -> Any:
    left = iter(range(steps))

    def run_or_break(*arguments: Any) -> None:
        if next(left, None) is None:
            raise MemoryError("no memory for this step")
        run_step(*arguments)

    return run_or_break


def start_after(load: Any) -> Any:
    def load_and_start(self: Any) -> None:
        load(self)
        # a shell between, so that an orphan is left: it holds what the rank has as stdout and stderr
        shell = "sleep 600 >&2 & echo $!"
        anew = subprocess.run(["setsid", "sh", "-c", shell], stdout=subprocess.PIPE, text=True, check=True).stdout
        reader, writer = os.pipe()
        if not os.fork():
            os.setsid()
            if os.fork():
                os._exit(0)
            os.write(writer, f"{os.getpid()}".encode())
            os.close(writer)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                signal.pause()
        os.close(writer)
        forked = os.read(reader, 32).decode()
        Path(os.environ["SHIM_STARTED"]).write_text(f"{anew.split()[0]} {forked}")

    return load_and_start


def change(module: ModuleType) -> None:
    if os.environ.get("SHIM_STARTER") == RANK:
        module.ReferenceEngine.load = start_after(module.ReferenceEngine.load)
    if "SHIM_SLEEPER" in os.environ:
        module.ReferenceEngine.load = load_never
    if (steps := os.environ.get("SHIM_BREAKER")) and RANK == "0":
        module.ReferenceEngine._run_step = break_after(module.ReferenceEngine._run_step, int(steps))
    if os.environ.get("SHIM_TELLTALE") == RANK:
        module.ReferenceEngine.__init__ = print_secrets_and_fail
    if os.environ.get("SHIM_LEAVER") == RANK:
        module.ReferenceEngine.follow = hang_after(module.ReferenceEngine.follow)
    if os.environ.get("SHIM_FINALIZER") == RANK:
        from dynamo_mpi.runtime import main

        setattr(main, "finalize_mpi", hang_in_c)  # noqa: B010 - it is not among what the module exports


class Finder(importlib.abc.MetaPathFinder):
    """Changes the engine's module once it is imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "dynamo_mpi.engines.reference.engine":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if RANK is not None:
    sys.meta_path.insert(0, Finder())
