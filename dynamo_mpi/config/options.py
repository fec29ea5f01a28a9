# SPDX-License-Identifier: Apache-2.0
"""One option, and how its value is resolved: flag, environment variable, file, default, each with its origin."""

from __future__ import annotations

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.config.sources import SETTINGS_FILE, pick
from dynamo_mpi.layout.engine_config import MAX_RANKS

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import NoReturn


MAX_RUNTIME_PORT = 2**15 - 1
PROBES = ("gpu", "fabric")
# accepted until 0.2: its check is a step of `dynamo-mpi launch` now
FORMER_PROBES = ("kv",)


@dataclass(frozen=True)
class Option:
    """One option.

    Args:
        name: the field of `Settings`.
        flags: the flags, ours first.
        variables: the environment variables, in order of precedence.
        default: the value if none is set.
        convert: parses a text; raises ValueError with what is expected.
        help: the help text, one line.
        choices: the allowed values, if they can be listed.
        switch: whether it is a flag without a value.
        negatable: whether a switch also has a ``--no-…`` form, as Dynamo's.
        without: the value that the ``--no-…`` form of an option with values sets; empty for no such form.
    """

    name: str
    flags: tuple[str, ...]
    variables: tuple[str, ...]
    default: Any
    convert: Callable[[str], Any]
    help: str
    choices: tuple[str, ...] = ()
    switch: bool = False
    negatable: bool = False
    without: str = ""


def run_dir_option(help_text: str) -> Option:
    """Return the option that names a deployment's folder."""
    return Option("run_dir", ("--run-dir",), ("DYN_MPI_RUN_DIR",), None, to_path, help_text)


def to_size(text: str) -> int:
    """Parse a positive whole number."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError("a positive whole number")
    return int(text)


def to_count(text: str) -> int:
    """Parse a number of ranks, nodes or GPUs, at most `MAX_RANKS`."""
    if (value := to_size(text)) > MAX_RANKS:
        raise ValueError(f"a positive whole number, at most {MAX_RANKS}")
    return value


def to_runtime_port(text: str) -> int:
    """Parse a port for the Dynamo runtime, which reads it as a signed 16-bit number."""
    if (value := to_size(text)) > MAX_RUNTIME_PORT:
        raise ValueError(f"a TCP port, at most {MAX_RUNTIME_PORT}")
    return value


def to_switch(text: str) -> bool:
    """Parse true or false in their usual spellings."""
    known = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
        "": False,
    }
    if text.strip().lower() not in known:
        raise ValueError("true or false")
    return known[text.strip().lower()]


def to_text(text: str) -> str:
    """Parse a non-empty text."""
    if not text:
        raise ValueError("a value that isn't empty")
    return text


def to_path_text(text: str) -> str:
    """Parse a path, and keep it as text."""
    # a settings file may contain what a command line can't: NULs and lone surrogates
    if not text or "\0" in text or any("\ud800" <= c < "\udc80" or "\udcff" < c <= "\udfff" for c in text):
        raise ValueError("a path")
    return text


def to_folder(text: str) -> Path:
    """Parse the path of a folder that every node has: an absolute one."""
    path = to_path(text)
    if not path.is_absolute():
        raise ValueError("an absolute path")
    return path


def to_stage(text: str) -> str:
    """Parse where to stage: ``auto``, ``none``, or an absolute path."""
    if text in ("auto", "none"):
        return text
    try:
        return str(to_folder(text))
    except ValueError:
        raise ValueError("auto, none, or an absolute path") from None


def to_path(text: str) -> Path:
    """Parse a path."""
    from pathlib import Path  # takes milliseconds, and `check` needs no Path

    return Path(to_path_text(text))


def to_file(text: str) -> Path:
    """Parse the path of a file, which must have a name."""
    path = to_path(text)
    if path.name in ("", ".."):
        raise ValueError("a path of a file")
    return path


def to_name(text: str) -> str:
    """Parse a Dynamo name."""
    if not text or any(c in text for c in "./ \t\n"):
        raise ValueError("a name without dots, slashes and blanks")
    return text


def to_role(text: str) -> str:
    """Parse a role, including Dynamo's other names of an aggregated worker."""
    return {"pd": "agg", "prefill_and_decode": "agg", "aggregated": "agg"}.get(text, text)


def to_probes(text: str) -> str:
    """Parse which hardware checks run: some of `PROBES` in their order, or ``auto`` or ``none`` alone."""
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if names in (["auto"], ["none"]):
        return names[0]
    if not names or set(names) - {*PROBES, *FORMER_PROBES}:
        raise ValueError(f"auto, none, or some of {', '.join(PROBES)}, separated by commas")
    return ",".join(name for name in (*PROBES, *FORMER_PROBES) if name in names)


def to_kv_transport(text: str) -> str:
    """Parse the KV transport, of which one is left."""
    if text == "nixl":
        raise UsageError(
            "--kv-transport / DYN_MPI_KV_TRANSPORT is 'nixl', which the reference engine no longer has",
            expected="tcp, or no such option",
            fix="remove --kv-transport; for KV by NIXL use --engine trtllm with cache_transceiver_config: {backend: NIXL}",
        )
    return text


def to_endpoint(text: str) -> str:
    """Parse an endpoint."""
    parts = text.removeprefix("dyn://").split(".")
    if len(parts) != 3:
        raise ValueError("dyn://namespace.component.endpoint")
    for part in parts:
        to_name(part)
    return "dyn://" + ".".join(parts)


def to_fraction(text: str) -> float:
    """Parse a number; rule H5 checks its range."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise ValueError("a number")
    return value


def usage_parser(expected: str = "", note: str = "", **settings: Any) -> ArgumentParser:
    """Return a parser that raises a `UsageError` for a wrong command line, where argparse's own exits with 2.

    Args:
        expected: what is expected, for the error.
        note: added to the error's fix.
        settings: as for `argparse.ArgumentParser`.
    """
    import argparse  # not for each import of this module

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            from dynamo_mpi.config.flags import did_you_mean

            fix = f"{did_you_mean(message, self._option_string_actions)}{self.prog} --help{note}"
            raise UsageError(f"{message[:1].upper()}{message[1:]}", expected=expected, fix=fix)

    return Parser(**settings)


# what stands for a value in the help, by what reads it
_VALUES = {
    **dict.fromkeys(("to_size", "to_count", "to_zero_or_count", "to_runtime_port"), "N"),
    **dict.fromkeys(("to_seconds", "to_time", "to_period"), "SECONDS"),
    **dict.fromkeys(("to_path", "to_path_text"), "PATH"),
    "to_file": "FILE",
    "to_folder": "DIR",
    "to_stage": "DIR|auto|none",
    "to_words": "WORDS",
    "to_fraction": "FRACTION",
}


def _shown(default: Any) -> str:
    """Return a default as it would be typed; empty for none."""
    if default is None or default is False:
        return ""
    if isinstance(default, tuple):
        return " ".join(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def add_options(parser: ArgumentParser, options: Sequence[Option]) -> None:
    """Add options to a parser, with their variables and defaults in the help."""
    for option in options:
        notes = [f"one of {', '.join(option.choices)}"] if option.choices else []
        notes += [f"env var: {option.variables[0]}"] if option.variables else []
        notes += [f"default: {default}"] if (default := _shown(option.default)) else []
        text = f"{option.help} ({' | '.join(notes)})" if notes else option.help
        if option.switch:
            parser.add_argument(*option.flags, dest=option.name, action="store_const", const="true", help=text)
        else:
            value = _VALUES.get(option.convert.__name__, option.name.upper())
            parser.add_argument(*option.flags, dest=option.name, metavar=value, help=text)
        without = "false" if option.negatable else option.without
        if without:
            flag = "--no-" + option.flags[0].removeprefix("--")
            note = "the opposite" if option.negatable else f"the same as {option.flags[0]} {without}"
            parser.add_argument(flag, dest=option.name, action="store_const", const=without, help=note)


def read_flags(options: Sequence[Option], words: Sequence[str], others: Sequence[str] = ()) -> dict[str, str] | None:
    """Return flags' values by option name, as `add_options`' parser does, without argparse, which would be a tenth of rank 0's start.

    Args:
        options: the options.
        words: the command line.
        others: flags with values that belong to no option; they are left out.

    Returns:
        None unless all words are flags as they are defined, each with a value that doesn't begin with a dash: argparse must decide.
    """
    values: dict[str, str] = dict.fromkeys(others, "")
    constants: dict[str, tuple[str, str]] = {}
    for option in options:
        if option.switch:
            constants.update(dict.fromkeys(option.flags, (option.name, "true")))
        else:
            values.update(dict.fromkeys(option.flags, option.name))
        if without := "false" if option.negatable else option.without:
            constants["--no-" + option.flags[0].removeprefix("--")] = (option.name, without)
    given: dict[str, str] = {}
    following = iter(words)
    for word in following:
        flag, equals, value = word.partition("=")
        if word in constants:
            name, value = constants[word]
        elif flag in values:
            name, value = values[flag], value if equals else next(following, "-")
            if value == "--" or (not equals and value.startswith("-")):
                return None
        else:
            return None
        given[name] = value
    given.pop("", None)
    return given


def resolve(
    options: Sequence[Option],
    given: Mapping[str, Any],
    environ: Mapping[str, str],
    file: Mapping[str, Any],
    picked: Mapping[str, tuple[str | None, str]] | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Resolve every option's value.

    Args:
        options: the options.
        given: parsed flags by option name.
        environ: environment variables.
        file: a settings file's values by option name.
        picked: texts and origins of options that are resolved already, see `sources.pick`.

    Returns:
        Values and origins by option name.

    Raises:
        UsageError: a value is invalid.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for option in options:
        text, origin = (picked or {}).get(option.name) or pick(
            option.name, option.flags[0], option.variables, given.get(option.name), environ, file
        )
        origins[option.name] = origin
        values[option.name] = option.default if text is None else _convert(option, text, origin)
    return values, origins


def _convert(option: Option, text: str, origin: str) -> Any:
    problem = f"{option.name} in the {origin} is {text!r}" if origin == SETTINGS_FILE else f"{origin} is {text!r}"
    fix = f"correct the {origin.replace('environment', 'variable')}"
    try:
        value = option.convert(text)
    except ValueError as error:
        raise UsageError(problem, expected=str(error), fix=fix) from None
    if option.choices and value not in option.choices:
        raise UsageError(problem, expected=f"one of {', '.join(option.choices)}", fix=fix)
    return value
