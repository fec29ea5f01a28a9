# SPDX-License-Identifier: Apache-2.0
"""The engine's logger: Python's, by the name ``TRT-LLM``, with a prefix of its own; it doesn't propagate."""

from __future__ import annotations

import logging
import sys


class Logger:
    """Has the levels that the stand-in uses."""

    def __init__(self) -> None:
        self._logger = logging.getLogger("TRT-LLM")
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", datefmt="%m/%d/%Y-%H:%M:%S"))
        self._logger.addHandler(handler)
        self._logger.propagate = False

    def error(self, *parts: str) -> None:
        """Log an error."""
        self._logger.error(" ".join(("[TRT-LLM] [E]", *parts)))
        sys.stdout.flush()


logger = Logger()
