# SPDX-License-Identifier: Apache-2.0
"""`scripts/test.sh` runs one or two failed tests again by themselves, and only where that says something."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

# in place of pytest: notes its arguments, fails as often as it is to, and keeps what failed, as pytest does
PYTEST = """#!/bin/bash
[[ $1 == -m ]] || exec python3 "$@"
echo "$*" >>ran
cache=.pytest_cache
read -r code <codes
sed -i 1d codes
mkdir -p "$cache/v/cache"
((code == 0)) || cp failed "$cache/v/cache/lastfailed"
exit "$code"
"""
TWO = '{"tests/a.py::test_a[x y]": true, "tests/b.py::test_b": true}'
THREE = TWO.replace("}", ', "tests/c.py::test_c": true}')


@pytest.mark.parametrize(
    ("stage", "options", "codes", "failed", "code", "runs"),
    [
        ("parallel", "-n 4", "0", TWO, 0, 1),
        ("parallel", "-n 4 --full", "1 0", TWO, 0, 2),
        ("alone", "--full", "1 1", TWO, 1, 2),
        ("parallel", "-n 4", "1 5", TWO, 5, 2),
        ("parallel", "-n 4", "1", THREE, 1, 1),
        ("fast", "-n 2", "1", TWO, 1, 1),
        ("alone", "-x", "1", TWO, 1, 1),
        ("alone", "--maxfail=1", "1", TWO, 1, 1),
        ("parallel", "-n 4", "2", TWO, 2, 1),
    ],
)
def test_which_failures_are_tried_once_more(
    tmp_path: Path, stage: str, options: str, codes: str, failed: str, code: int, runs: int
) -> None:
    script = (ROOT / "scripts" / "test.sh").read_text()
    function = re.search(r"^most_again=.*?^}$", script, re.MULTILINE | re.DOTALL)
    assert function is not None
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(PYTEST)
    fake.chmod(0o755)
    (tmp_path / "codes").write_text(codes.replace(" ", "\n") + "\n")
    (tmp_path / "failed").write_text(failed)
    body = f'set -euo pipefail; venv=.\n{function[0]}\nrun_stage {stage} {options}\necho "again: ${{again[*]-}}"'
    done = subprocess.run(["bash", "-c", body], cwd=tmp_path, capture_output=True, text=True, check=False)
    ran = (tmp_path / "ran").read_text().splitlines()
    assert (done.returncode, len(ran)) == (code, runs), done.stdout + done.stderr
    assert f"--stage {stage}" in ran[0]
    if runs == 2:
        # with the options of the first run, but beside no other test
        assert options in ran[1] and ran[1].endswith("-n 0 tests/a.py::test_a[x y] tests/b.py::test_b")
    assert ("again: tests/a.py" in done.stdout) == (code == 0 and runs == 2)
