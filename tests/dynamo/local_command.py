# SPDX-License-Identifier: Apache-2.0
"""``dynamo-mpi local`` as its user starts it, and what it leaves behind.

Every process of a run inherits a mark in its environment, so a survivor is found wherever it hangs in the process tree.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.conftest import ROOT
from tests.dynamo.running import eventually

MARK = "DYN_MPI_TEST_RUN"
FULL_SECONDS = 120.0


class LocalCommand:
    """One run of the command. At the end of the block whatever is left of it is killed.

    Args:
        folder: empty folder; in it are the run's TMPDIR and HOME.
        words: flags after ``dynamo-mpi local``.
        stdout: file descriptor to write to, instead of what ``out`` reads.
    """

    def __init__(self, folder: Path, *words: str, stdout: int | None = None) -> None:
        self.folder = folder / "tmp"
        self.home = folder / "home"
        for made in (self.folder, self.home):
            made.mkdir()
        self._mark = f"{MARK}={uuid.uuid4().hex}".encode()
        self._out, self._err = folder / "out", folder / "err"
        name, _, value = self._mark.decode().partition("=")
        own = {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.folder), "HOME": str(self.home), name: value}
        variables = os.environ | own
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dynamo_mpi.cli.main", "local", *words],
                stdin=subprocess.DEVNULL,
                stdout=out if stdout is None else stdout,
                stderr=err,
                env=variables,
                start_new_session=True,
            )

    def __enter__(self) -> LocalCommand:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for pid in self.survivors():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def out(self) -> str:
        """What it has written to stdout."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """What it has written to stderr."""
        return self._err.read_text()

    def survivors(self) -> list[int]:
        """Return all living processes of the run, the command's own among them."""
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                if self._mark in environment.read_bytes().split(b"\0"):
                    found.append(int(environment.parent.name))
        return found

    def wait(self, seconds: float = FULL_SECONDS) -> int:
        """Wait for its end and return the exit code."""
        return self.process.wait(seconds)

    def until_said(self, text: str, seconds: float = FULL_SECONDS) -> None:
        """Wait until ``text`` stands in stderr."""

        def said() -> bool:
            found = text in self.err
            assert found or self.process.poll() is None, f"ended before it said {text!r}:\n{self.err}"
            return found

        eventually(said, f"{text!r} on stderr", seconds)

    def report(self) -> dict[str, Any]:
        """Wait for the JSON object on stdout and return it."""

        def line() -> bool:
            found = self.out.endswith("\n")
            assert found or self.process.poll() is None, f"ended without a report:\n{self.err}"
            return found

        eventually(line, "a line on stdout", FULL_SECONDS)
        content: dict[str, Any] = json.loads(self.out)
        return content

    def assert_nothing_left(self) -> None:
        """The command has ended, and no process and no file of it is left."""
        assert self.process.poll() is not None
        assert self.survivors() == []
        assert [*self.folder.iterdir(), *self.home.rglob("*")] == []
