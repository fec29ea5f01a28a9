# SPDX-License-Identifier: Apache-2.0
"""A rank's log whose lines a test can look at."""

from __future__ import annotations

from collections.abc import Mapping

from dynamo_mpi.common.log import RankLogger
from dynamo_mpi.common.log_record import Fact


class RecordedLog(RankLogger):
    """Keeps the lines, as they would be printed, instead of writing them."""

    def __init__(self) -> None:
        super().__init__(0, "here")
        self.lines: list[str] = []

    def _emit(self, level: str, text: str, fields: Mapping[str, Fact] | None = None) -> None:
        self.lines.append(text)
