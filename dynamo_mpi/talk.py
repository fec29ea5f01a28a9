# SPDX-License-Identifier: Apache-2.0
"""What a worker says to its user: lines on stderr, each with rank and host once."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.observe.levels import Level
    from dynamo_mpi.observe.lines import Fact


class Voice:
    """Speaks for one rank. Cheap until it has something to say: a rank that says nothing opens no file for it.

    Args:
        rank: this rank.
        host: this node.
    """

    def __init__(self, rank: int, host: str) -> None:
        self.rank, self.host = rank, host

    def say(self, text: str, level: Level | None = None, facts: Mapping[str, Fact] | None = None) -> None:
        """Say ``text``, less the secrets in it. From any thread; does not raise.

        Args:
            text: for people.
            level: how much it matters; None where the text says so by how it begins: ``error``, ``warning``.
            facts: the same for programs: fields of the line where it is JSON (``DYN_LOGGING_JSONL``).
        """
        try:
            from dynamo_mpi.observe.speech import speech
        except Exception as error:  # the file system has gone, or a signal came in the middle of this very import
            with contextlib.suppress(OSError):
                why = f"what it has to say can't be cleared of secrets: {type(error).__name__}"
                os.write(2, f"dynamo_mpi: rank {self.rank} on {self.host}: {why}\n".encode())
            return
        speech.speak(self.rank, self.host, text, level, facts)


def tell_launch(kind: str, rank: int, size: int) -> None:
    """Write the line that users of ``trtllm-llmapi-launch`` look for.

    Args:
        kind: ``"leader"`` or ``"worker"``.
        rank: this rank.
        size: ranks of the world.
    """
    from dynamo_mpi.observe.speech import speech

    text = f"rank{rank} run mgmn {kind} node with mpi_world_size: {size} ..."
    if speech.style.jsonl:
        speech.speak(rank, os.uname().nodename, text)
    else:
        speech.relay(f"{text}\n".encode())
