# SPDX-License-Identifier: Apache-2.0
"""``python -m tools.build_site [FOLDER]``: the site, into ``build/site`` by default. Needs the extra ``docs``; any warning is an error."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.build_site.stage import stage

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def main(target: Path) -> int:
    """Build the site; return Sphinx' exit code."""
    with tempfile.TemporaryDirectory(prefix="site-") as name:
        source = Path(name)
        stage(ROOT, source)
        shutil.copyfile(HERE / "conf.py", source / "conf.py")
        (source / "_static").mkdir()
        shutil.copyfile(HERE / "site.css", source / "_static" / "site.css")
        shutil.rmtree(target, ignore_errors=True)
        words = [
            "-m",
            "sphinx",
            "--quiet",
            "--fail-on-warning",
            "--keep-going",
            "-d",
            f"{name}/.doctrees",
            name,
            str(target),
        ]
        return subprocess.run([sys.executable, *words], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "site"))
