# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo_mpi.head_node`` as a job step starts it, and what it leaves behind.

Its processes inherit a mark in their environment, so a survivor is found wherever it hangs in the process tree.
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
SECONDS = 60.0
# what a part's command line holds
PARTS = {"etcd": b"--advertise-client-urls", "nats": b"-js", "frontend": b"dynamo.frontend"}


class HeadNodeCommand:
    """One run. At the end of the block whatever is left of it is killed.

    Args:
        folder: for its output, TMPDIR and HOME; runs may share it.
        words: its flags.
        environment: further variables.
    """

    def __init__(self, folder: Path, *words: str, **environment: str) -> None:
        self.run_dir = folder / "a job's folder"
        self.temporary, home = folder / "tmp", folder / "home"
        for made in (self.temporary, home):
            made.mkdir(exist_ok=True)
        self._mark = f"{MARK}={uuid.uuid4().hex}".encode()
        self._err = folder / f"err-{uuid.uuid4().hex[:6]}"
        name, _, value = self._mark.decode().partition("=")
        own = {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary), "HOME": str(home), name: value, **environment}
        with self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dynamo_mpi.head_node", "--run-dir", str(self.run_dir), *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=err,
                env=os.environ | own,
                start_new_session=True,
            )

    def __enter__(self) -> HeadNodeCommand:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for pid in self.survivors():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def err(self) -> str:
        """What it has said."""
        return self._err.read_text()

    @property
    def services_file(self) -> Path:
        """What appears when all is ready."""
        return self.run_dir / "services.json"

    def services(self) -> dict[str, Any]:
        """Wait until all is ready and return what it has published."""

        def read() -> dict[str, Any] | None:
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.err}"
            with contextlib.suppress(FileNotFoundError):
                content: dict[str, Any] = json.loads(self.services_file.read_text())
                return content if content["pid"] == self.process.pid else None
            return None

        return eventually(read, "services.json", SECONDS)

    def until_said(self, text: str) -> None:
        """Wait until ``text`` has been said."""

        def said() -> bool:
            found = text in self.err
            assert found or self.process.poll() is None, f"it ended before it said {text!r}:\n{self.err}"
            return found

        eventually(said, text, SECONDS)

    def survivors(self) -> list[int]:
        """Return all living processes of the run, its own among them."""
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

    def part(self, name: str) -> int:
        """Return the process of ``etcd``, ``nats`` or ``frontend``."""
        return next(pid for pid, words in self.command_lines().items() if PARTS[name] in words)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal it, and return its exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end and return the exit code."""
        return self.process.wait(SECONDS)

    def assert_nothing_left(self) -> None:
        """It has ended, and no process, no word of readiness and no file on this node is left."""
        assert self.process.poll() is not None
        eventually(lambda: not self.survivors(), "no process is left", 10)
        assert not self.services_file.exists()
        assert list(self.temporary.iterdir()) == []
