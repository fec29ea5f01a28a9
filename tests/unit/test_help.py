# SPDX-License-Identifier: Apache-2.0
"""The help of each verb and of a rank: groups of options that exist, examples that can be typed; and completion scripts."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from dynamo_mpi.cli import completion, help_text
from dynamo_mpi.cli.main import _GROUPS, VERBS, Parser, main
from dynamo_mpi.config.help_text import WORKER, WORKER_EXAMPLES, Formatter, arrange
from dynamo_mpi.config.worker import build_parser


def parser_of(verb: str) -> argparse.ArgumentParser:
    whole = completion.whole_parser()
    (verbs,) = (one for one in whole._actions if isinstance(one, argparse._SubParsersAction))
    parser: argparse.ArgumentParser = verbs.choices[verb]
    return parser


def stale(parser: argparse.ArgumentParser, groups: Mapping[str, Sequence[str]]) -> set[str]:
    return {name for names in groups.values() for name in names} - {action.dest for action in parser._actions}


def words_of(example: str) -> list[str]:
    """The flags of an example, up to what a shell or the workers would take."""
    words = shlex.split(example.split("     (")[0])
    while "=" in words[0]:
        del words[0]
    start = words.index("dynamo-mpi") + 1 if "dynamo-mpi" in words else words.index("dynamo_mpi.worker") + 1
    ends = [words.index(word) for word in ("--", "&&") if word in words]
    return [word for word in words[start : min(ends, default=None)] if not word.startswith(">")]


def test_every_verb_is_in_one_group_and_has_examples() -> None:
    assert [verb for verbs in _GROUPS.values() for verb in verbs] == list(VERBS)
    assert set(help_text.EXAMPLES) == set(VERBS)
    assert set(help_text.GROUPS) <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_s_examples_can_be_typed(verb: str) -> None:
    parser = parser_of(verb)
    for example in help_text.EXAMPLES[verb]:
        if f"dynamo-mpi {verb}" in example:
            parser.parse_args(words_of(example.replace('eval "$(', "").replace(')"', ""))[1:])


def test_a_rank_s_examples_can_be_typed_and_its_groups_exist() -> None:
    for example in WORKER_EXAMPLES:
        build_parser().parse_args(words_of(example))
    assert stale(build_parser(), WORKER) == set()


def test_each_of_a_rank_s_options_is_in_one_group() -> None:
    grouped = [name for names in WORKER.values() for name in names]
    assert sorted(grouped) == sorted(set(grouped))
    # under "other options"
    rest = {action.dest for action in build_parser()._actions} - set(grouped)
    assert rest == {"help", "version", "settings", "preflight_only"}


def test_where_to_stage_is_shown_as_what_can_be_typed() -> None:
    assert "--stage DIR|auto|none" in build_parser().format_help()
    assert "--stage DIR|auto|none" in parser_of("stage").format_help()


def test_groups_name_options_that_exist() -> None:
    known = {action.dest for verb in help_text.GROUPS for action in parser_of(verb)._actions}
    assert {name for groups in help_text.GROUPS.values() for names in groups.values() for name in names} <= known
    assert stale(parser_of("launch"), help_text.GROUPS["launch"]) <= {"output", "limit"}


def test_a_long_help_is_in_groups_with_examples_last(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["launch", "--help"])
    out = capsys.readouterr().out
    assert out.startswith("usage: dynamo-mpi launch [OPTIONS] [-- FLAGS OF EVERY WORKER]\n")
    titles = [line for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == [*(f"{title}:" for title in help_text.GROUPS["launch"]), "other options:", "examples:"]
    assert out.rstrip().endswith(help_text.EXAMPLES["launch"][-1])
    assert "env var: NUM_DECODE_NODES | default: 1" in " ".join(out.split())


def test_what_no_group_names_is_shown_too() -> None:
    parser = Parser(prog="p", description="d", formatter_class=Formatter)
    parser.add_argument("--a", help="first")
    parser.add_argument("--b", help="second")
    arrange(parser, {"letters": ("b", "gone")}, ["p --a 1"])
    text = parser.format_help()
    assert (
        text.index("letters:\n  --b") < text.index("other options:") < text.index("  --a A") < text.index("  p --a 1")
    )


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["comp"], ["completion"]),
        (["check", "--mod"], ["--model", "--model-path"]),
        (["wait", "--out"], ["--output"]),
        (["wait", "--output", "j"], ["json"]),
    ],
)
def test_bash_completes_verbs_flags_and_values(
    typed: list[str], offered: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("shtab")
    bash = shutil.which("bash")
    assert bash is not None
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    words = " ".join(map(shlex.quote, ["dynamo-mpi", *typed]))
    script = f"""source {tmp_path}/script
COMP_WORDS=({words}); COMP_CWORD={len(typed)}
"$(complete -p dynamo-mpi | sed 's/.*-F \\([^ ]*\\).*/\\1/')"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == offered


def test_completion_without_its_package_is_refused_with_a_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    assert main(["completion", "zsh"]) == 64
    assert "fix:      pip install 'dynamo-mpi[cli]'" in capsys.readouterr().err
