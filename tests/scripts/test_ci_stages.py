# SPDX-License-Identifier: Apache-2.0
"""`.ci/stages`: the first failing stage ends `.ci/run`; `.ci/full` goes on, names all that failed, and resumes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

STAGES = """
set -euo pipefail
source "$1/.ci/stages"
fails() { false; echo unreachable; }
[[ -z $2 ]] || keep_going "$2"
stage "one of two" bash -c 'echo one >>"$0/ran"' "$PWD"
stage "fails, as a function" fails
stage "two" bash -c 'echo two >>"$0/ran"; exit 7' "$PWD"
exit_by_stages
"""


def run(folder: Path, keep_going: str, *, resume: bool = False) -> tuple[int, str, list[str]]:
    """Return the exit code, the output, and which of the stages that leave a trace ran."""
    trace = folder / "ran"
    trace.unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", "-c", STAGES, "bash", str(ROOT), keep_going],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "resume": str(int(resume))},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, trace.read_text().split() if trace.exists() else []


def test_the_first_failing_stage_ends_the_script(tmp_path: Path) -> None:
    code, out, ran = run(tmp_path, "")
    assert (code, ran) == (1, ["one"])
    assert "fails, as a function: failed" in out


def test_all_stages_run_and_all_failures_are_named(tmp_path: Path) -> None:
    code, out, ran = run(tmp_path, str(tmp_path / "state"))
    assert (code, ran) == (1, ["one", "two"])
    assert "unreachable" not in out
    for line in ("fails, as a function: failed with 1 after", "two: failed with 7 after", "one of two: 0 s"):
        assert line in out


def test_only_what_has_not_passed_runs_again(tmp_path: Path) -> None:
    run(tmp_path, str(tmp_path / "state"))
    code, out, ran = run(tmp_path, str(tmp_path / "state"), resume=True)
    assert (code, ran) == (1, ["two"])
    assert "one of two: 0 s, in an earlier run" in out


BESIDE = """
set -euo pipefail
source "$1/.ci/stages"
beside "waits for the other" bash -c 'until [[ -e "$0/go" ]]; do sleep 0.01; done; echo gone; exit "$1"' "$PWD" "$2"
stage "the other" touch "$PWD/go"
await_beside
stage "the next" touch "$PWD/next"
"""


@pytest.mark.parametrize("code", [0, 7])
def test_what_runs_beside_others_is_awaited_and_ends_the_script_if_it_fails(tmp_path: Path, code: int) -> None:
    done = subprocess.run(
        ["bash", "-c", BESIDE, "bash", str(ROOT), str(code)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, (tmp_path / "next").exists()) == (code, code == 0), done.stderr
    assert "gone\n" in done.stdout.partition("waits for the other, beside others:")[2]
    assert ("waits for the other, beside others: failed\n" in done.stdout) is (code != 0)


def test_what_ran_beside_a_stage_that_failed_is_shown(tmp_path: Path) -> None:
    script = f'set -euo pipefail; source "{ROOT}/.ci/stages"; beside "lint" bash -c "echo unsorted; exit 1"; stage "fails" false'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "=== lint, beside others, when another stage failed\nunsorted\n" in done.stdout


def test_full_names_files_that_exist() -> None:
    words = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / ".ci").iterdir() if path.is_file()).split()
    named = {
        word.strip("'\";)").partition("::")[0] for word in words if word.startswith(("tests/", "scripts/", ".ci/"))
    }
    missing = {
        name for name in named if "*" not in name and "{" not in name and not (ROOT / name.rstrip(".,:]")).exists()
    }
    assert missing == set()
