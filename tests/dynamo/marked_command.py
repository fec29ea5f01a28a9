# SPDX-License-Identifier: Apache-2.0
"""A command as its user starts it, and what it leaves behind.

Every process of a run inherits a mark in its environment, so a survivor is found wherever it hangs in the process tree.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from tests.conftest import ROOT
from tests.dynamo.running import eventually

# a name that no program takes for a setting of its own, and leaves out
MARK = "TEST_RUN_MARK"
FULL_SECONDS = 120.0


class MarkedCommand:
    """One run. At the end of the block whatever is left of it is killed.

    Args:
        folder: in it are the run's output, TMPDIR and HOME; runs may share it.
        words: the command line.
        environment: laid over this process's.
        stdout: file descriptor to write to, instead of what ``out`` reads.
        stderr: the same, instead of what ``err`` reads.
    """

    def __init__(
        self,
        folder: Path,
        words: Sequence[str],
        environment: Mapping[str, str],
        *,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> None:
        self.temporary, self.home = folder / "tmp", folder / "home"
        for made in (self.temporary, self.home):
            made.mkdir(exist_ok=True)
        run = uuid.uuid4().hex
        self._mark = f"{MARK}={run}".encode()
        self._out, self._err = folder / f"out-{run[:6]}", folder / f"err-{run[:6]}"
        # the model that is converted once, for all runs; without it each would leave 540 MB in its own HOME
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        # with another Dynamo, as .ci/newer-runtime lays it over the installed one
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        own = {"PYTHONPATH": path, "TMPDIR": str(self.temporary), "HOME": str(self.home), MARK: run}
        own["XDG_CACHE_HOME"] = cache
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out if stdout is None else stdout,
                stderr=err if stderr is None else stderr,
                env=os.environ | own | dict(environment),
                start_new_session=True,
            )

    def __enter__(self) -> Self:
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

    def command_lines(self) -> dict[int, list[bytes]]:
        """Return the words of each living process of the run."""
        found = {}
        for pid in self.survivors():
            with contextlib.suppress(OSError):
                found[pid] = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
        return found

    def wait(self, seconds: float = FULL_SECONDS) -> int:
        """Wait for its end and return the exit code."""
        return self.process.wait(seconds)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal it, and return its exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait_for_text(self, text: str, times: int = 1, seconds: float = FULL_SECONDS) -> None:
        """Wait until ``text`` stands in stderr, so many times."""

        def said() -> bool:
            found = self.err.count(text) >= times
            assert found or self.process.poll() is None, f"ended before it said {text!r}:\n{self.err}"
            return found

        eventually(said, f"{text!r} on stderr", seconds)
