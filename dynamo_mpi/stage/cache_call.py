# SPDX-License-Identifier: Apache-2.0
"""Requests of a rank to a helper process for compile caches, and what is answered if one can't be done."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.folder_walk import UnsafeFileError, fix_for
from dynamo_mpi.common.process import package_path
from dynamo_mpi.common.subprocess import ManagedProcess, Streams
from dynamo_mpi.stage.cache_archive import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MOST_SHOWN = 3


class Problem(NamedTuple):
    """Why compile caches can't be read or written.

    Args:
        problem: what is wrong.
        expected: what would be right.
        fix: what the user can do.
    """

    problem: str
    expected: str
    fix: str

    @classmethod
    def of(cls, error: OSError | ArchiveError, place: str = "") -> Problem:
        """Return the problem of an error, at a file or folder unless the error has one."""
        if isinstance(error, ArchiveError):
            return cls(_at(place, str(error)), error.expected, error.fix)
        if isinstance(error, UnsafeFileError):
            expected = "files and folders that only this user or root could have written"
            return cls(str(error.strerror), expected, fix_for(error, "remove it, or name another folder"))
        text = _at(str(error.filename or place), error.strerror or str(error))
        return cls(text, "rights to read and write there, and room", "correct its rights or make room")

    @classmethod
    def in_answer(cls, answer: Mapping[str, Any]) -> Problem | None:
        """Return the problem that an answer has, if any."""
        return cls(*(str(answer[name]) for name in cls._fields)) if "problem" in answer else None

    @classmethod
    def joined(cls, problems: Sequence[Problem]) -> Problem:
        """Return one for several, of which the first few are shown, each with its own advice."""
        shown = ("; ".join(dict.fromkeys(texts)) for texts in zip(*problems[:_MOST_SHOWN], strict=True))
        problem, expected, fix = shown
        more = len(problems) - _MOST_SHOWN
        return cls(problem + (f"; and {more} more" if more > 0 else ""), expected, fix)


_NO_ANSWER = Problem(
    "the helper process has ended without an answer",
    "that python -m dynamo_mpi.stage.cache_helper can run on the node",
    "look for its error in the log",
)


class HelperCall:
    """One request to a helper process of its own.

    Args:
        request: the request.
        environ: this process's environment.
    """

    def __init__(self, request: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self._process: ManagedProcess | None = None
        self._problem = _NO_ANSWER
        try:
            self._process = process = ManagedProcess(
                "compile caches",
                [sys.executable, "-m", "dynamo_mpi.stage.cache_helper"],
                environment={**environ, "PYTHONPATH": package_path(environ)},
                streams=Streams(subprocess.PIPE, subprocess.PIPE),
                end_with=signal.SIGTERM,
            )
            if process.popen.stdin is not None:
                with contextlib.suppress(OSError), process.popen.stdin as stdin:
                    stdin.write(json.dumps(request).encode() + b"\n")
        except OSError as error:
            self._problem = _NO_ANSWER._replace(problem=f"no process can be started: {error.strerror}")

    def result(self, seconds: float) -> dict[str, Any]:
        """Return the answer; one with a `Problem` if there is none within ``seconds``."""
        process = self._process
        if process is None or process.popen.stdout is None:
            return self._problem._asdict()
        lines: list[bytes] = []
        reading = threading.Thread(target=lambda: lines.extend(process.popen.stdout or ()), daemon=True)
        reading.start()
        reading.join(seconds)
        if reading.is_alive():
            self.cancel()
            return Problem(
                f"no answer within {seconds:g} s: the shared file system may hang",
                "a shared file system that answers in time",
                "look whether files in the folder of --cache can be read on that node",
            )._asdict()
        process.wait(1.0)
        try:
            answer = json.loads(lines[-1])
            return answer if isinstance(answer, dict) else self._problem._asdict()
        except (IndexError, ValueError):
            return self._problem._asdict()

    def cancel(self, seconds: float = 1.0) -> bool:
        """End the process, which removes what it has written in part; return whether it has ended."""
        if self._process is None:
            return True
        self._process.send(signal.SIGTERM)
        return self._process.wait(seconds) or self._process.kill(seconds)


def _at(place: str, text: str) -> str:
    return f"{place}: {text}" if place and not text.startswith(place) else text
