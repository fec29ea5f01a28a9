# SPDX-License-Identifier: Apache-2.0
"""``dynamo-mpi local`` as its user starts it, and what it leaves behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.dynamo.marked_command import FULL_SECONDS, MarkedCommand
from tests.dynamo.running import eventually


class LocalCommand(MarkedCommand):
    """One run of the command. At the end of the block whatever is left of it is killed.

    Args:
        folder: empty folder; in it are the run's TMPDIR and HOME.
        words: flags after ``dynamo-mpi local``.
        stdout: file descriptor to write to, instead of what ``out`` reads.
    """

    def __init__(self, folder: Path, *words: str, stdout: int | None = None) -> None:
        command = [sys.executable, "-m", "dynamo_mpi.cli.main", "local", *words]
        super().__init__(folder, command, {}, stdout=stdout)

    @property
    def folder(self) -> Path:
        """Its TMPDIR."""
        return self.temporary

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
        # a node agent whose rank was killed asks an etcd that was killed, too, for a second
        eventually(lambda: not self.survivors(), "no process is left", 3)
        assert [*self.temporary.iterdir(), *self.home.rglob("*")] == []
