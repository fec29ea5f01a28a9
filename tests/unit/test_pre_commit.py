# SPDX-License-Identifier: Apache-2.0
""".pre-commit-config.yaml calls what `make check` calls."""

from __future__ import annotations

import re
import subprocess

import yaml

from tests.conftest import ROOT


def test_hooks_call_what_make_check_calls() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert local["repo"] == "local"
    assert {hook["language"] for hook in local["hooks"]} == {"system"}
    rules = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ncheck:\n")[2].partition("\n\n")[0]
    lines = [line.replace("$(BIN)/", "").replace("$(MAKE) --no-print-directory", "make") for line in rules.split("\t")]
    checks = [" ".join(line.replace("$(SHELL_FILES)", "").split()).removesuffix(" .") for line in lines]
    entries = [hook["entry"].replace(".venv/bin/", "").removesuffix(" --force-exclude") for hook in local["hooks"]]
    assert entries == [check for check in checks if check]


def test_shell_hooks_see_the_files_of_make_check() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    (pattern,) = {str(hook["files"]) for hook in hooks if "files" in hook}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True, check=True).stdout.split(
        "\n"
    )
    shell = [path for path in listed if path.endswith(".sh") or path.startswith(".ci/")]
    assert [path for path in listed if re.search(pattern, path)] == shell
