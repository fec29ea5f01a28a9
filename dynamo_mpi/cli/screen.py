# SPDX-License-Identifier: Apache-2.0
"""Shows a text repeatedly: redrawn in place on a terminal, appended if the output is a file or a pipe."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TYPE_CHECKING

from dynamo_mpi.cli.style import paint, write_out
from dynamo_mpi.common.display import without_controls
from dynamo_mpi.common.signals import Interrupts

if TYPE_CHECKING:
    from collections.abc import Callable

# to the alternate screen, without line wrap and cursor; and back
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?7l\x1b[?25l", "\x1b[?25h\x1b[?7h\x1b[?1049l"
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


def watch(look: Callable[[], str], period_seconds: float, *, redraw: bool, title: str) -> None:
    """Show what ``look`` returns until a signal arrives.

    Args:
        look: returns the text.
        period_seconds: seconds between two calls.
        redraw: on a terminal, redraw.
        title: the screen's title.

    Raises:
        Interrupted: a signal has arrived.
    """
    with Interrupts() as interrupts:
        if not redraw or not sys.stdout.isatty():
            while True:
                write_out(look())
                interrupts.pause(period_seconds)
        text = ""
        _write(_ENTER)
        try:
            while True:
                text = without_controls(look())
                clock = time.strftime("%H:%M:%S")
                _draw([f"{title}, every {period_seconds:g} s, {clock}", "", *text.splitlines()])
                interrupts.pause(period_seconds)
        finally:
            _write(_LEAVE)
            if text:
                write_out(text)  # stays on the terminal


def _draw(lines: list[str]) -> None:
    width, height = shutil.get_terminal_size()
    if len(lines) > height:
        lines = [*lines[: height - 1], f"… {len(lines) - height + 1} more lines"]
    body = "\r\n".join(paint(line[:width], sys.stdout) + _REST_OF_LINE for line in lines)
    _write(_HOME + body + _REST_OF_SCREEN)


def _write(text: str) -> None:
    data = text.encode(sys.stdout.encoding or "ascii", "replace")
    sys.stdout.flush()
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]
