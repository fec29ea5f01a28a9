# SPDX-License-Identifier: Apache-2.0
"""``docs/reference/settings.md``: every setting with its flags, variables, key and default, from the options themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dynamo_mpi.config import worker_options as worker
from dynamo_mpi.deploy import head_node_settings as head_node
from dynamo_mpi.deploy import settings as launch
from dynamo_mpi.deploy.kubernetes import settings as pods
from tools.gen_docs.environment import VARIABLES
from tools.gen_docs.markdown import WRITTEN, code, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.config.options import Option

_HEAD = f"""# Settings

{WRITTEN}
Where a value comes from, strongest first:

1. a flag, `--drain-timeout 60`; of a flag that is given twice the last one;
2. an environment variable; of several the one that stands first here. An empty variable counts as not set;
3. the settings file of `--settings FILE` or `DYN_MPI_SETTINGS` (YAML, `drain_timeout: 60`; the worker alone has one).
   Unknown keys are refused, with 65;
4. the default.

Only rank 0 reads settings; what the other ranks need to know they learn from it, and a command line that isn't the same on all ranks is
refused (P4). A value that an option doesn't take is refused with 64, and the message says whether it came from a flag, a variable or the
file. Seconds may have a fraction. A `DYN_MPI_*` variable that isn't on this page is ignored; `launch`, `check`, `doctor` and rank 0 warn of
it, with the name that was probably meant.
"""
_ENGINE_ORDER = """
The sizes and limits in it (`--tensor-parallel-size` and so on) are Dynamo's flags. The engine config is laid
over them, `--override-engine-args` or `--trtllm.KEY.KEY VALUE` over that, as `dynamo.trtllm` does it.
"""


def render() -> str:
    """Return the page."""
    return "".join(
        (
            _HEAD,
            _section("The worker", "python -m dynamo_mpi.worker", worker.OPTIONS, keys=True),
            _ENGINE_ORDER,
            _section("A deployment", "dynamo-mpi launch", launch.OPTIONS),
            _section("The head node's services", head_node.PROGRAM, head_node.OPTIONS),
            _section("The first of several pods", f"{pods.PROGRAM} lead", pods.LEAD_OPTIONS),
            _section("Each other pod", f"{pods.PROGRAM} join", pods.JOIN_OPTIONS),
            "\n## Variables that are no options\n\n",
            table(
                ("variables", "from → to", "meaning"),
                ((code(*names), who, meaning) for names, who, meaning in VARIABLES),
            ),
        )
    )


def _section(title: str, program: str, options: Sequence[Option], *, keys: bool = False) -> str:
    head = ["flag", "variables, strongest first", *(["key in the settings file"] if keys else []), "default", "meaning"]
    rows = [
        (
            code(*_flags(option)),
            code(*_with_role(option).variables),
            *([code(option.name)] if keys else []),
            _default(option),
            option.help + (f" ({', '.join(option.choices)})" if option.choices else ""),
        )
        for option in options
    ]
    return f"\n## {title}\n\n`{program}`\n\n{table(head, rows)}"


def _flags(option: Option) -> tuple[str, ...]:
    no = ("--no-" + option.flags[0].removeprefix("--"),) if option.negatable else ()
    return (*option.flags, *no)


def _with_role(option: Option) -> Option:
    if option.name != "engine_config":
        return option
    return replace(option, variables=(*option.variables, "PREFILL_ENGINE_CONFIG", "DECODE_ENGINE_CONFIG"))


def _default(option: Option) -> str:
    default = option.default
    if default is None or default == () or default is False:
        return ""
    if isinstance(default, float):
        return f"{default:g}"
    return " ".join(default) if isinstance(default, tuple) else str(default)
