# SPDX-License-Identifier: Apache-2.0
"""What a user types and a shell sees: exit codes, help, flags with their variables, values of enumerations, error labels, rule ids."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import signal
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from unittest import mock

from tests.contracts import sources

_WIDTH = 100
_ENVIRONMENT = {"PATH": os.environ.get("PATH", ""), "HOME": "/nonexistent", "NO_COLOR": "1", "COLUMNS": str(_WIDTH)}
_FLAT = re.compile(r"\s+")


@contextlib.contextmanager
def fixed_environment(**more: str) -> Iterator[None]:
    """Run the block in an environment that no machine and no job has a part in."""
    with mock.patch.dict(os.environ, {**_ENVIRONMENT, **more}, clear=True):
        yield


def output_of(words: Sequence[str]) -> str:
    """Return what ``dynamo-mpi WORDS`` writes to stdout."""
    out = io.StringIO()
    with fixed_environment(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        sources.dynamo_mpi_main(words)
    return out.getvalue()


def exit_codes() -> str:
    notes = {"OK": "Done.", **sources.member_notes(sources.ExitCode)}
    lines = [
        f"{int(code):>3} {code.name:<15} {'not retried' if code in sources.MISTAKES else '-':<12} {notes[code.name]}"
        for code in sources.ExitCode
    ]
    lines += [f"{sources.of_signal(number):>3} {number.name}" for number in (signal.SIGKILL, signal.SIGTERM)]
    return "\n".join(lines) + "\n"


class _Help(Exception):
    """Carries the parser that is asked for its help."""


def parser_of(main: Callable[[list[str]], object], words: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser that a real command line with ``--help`` comes to. Its own text differs between versions of Python."""
    found: list[argparse.ArgumentParser] = []

    def caught(parser: argparse.ArgumentParser, file: object = None) -> None:
        found.append(parser)
        raise _Help

    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with fixed_environment(), mock.patch.object(argparse.ArgumentParser, "print_help", caught):
            main([*words, "--help"])
    except _Help:
        pass
    finally:
        signal.signal(signal.SIGINT, interrupt)
    (parser,) = found
    return parser


COMMANDS: dict[str, tuple[Callable[[list[str]], object], tuple[str, ...]]] = {
    "dynamo-mpi": (sources.dynamo_mpi_main, ()),
    **{f"dynamo-mpi-{verb}": (sources.dynamo_mpi_main, (verb,)) for verb in sorted(sources.VERBS)},
    "worker": (sources.worker_main, ()),
    "head-node": (sources.head_node_main, ()),
    "pods-lead": (sources.pods_main, ("lead",)),
    "pods-join": (sources.pods_main, ("join",)),
    "model-files": (sources.model_files_main, ()),
}


def help_of(command: str) -> str:
    """Return a command's help: every word and flag in its order."""
    parser = parser_of(*COMMANDS[command])
    parts = [parser.prog, *map(_wrapped, (parser.description or "").split("\n\n"))]
    for action in parser._actions:
        if action.help != argparse.SUPPRESS:
            text = (action.help or "") % {**vars(action), "prog": parser.prog}
            parts.append(f"{_flags(action)}\n{_wrapped(text, '    ')}")
    return "\n".join([*parts, *([parser.epilog] if parser.epilog else [])]) + "\n"


def _flags(action: argparse.Action) -> str:
    choices = "|".join(map(str, action.choices)) if action.choices and action.metavar is None else ""
    value = "" if action.nargs == 0 else str(choices or action.metavar or action.dest.upper())
    notes = [
        *([f"nargs {action.nargs}"] if action.nargs not in (None, 0) else []),
        *(["several times"] if isinstance(action, argparse._AppendAction) else []),
        *(["required"] if action.required and action.option_strings else []),
    ]
    words = ", ".join(action.option_strings)
    return f"{words} {value}".strip() + (f"  [{', '.join(notes)}]" if notes else "")


def _wrapped(text: str, indent: str = "") -> str:
    flat = _FLAT.sub(" ", text).strip()
    wrap = {"width": _WIDTH, "break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(flat, initial_indent=indent, subsequent_indent=indent, **wrap)  # type: ignore[arg-type]


def settings() -> str:
    """Every setting: its key in the settings file (of the worker) or name, flags, variables from strongest to weakest, default."""
    tables: dict[str, Sequence[sources.Option]] = {
        "python -m dynamo_mpi.worker": sources.WORKER_OPTIONS,
        "python -m dynamo_mpi.head_node": sources.HEAD_NODE_OPTIONS,
        "python -m dynamo_mpi.pods lead": sources.LEAD_OPTIONS,
        "python -m dynamo_mpi.pods join": sources.JOIN_OPTIONS,
        **{f"dynamo-mpi {verb}": _options(verb) for verb in sorted(sources.VERBS)},
    }
    lines = []
    for program, options in tables.items():
        lines += [f"{program} {option.name}: {_described(option)}" for option in options]
    lines += [f"not an option: {' '.join(variable.names)}" for variable in sources.VARIABLES]
    return "\n".join(lines) + "\n"


def _options(verb: str) -> Sequence[sources.Option]:
    modules = {
        "doctor": sources.doctor_verb.OPTIONS,
        "down": sources.down_verb.OPTIONS,
        "launch": sources.LAUNCH_OPTIONS,
        "completion": (),
        "local": (),  # argparse's own, see its help
        "replace": sources.replace_verb.OPTIONS,
        "status": sources.status_verb.OPTIONS,
        "timeline": (sources.timeline_verb.RUN_DIR,),
        "stage": (sources.stage_verb.STAGE,),
        "wait": (*sources.wait_verb.OPTIONS, sources.wait_verb.ROLE),
    }
    if verb in modules:
        return modules[verb]
    parser = argparse.ArgumentParser()
    {"check": sources.check_verb, "plan": sources.plan_verb}[verb].add_arguments(parser)
    options: Sequence[sources.Option] = parser.get_default("options")
    return options


def _described(option: sources.Option) -> str:
    notes = [f"= {option.default!r}"]
    if option.choices:
        notes.append(f"one of {'|'.join(option.choices)}")
    if option.switch:
        notes.append("switch")
    if option.negatable or option.without:
        notes.append(f"--no- is {option.without or 'false'}")
    return "; ".join([" ".join((*option.flags, *option.variables)), *notes])


def enumerations() -> str:
    """The values that stand in JSON, in records, in metrics' labels and in variables."""
    options = {option.name: option.choices for option in sources.WORKER_OPTIONS}
    values = {
        "phase": sources.PHASES,
        "cause": [cause.name.lower() for cause in sources.DetectedBy],
        "role": options["role"],
        "engine": options["engine"],
        "severity": [severity.value for severity in sources.Severity],
        "log level": [level.name for level in sources.Level],
        "lifecycle event": sources.EVENTS,
        "timeline outcome": [sources.READY, sources.ENDED, sources.FAILED, sources.STOPPED],
        "doctor status": [status.value for status in sources.Status],
        "doctor section": [section.name for section in sources.DOCTOR_SECTIONS],
        "fault action": sources.ACTIONS,
    }
    return "".join(f"{name}: {' '.join(names)}\n" for name, names in values.items())


def errors() -> str:
    """How the parts of an error and of a finding are labelled."""
    texts = {"expected": "what is needed,\nin two lines", "fix": "what to do,\nin two lines"}
    error = sources.UsageError("what was found", expected="what is needed", fix="what to do")
    findings = [
        sources.Finding("B1", severity, "a message", "what was found", **texts) for severity in sources.Severity
    ]
    report = sources.DoctorReport(
        "n1",
        (
            sources.SectionReport("mpi", (sources.ok("library", "Open MPI"), sources.skipped("pmix", "not here"))),
            sources.SectionReport(
                "gpus", (sources.warning("count", "2 GPUs", "4 GPUs", "look"), sources.error("nvml", "none", "one"))
            ),
        ),
        1.5,
    )
    refused = output_of(["check", "--output", "json", "--no-such-flag"])
    return "\n".join([str(error), "", sources.render_findings(findings), "", report.as_text(), "", refused])


def rules() -> str:
    """The ids of all rules: they stand in findings."""
    found: list[str] = []
    for row in re.findall(r"^\| ([A-Z]\d*(?:[-, ]+[A-Z]\d*)*) \|", sources.rules_page(), re.MULTILINE):
        for part in row.split(", "):
            first, _, last = part.partition("-")
            letter, numbers = first[0], (int(first[1:] or 0), int(last[1:] or 0) if last else int(first[1:] or 0))
            found += [f"{letter}{number or ''}" for number in range(numbers[0], numbers[1] + 1)]
    ordered = sorted(set(found), key=lambda rule: (rule[0], int(rule[1:] or 0)))
    return "".join(
        f"{letter}: {' '.join(r for r in ordered if r[0] == letter)}\n"
        for letter in dict.fromkeys(r[0] for r in ordered)
    )


CONTRACTS: dict[str, Callable[[], str]] = {
    "exit-codes": exit_codes,
    "settings": settings,
    "enumerations": enumerations,
    "errors": errors,
    "rules": rules,
    **{f"help/{command}": partial(help_of, command) for command in COMMANDS},
}
