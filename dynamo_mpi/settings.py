# SPDX-License-Identifier: Apache-2.0
"""A worker's settings: flags over environment over a settings file over defaults, each value with its origin.

Names that exist already keep their name (``MODEL_PATH``, ``ENGINE_CONFIG``, ``DYN_*`` …); ours are ``DYN_MPI_*``. Only rank 0 reads settings:
it tells the others what they need to know.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dynamo_mpi import __version__
from dynamo_mpi.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True)
class Option:
    """One setting.

    Args:
        name: field of `Settings`.
        flags: command-line spellings, ours first.
        variables: environment variables, strongest first.
        default: value when nobody says anything.
        convert: from text; raises ValueError with what is needed.
        help: one line.
        choices: the values that exist, where they can be listed.
        switch: a flag without a value.
    """

    name: str
    flags: tuple[str, ...]
    variables: tuple[str, ...]
    default: Any
    convert: Callable[[str], Any]
    help: str
    choices: tuple[str, ...] = ()
    switch: bool = False


def _size(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError("a positive whole number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError("a number of seconds")
    return value


def _switch(text: str) -> bool:
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


def _text(text: str) -> str:
    if not text:
        raise ValueError("something that isn't empty")
    return text


def _path(text: str) -> Path:
    # the settings file can hold what no command line can: NULs and code points that are no characters
    if not text or "\0" in text or any("\ud800" <= c < "\udc80" or "\udcff" < c <= "\udfff" for c in text):
        raise ValueError("a path")
    return Path(text)


def _name(text: str) -> str:
    if not text or any(c in text for c in "./ \t\n"):
        raise ValueError("a name without dots, slashes and blanks")
    return text


def _endpoint(text: str) -> str:
    parts = text.removeprefix("dyn://").split(".")
    if len(parts) != 3:
        raise ValueError("dyn://namespace.component.endpoint")
    for part in parts:
        _name(part)
    return "dyn://" + ".".join(parts)


OPTIONS: tuple[Option, ...] = (
    Option(
        "role", ("--role", "--disaggregation-mode"), ("DYN_MPI_ROLE",), "agg", str, "what this worker does", ("agg",)
    ),
    Option("engine", ("--engine",), ("DYN_MPI_ENGINE",), "reference", str, "what runs the model", ("reference",)),
    Option("model", ("--model", "--model-path"), ("MODEL_PATH",), None, _path, "model folder, with its config.json"),
    Option(
        "served_model_name",
        ("--served-model-name",),
        ("SERVED_MODEL_NAME",),
        None,
        _text,
        "name that clients ask for; the folder's name by default",
    ),
    Option(
        "engine_config",
        ("--engine-config", "--extra-engine-args"),
        ("ENGINE_CONFIG",),
        None,
        _path,
        "engine config: TensorRT-LLM's YAML",
    ),
    Option(
        "tensor_parallel_size",
        ("--tensor-parallel-size", "--tp-size"),
        (),
        None,
        _size,
        "over the engine config's tensor_parallel_size",
    ),
    Option(
        "pipeline_parallel_size",
        ("--pipeline-parallel-size", "--pp-size"),
        (),
        None,
        _size,
        "over the engine config's pipeline_parallel_size",
    ),
    Option("max_batch_size", ("--max-batch-size",), (), None, _size, "over the engine config's max_batch_size"),
    Option("max_num_tokens", ("--max-num-tokens",), (), None, _size, "over the engine config's max_num_tokens"),
    Option("max_seq_len", ("--max-seq-len",), (), None, _size, "over the engine config's max_seq_len"),
    Option("namespace", ("--namespace",), ("DYN_NAMESPACE",), "dynamo", _name, "Dynamo namespace"),
    Option("component", ("--component",), ("DYN_COMPONENT",), "backend", _name, "Dynamo component"),
    Option(
        "endpoint",
        ("--endpoint",),
        ("DYN_ENDPOINT",),
        None,
        _endpoint,
        "dyn://namespace.component.endpoint, instead of the two above",
    ),
    Option(
        "request_plane",
        ("--request-plane",),
        ("DYN_REQUEST_PLANE",),
        "tcp",
        str,
        "how requests reach the worker",
        ("tcp", "nats"),
    ),
    Option(
        "discovery_backend",
        ("--discovery-backend",),
        ("DYN_DISCOVERY_BACKEND",),
        "etcd",
        str,
        "where it registers",
        ("etcd",),
    ),
    Option(
        "preflight_only",
        ("--preflight-only",),
        ("DYN_MPI_PREFLIGHT_ONLY",),
        False,
        _switch,
        "stop after the verdict",
        switch=True,
    ),
    Option(
        "ready_file",
        ("--ready-file",),
        ("DYN_MPI_READY_FILE",),
        None,
        _path,
        "write this file, as JSON, once it is serving",
    ),
    Option(
        "probe_timeout",
        ("--probe-timeout",),
        ("DYN_MPI_PROBE_TIMEOUT",),
        3.0,
        _seconds,
        "seconds that etcd and NATS have to answer",
    ),
    Option(
        "prove_timeout",
        ("--prove-timeout",),
        ("DYN_MPI_PROVE_TIMEOUT",),
        300.0,
        _seconds,
        "seconds for the first completion",
    ),
    Option(
        "drain_timeout",
        ("--drain-timeout",),
        ("DYN_MPI_DRAIN_TIMEOUT",),
        30.0,
        _seconds,
        "seconds that requests in flight have to end after SIGTERM",
    ),
)


@dataclass(frozen=True)
class Settings:
    """All settings of one worker; see `OPTIONS` for what each means."""

    role: str
    engine: str
    model: Path
    served_model_name: str
    engine_config: Path | None
    tensor_parallel_size: int | None
    pipeline_parallel_size: int | None
    max_batch_size: int | None
    max_num_tokens: int | None
    max_seq_len: int | None
    namespace: str
    component: str
    endpoint: str
    request_plane: str
    discovery_backend: str
    preflight_only: bool
    ready_file: Path | None
    probe_timeout: float
    prove_timeout: float
    drain_timeout: float
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def size_flags(self) -> dict[str, int]:
        """Sizes that were set over the engine config, by their YAML key."""
        names = ("tensor_parallel_size", "pipeline_parallel_size", "max_batch_size", "max_num_tokens", "max_seq_len")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}", fix="python -m dynamo_mpi.worker --help")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the worker's command line."""
    parser = _Parser(
        prog="python -m dynamo_mpi.worker",
        description="One rank of a Dynamo worker. Start it once per rank: srun --mpi=pmix, or mpirun.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dynamo_mpi {__version__}")
    parser.add_argument("--settings", metavar="YAML", help="file with settings, by their long names")
    for option in OPTIONS:
        notes = [f"one of {', '.join(option.choices)}"] if option.choices else []
        notes += [f"env var: {option.variables[0]}"] if option.variables else []
        notes += [f"default: {option.default}"] if option.default is not None else []
        text = f"{option.help} ({' | '.join(notes)})" if notes else option.help
        if option.switch:
            parser.add_argument(*option.flags, dest=option.name, action="store_const", const="true", help=text)
        else:
            parser.add_argument(*option.flags, dest=option.name, metavar=option.name.upper(), help=text)
    return parser


def load_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Read settings from a command line, an environment and the settings file that either names.

    Raises:
        UsageError: an unknown flag, an impossible value, or no model.
        DataError: the settings file can't be used.
    """
    given = vars(build_parser().parse_args(list(argv)))
    file = _settings_file(given.pop("settings", None) or environ.get("DYN_MPI_SETTINGS"))
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for option in OPTIONS:
        text, origin = _pick(option, given, environ, file)
        origins[option.name] = origin
        values[option.name] = option.default if text is None else _convert(option, text, origin)
    if values["model"] is None:
        raise UsageError("no model was given", needed="a model folder", fix="--model DIR, or MODEL_PATH=DIR")
    if values["served_model_name"] is None:
        values["served_model_name"] = values["model"].resolve().name
    if values["endpoint"] is None:
        values["endpoint"] = f"dyn://{values['namespace']}.{values['component']}.generate"
    return Settings(**values, origins=origins)


def _pick(
    option: Option, given: Mapping[str, Any], environ: Mapping[str, str], file: Mapping[str, Any]
) -> tuple[str | None, str]:
    if given.get(option.name) is not None:
        return given[option.name], f"flag {option.flags[0]}"
    for variable in option.variables:
        # an empty variable is how a batch script says "not set"
        if environ.get(variable):
            return environ[variable], f"environment {variable}"
    if file.get(option.name) is not None:
        value = file[option.name]
        return str(value).lower() if isinstance(value, bool) else str(value), "settings file"
    return None, "default"


def _convert(option: Option, text: str, origin: str) -> Any:
    if option.choices and text not in option.choices:
        raise UsageError(f"{origin} is {text!r}", needed=f"one of {', '.join(option.choices)}")
    try:
        return option.convert(text)
    except ValueError as error:
        raise UsageError(f"{origin} is {text!r}", needed=str(error)) from None


def _settings_file(path: str | None) -> dict[str, Any]:
    if not path:
        return {}
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    # ValueError: bad UTF-8, and what int() and date() say of impossible numbers and dates
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"the settings file {path} can't be used: {' '.join(str(error).split())}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise DataError(f"the settings file {path} is not a mapping", needed="`name: value` lines")
    known = {option.name for option in OPTIONS}
    named = {str(key).replace("-", "_"): value for key, value in loaded.items()}
    if unknown := sorted(set(named) - known):
        raise DataError(
            f"the settings file {path} has unknown settings: {', '.join(unknown)}", needed=", ".join(sorted(known))
        )
    return named
