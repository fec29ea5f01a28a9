# SPDX-License-Identifier: Apache-2.0
"""``python -m tools.record_run [--checkout DIR] [OUT]``: runs the README's first commands, and draws what they say as they say it.

The picture is an SVG whose lines appear at the times of the real run; pauses are cut, and lines of other programs are left
out, with a mark. Without animation, or where the reader prefers none, all of it is visible. Nothing in it is fetched from elsewhere.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    'scripts/local.sh --ask "What is the capital of France?"',
    'DYN_MPI_ALLOW_FAULTS=1 DYN_MPI_FAULT=rank1:serve:kill scripts/local.sh --ask "Tell me a story."',
)
_COLUMNS, _LINE, _CHARACTER, _MARGIN = 118, 19, 7.85, 14
_LONGEST_PAUSE = 0.6
_TYPING = 0.5
# mpirun's own words about the end, behind our report
_OTHERS = re.compile(r"^\[worker\] (?!dynamo_mpi:)|^installed ")
_KINDS = (
    ("prompt", re.compile(r"^\$ ")),
    ("error", re.compile(r"error in |ended with exit code")),
    ("warning", re.compile(r"warning: ")),
    ("answer", re.compile(r"^The capital")),
    ("quiet", re.compile(r"^ *\d+\.\d s  |^…|^verdict")),
)


# in place of the checkout's path
_SHOWN_AS = "~/dynamo_mpi"


class Line(NamedTuple):
    """A line of the terminal, and when it came, in seconds of the picture."""

    at: float
    text: str


def record(commands: Sequence[str], checkout: Path) -> Iterator[Line]:
    """Run commands one after the other, and yield what a terminal would show."""
    shown = 0.0
    for command in commands:
        yield Line(shown, f"$ {command}")
        shown += _TYPING
        before, left_out = time.monotonic(), False
        with subprocess.Popen(
            ["bash", "-c", command], cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as child:
            for text in child.stdout or ():
                now = time.monotonic()
                shown, before = shown + min(now - before, _LONGEST_PAUSE), now
                if _OTHERS.search(text):
                    if not left_out and not text.startswith("installed"):
                        yield Line(shown, "… (mpirun's own lines)")
                        left_out = True
                    continue
                yield from (Line(shown, part) for part in _wrapped(text.rstrip().replace(str(checkout), _SHOWN_AS)))
        shown += _LONGEST_PAUSE
        yield Line(shown, f"$ echo $?   # {child.returncode}")
        yield Line(shown, "")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _COLUMNS, subsequent_indent="    ", break_on_hyphens=False, drop_whitespace=False) or [
        ""
    ]


def draw(lines: Sequence[Line]) -> str:
    """Return the picture."""
    width = round(_COLUMNS * _CHARACTER + 2 * _MARGIN)
    height = _LINE * len(lines) + 2 * _MARGIN + 22
    rows = []
    for number, line in enumerate(lines):
        kind = next((name for name, pattern in _KINDS if pattern.search(line.text)), "text")
        place = f'x="{_MARGIN}" y="{_MARGIN + 36 + number * _LINE}"'
        text = escape(line.text)
        rows.append(f'<text class="{kind}" {place} style="animation-delay:{line.at:.2f}s">{text}</text>')
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">
<title>A worker starts on one machine and answers; then one of its ranks is killed, and the report names it</title>
<style>
text {{ font: 13px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre; fill: #d7dae0;
  animation: appear 1ms backwards; }}
.prompt {{ fill: #ffffff; font-weight: bold; }} .error {{ fill: #ff7b72; }} .warning {{ fill: #e3b341; }}
.answer {{ fill: #7ee787; font-weight: bold; }} .quiet {{ fill: #9aa4b2; }}
@keyframes appear {{ from {{ opacity: 0; }} to {{ opacity: 1; }} }}
@media (prefers-reduced-motion: reduce) {{ text {{ animation: none; }} }}
</style>
<rect width="{width}" height="{height}" rx="8" fill="#161b22"/>
<circle cx="20" cy="18" r="5" fill="#ff5f57"/><circle cx="38" cy="18" r="5" fill="#febc2e"/><circle cx="56" cy="18" r="5" fill="#28c840"/>
{chr(10).join(rows)}
</svg>
"""


def main(words: Sequence[str]) -> int:
    """Record, and write the picture."""
    parser = argparse.ArgumentParser(prog="python -m tools.record_run", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "docs" / "images" / "run.svg")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="where the commands run")
    arguments = parser.parse_args(words)
    os.environ["COLUMNS"] = str(_COLUMNS)
    lines = list(record(COMMANDS, arguments.checkout))
    arguments.out.write_text(draw(lines), encoding="utf-8")
    print("\n".join(f"{line.at:5.1f}  {line.text}" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
