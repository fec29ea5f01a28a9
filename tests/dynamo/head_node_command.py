# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo_mpi.head_node`` as a job step starts it, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from tests.dynamo.marked_command import MarkedCommand
from tests.dynamo.running import eventually

SECONDS = 60.0
# what a part's command line holds
PARTS = {"etcd": b"--advertise-client-urls", "nats": b"-js", "frontend": b"dynamo.frontend"}


class HeadNodeCommand(MarkedCommand):
    """One run. At the end of the block whatever is left of it is killed.

    Args:
        folder: for its output, TMPDIR and HOME; runs may share it.
        words: its flags.
        environment: further variables.
    """

    def __init__(self, folder: Path, *words: str, **environment: str) -> None:
        self.run_dir = folder / "a job's folder"
        command = [sys.executable, "-m", "dynamo_mpi.head_node", "--run-dir", str(self.run_dir), *words]
        super().__init__(folder, command, environment)

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

    def part(self, name: str) -> int:
        """Return the process of ``etcd``, ``nats`` or ``frontend``."""
        return next(pid for pid, words in self.command_lines().items() if PARTS[name] in words)

    def assert_nothing_left(self) -> None:
        """It has ended, and no process, no word of readiness and no file on this node is left."""
        assert self.process.poll() is not None
        eventually(lambda: not self.survivors(), "no process is left", 10)
        assert not self.services_file.exists()
        assert list(self.temporary.iterdir()) == []
