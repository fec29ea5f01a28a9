# SPDX-License-Identifier: Apache-2.0
"""``docs/reference/command-line.md``: every command with its flags, from the parsers themselves."""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.checks import kv_settings
from dynamo_mpi.cli.help_text import arrange
from dynamo_mpi.cli.main import PROGRAM, VERBS, Parser
from dynamo_mpi.config import help_text, worker
from dynamo_mpi.deploy import head_node_settings as head_node
from dynamo_mpi.deploy.kubernetes import settings as pods
from tools.gen_docs.markdown import WRITTEN, code, plain, table

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEAD = f"""# Command line

{WRITTEN}
`dynamo-mpi VERB …` is the operator's command; from a checkout, `scripts/dynamo-mpi.sh VERB …` is the same without an
installation. The other commands here are what a launcher starts. A flag stands over its environment variable, that over a settings file
(the worker's), that over the default; [settings.md](settings.md) has all variables of a setting. A command says its data on stdout and
all else on stderr, and ends with one of the [exit codes](exit-codes.md).

"""


class _Command(NamedTuple):
    name: str
    summary: str
    parser: argparse.ArgumentParser
    further: str


def render() -> str:
    """Return the page."""
    commands = [*_verbs(), *_programs()]
    contents = "".join(f"- [`{name}`](#{_anchor(name)}): {summary}\n" for name, summary, *_ in commands)
    return _HEAD + contents + "".join(map(_section, commands))


def _verbs() -> Iterator[_Command]:
    for verb, summary in sorted(VERBS.items()):
        module = importlib.import_module(f"dynamo_mpi.cli.{verb}")
        parser = Parser(prog=f"{PROGRAM} {verb}", description=module.__doc__)
        module.add_arguments(parser)
        arrange(parser, verb)
        further = ""
        if getattr(module, "TAKES_DYNAMIC_FLAGS", False):
            further = "`--trtllm.KEY.KEY VALUE` flags are laid over the engine config."
        if getattr(module, "TAKES_FURTHER_WORDS", False):
            further = "Words after `--` are flags of every worker."
        yield _Command(parser.prog, summary, parser, further)


def _programs() -> Iterator[_Command]:
    one_rank = worker.build_parser()
    help_text.arrange(one_rank, help_text.WORKER, help_text.WORKER_EXAMPLES)
    yield _Command(
        "python -m dynamo_mpi.worker",
        "one rank of a worker; the same command in all of them",
        one_rank,
        "With `--engine trtllm` all other flags are `dynamo.trtllm`'s, and `--trtllm.KEY.KEY VALUE` is laid over the engine config.",
    )
    kv_check = kv_settings.build_parser()
    yield _Command(kv_check.prog, "the KV check, one rank a host; `launch` runs it", kv_check, kv_check.epilog or "")
    yield _Command(
        head_node.PROGRAM,
        "etcd, NATS and the Dynamo frontend of one job",
        head_node.build_parser(),
        "Words after `--` are flags of `dynamo.frontend`.",
    )
    lead, join = pods.build_lead_parser(), pods.build_join_parser()
    yield _Command(
        lead.prog, "the first of several pods that are one worker", lead, "Words after `--` are the ranks' command."
    )
    yield _Command(join.prog, "each other pod of such a worker", join, "")


def _section(command: _Command) -> str:
    description = plain(command.parser.description or "")
    parts = [f"\n## {command.name}\n", f"{description}\n"]
    for group in command.parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        if rows := [(_flags(action), _help(command.parser, action)) for action in actions if not _known(action)]:
            usual = group.title in (None, "options", "positional arguments")
            title = "" if usual else f"**{str(group.title)[:1].upper()}{str(group.title)[1:]}**\n\n"
            parts.append(title + table(("flag", "meaning"), rows))
    examples = (command.parser.epilog or "").partition(help_text.EXAMPLES)[2]
    if examples:
        lines = "".join(f"{line[2:]}\n" for line in examples.splitlines())
        parts.append(f"**Examples**\n\n```text\n{lines}```\n")
    return "\n".join([*parts, *([f"{command.further}\n"] if command.further else [])])


def _known(action: argparse.Action) -> bool:
    return bool({"--help", "--version"} & set(action.option_strings))


def _flags(action: argparse.Action) -> str:
    if not action.option_strings:
        return code(str(action.metavar or action.dest))
    value = ""
    if action.nargs != 0:
        value = " " + (
            "|".join(map(str, action.choices)) if action.choices else str(action.metavar or action.dest.upper())
        )
    return code(action.option_strings[0] + value, *action.option_strings[1:])


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return (action.help or "") % {**vars(action), "prog": parser.prog} if action.help else ""


def _anchor(title: str) -> str:
    return "".join(c for c in title.lower() if c.isalnum() or c in " -_").replace(" ", "-")
