# SPDX-License-Identifier: Apache-2.0
"""``dynamo-mpi VERB …``: runs a verb's module.

A verb's module has ``add_arguments(parser)`` and ``run(arguments) -> int``. Data goes to stdout, messages to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from dynamo_mpi import __version__
from dynamo_mpi.cli.style import silence_stdout, terminal_width, write_out
from dynamo_mpi.common.errors import DynamoMpiError, ExitCode, UsageError, of_signal

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = "dynamo-mpi"
VERBS = {
    "check": "check whether TensorRT-LLM accepts a model in a layout, without a GPU",
    "plan": "all legal layouts of a model on some GPUs, best first",
    "doctor": "find problems of this machine that stop a worker: Slurm, MPI, GPUs, network, etcd, NATS …",
    "local": "run the whole stack on this machine: etcd, NATS, the Dynamo frontend and one worker",
    "launch": "launch a deployment over several nodes: Slurm job steps, or mpirun with a hostfile",
    "status": "show what runs, its progress, and what has failed; --watch",
    "wait": "wait until a deployment is ready and has answered, or has failed",
    "timeline": "show a start: every rank's phases, the slowest ranks, where it failed",
    "stage": "copy a model to nodes' disks, show or remove the copies",
    "replace": "take a node out of a running deployment: its worker moves to a spare node",
    "down": "end a deployment, or selected workers, in order",
    "completion": "print a script that completes verbs and flags, for bash, zsh or tcsh",
}
_GROUPS = {
    "before a launch": ("check", "plan", "doctor"),
    "run": ("local", "launch"),
    "while it runs": ("status", "wait", "timeline", "stage", "replace", "down"),
    "the shell": ("completion",),
}


class HelpFormatter(argparse.HelpFormatter):
    """argparse's formatter, without its import of `shutil` for the width: argparse makes one for every flag, help or not."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=terminal_width() - 2)


class Parser(argparse.ArgumentParser):
    """argparse with our exit code for wrong flags; its own, 2, is not in our table of exit codes."""

    def __init__(self, formatter_class: type[argparse.HelpFormatter] = HelpFormatter, **settings: Any) -> None:
        super().__init__(formatter_class=formatter_class, **settings)

    def error(self, message: str) -> NoReturn:
        from dynamo_mpi.config.flags import did_you_mean  # for a mistake alone

        meant = did_you_mean(message, self._option_string_actions)
        raise UsageError(message, expected="flags and words as --help has them", fix=f"{meant}{self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the arguments; None for ``sys.argv``.

    Returns:
        the exit code; see ``dynamo_mpi.common.errors``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except DynamoMpiError as error:
        return _report(words, error)
    except KeyboardInterrupt:
        return _code_of("SIGINT")
    except BrokenPipeError:
        silence_stdout()  # the reader has exited (| head)
        return _code_of("SIGPIPE")
    except OSError as error:
        from dynamo_mpi.common.os_errors import of_os_error

        return _report(words, of_os_error(error))


def _report(words: list[str], error: DynamoMpiError) -> int:
    from dynamo_mpi.common.display import without_controls
    from dynamo_mpi.common.redact import process_redactor  # imported here, so that a start without errors is fast

    redact = process_redactor().redact
    print(without_controls(f"{PROGRAM}: {redact(str(error))}"), file=sys.stderr)
    _print_error_json(words, {k: redact(v) if isinstance(v, str) else v for k, v in error.plain().items()})
    return error.exit_code


def _code_of(name: str) -> int:
    import signal  # takes a millisecond

    return of_signal(signal.Signals[name])


def entry() -> int:
    """Run one verb as this process: `main`, for those that end at once without the garbage collector, which takes a tenth of their time."""
    at_once = sys.argv[1:2] in (["check"], ["plan"])
    if at_once:
        gc.disable()
    code = main()
    if at_once:
        gc.freeze()  # or else Python looks through all objects at its end
    return code


def _run(words: list[str]) -> int:
    if not words:
        _parser().print_help(sys.stderr)
        return ExitCode.USAGE
    verb = words[0] if words[0] in VERBS else _parser().parse_args(words[:1]).verb  # ends here for --help and --version
    module = importlib.import_module(f"dynamo_mpi.cli.{verb}")
    verb_parser = Parser(prog=f"{PROGRAM} {verb}", description=module.__doc__)
    module.add_arguments(verb_parser)
    rest, dynamic, further = words[1:], list[str](), list[str]()
    if getattr(module, "TAKES_FURTHER_WORDS", False) and "--" in rest:
        at = rest.index("--")
        rest, further = rest[:at], rest[at + 1 :]
    if getattr(module, "TAKES_DYNAMIC_FLAGS", False):
        from dynamo_mpi.layout.engine_layers import split_dynamic_flags

        rest, dynamic = split_dynamic_flags(rest)
    if {"-h", "--help"} & set(rest):
        from dynamo_mpi.cli.help_text import arrange  # for a help alone

        arrange(verb_parser, verb)
    defaults = argparse.Namespace(dynamic_flags=tuple(dynamic), further_words=tuple(further))
    code: int = module.run(verb_parser.parse_args(rest, defaults))
    return code


def _print_error_json(words: Sequence[str], error: dict[str, int | str]) -> None:
    """Print the error on stdout too if JSON was requested."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--output")
    try:
        chosen, _ = parser.parse_known_args(words)
    except argparse.ArgumentError:
        return  # --output without a value
    if chosen.output == "json":
        import json

        with contextlib.suppress(UsageError, BrokenPipeError):  # the error may be about stdout
            write_out(json.dumps({"ok": False, "error": error}))


def _parser() -> argparse.ArgumentParser:
    from dynamo_mpi.cli.help_text import PROGRAM_EXAMPLES
    from dynamo_mpi.config.help_text import EXAMPLES, Formatter

    width = max(map(len, VERBS))
    lists = [
        f"{title}:\n" + "\n".join(f"  {verb:{width}}  {VERBS[verb]}" for verb in verbs)
        for title, verbs in _GROUPS.items()
    ]
    parser = Parser(
        prog=PROGRAM,
        description="MPI-native bootstrap for multi-node TensorRT-LLM workers of NVIDIA Dynamo.",
        formatter_class=Formatter,
        epilog="\n\n".join(lists) + "\n\n" + EXAMPLES + "\n".join(f"  {line}" for line in PROGRAM_EXAMPLES),
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("verb", choices=sorted(VERBS), metavar="VERB", help="one of those below")
    return parser


if __name__ == "__main__":
    sys.exit(entry())
