# SPDX-License-Identifier: Apache-2.0
"""``python -m tools.gen_docs [FOLDER]``: writes the pages, into ``docs`` by default."""

from __future__ import annotations

import sys
from pathlib import Path

from tools.gen_docs import command_line, engine_configs, exit_codes, record, rules, security, settings

PAGES = {
    "concepts/security.md": security.render,
    "../engine_configs/README.md": engine_configs.render,
    "reference/command-line.md": command_line.render,
    "reference/exit-codes.md": exit_codes.render,
    "reference/record.md": record.render,
    "reference/rules.md": rules.render,
    "reference/settings.md": settings.render,
}
"""How each page is made, by its path from ``docs``."""


def main(folder: Path) -> None:
    """Write all pages into a folder."""
    for name, render in PAGES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs"))
