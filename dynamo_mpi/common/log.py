# SPDX-License-Identifier: Apache-2.0
"""A rank's logger: lines on stderr and in the rank's log file, each with rank and host once."""

from __future__ import annotations

import contextlib
import os

from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.common.log_record import Fact


class RankLogger:
    """Logs for one rank, with secrets redacted. May be called from any thread and from signal handlers; no method raises.

    A rank that logs nothing opens no file for it.

    Args:
        rank: this rank.
        host: this node.
    """

    def __init__(self, rank: int, host: str) -> None:
        self.rank, self.host = rank, host

    def debug(self, text: str) -> None:
        """Log details, which are omitted by default."""
        self._emit("DEBUG", text)

    def info(self, text: str, fields: Mapping[str, Fact] | None = None) -> None:
        """Log what the rank does.

        Args:
            text: the message.
            fields: the same as fields, for JSON lines (``DYN_LOGGING_JSONL``).
        """
        self._emit("INFO", text, fields)

    def warning(self, text: str) -> None:
        """Log a problem that doesn't end the worker; the line begins with ``warning: ``."""
        self._emit("WARN", f"warning: {text}")

    def warning_aside(self, text: str) -> None:
        """Log a warning from a thread of its own, as the caller must not wait for what reads the log."""
        # not before the preflight's result, for which no rank needs threads
        import threading

        threading.Thread(target=self.warning, args=(text,), name="warning", daemon=True).start()

    def error(self, text: str) -> None:
        """Log why the worker ends; the text must begin with ``error in PHASE: `` itself. Errors are never omitted."""
        self._emit("ERROR", text)

    def _emit(self, level: str, text: str, fields: Mapping[str, Fact] | None = None) -> None:
        try:
            from dynamo_mpi.common.log_record import Level
            from dynamo_mpi.common.log_writer import log_writer
        except Exception as error:  # the file system is gone, or a signal interrupted this import
            with contextlib.suppress(OSError):
                why = f"a message is omitted because its secrets can't be redacted: {type(error).__name__}"
                os.write(2, f"dynamo_mpi: rank {self.rank} on {self.host}: {why}\n".encode())
            return
        log_writer.emit(self.rank, self.host, text, Level[level], fields)


def print_trtllm_launch_line(kind: str, rank: int, size: int) -> None:
    """Write the line that ``trtllm-llmapi-launch`` writes and that its users search for.

    Args:
        kind: ``"leader"`` or ``"worker"``.
        rank: this rank.
        size: ranks of the world.
    """
    from dynamo_mpi.common.log_record import Level
    from dynamo_mpi.common.log_writer import log_writer

    text = f"rank{rank} run mgmn {kind} node with mpi_world_size: {size} ..."
    if log_writer.format.jsonl:
        log_writer.emit(rank, os.uname().nodename, text, Level.INFO)
    else:
        log_writer.write_raw(f"{text}\n".encode())
