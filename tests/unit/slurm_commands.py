# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for squeue and scancel, which write down what they are asked."""

from __future__ import annotations

from pathlib import Path

# steps are lines of a file; scancel writes down what it is asked, and a step that is cancelled is gone
SQUEUE = """\
#!/bin/sh
[ "$*" != "--jobs=7 --noheader --format=%e" ] || {{ date -d @1800000000 +"${{SLURM_TIME_FORMAT:-%FT%T}}"; exit; }}
[ "$*" = "--steps --jobs=7 --noheader --format=%i|%j" ] || exit 2
[ ! -e {folder}/down ] || {{ echo "slurm_load_jobs error: $(cat {folder}/down)" >&2; exit 1; }}
cat {folder}/steps
"""
SCANCEL = """\
#!/bin/sh
echo "$*" >> {folder}/asked
[ "$1" = --signal=TERM ] || : > {folder}/steps
"""


class SlurmCommands:
    """The stand-ins, and what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in (("squeue", SQUEUE), ("scancel", SCANCEL)):
            (folder / name).write_text(text.format(folder=folder))
            (folder / name).chmod(0o755)
        self.lists()

    def lists(self, *lines: str) -> None:
        (self.folder / "steps").write_text("".join(f"{line}\n" for line in lines))

    def fails(self, why: str) -> None:
        (self.folder / "down").write_text(why)

    @property
    def asked(self) -> list[str]:
        asked = self.folder / "asked"
        return asked.read_text().splitlines() if asked.exists() else []
