# SPDX-License-Identifier: Apache-2.0
"""The inputs of `check` and `plan`: a model, an engine config, some GPUs."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.frozen import replace
from dynamo_mpi.config.engine import ENGINE_OPTIONS, GPU, MIN_REQUESTS, ROLE, engine_flags
from dynamo_mpi.config.options import Option, add_options, resolve, to_count, to_path, to_path_text, to_text
from dynamo_mpi.config.variables import unknown_variables
from dynamo_mpi.layout.engine_layers import EngineLayers
from dynamo_mpi.layout.library import Worker, read_engine_config
from dynamo_mpi.layout.model_files import ModelFiles, find_model

if TYPE_CHECKING:
    import argparse


def to_engine(text: str) -> str:
    """Read an engine; ``auto`` is TensorRT-LLM, since nothing is launched."""
    return "trtllm" if text == "auto" else text


ENGINE = Option(
    "engine", ("--engine",), ("DYN_MPI_ENGINE",), "trtllm", to_engine, "what runs the model", ("trtllm", "reference")
)
MODEL = Option(
    "model",
    ("--model", "--model-path"),
    ("MODEL_PATH", "DYN_TRTLLM_MODEL"),
    None,
    to_text,
    "model folder, its config.json, or a hub id that is in the cache",
)
GPUS_PER_NODE = Option(
    "gpus_per_node",
    ("--gpus-per-node",),
    ("NUM_GPUS_PER_NODE", "DYN_TRTLLM_GPUS_PER_NODE"),
    None,
    to_count,
    "GPUs of a node",
)


def add_worker_options(parser: argparse.ArgumentParser, *more: Option) -> tuple[Option, ...]:
    """Declare the options that describe a worker, and return them."""
    # paths as text: pathlib takes a tenth of a check's time
    engine = (
        replace(option, convert=to_path_text) if option.convert is to_path else option for option in ENGINE_OPTIONS
    )
    options = (MODEL, ENGINE, ROLE, *more, *engine, GPUS_PER_NODE, GPU, MIN_REQUESTS)
    add_options(parser, options)
    parser.add_argument("--output", choices=("text", "json"), default="text", help="of stdout (default: %(default)s)")
    return options


def read_values(arguments: argparse.Namespace, options: tuple[Option, ...]) -> dict[str, Any]:
    """Find the value of each option, flags over environment; warn of misspelt variables.

    Raises:
        UsageError: the model is missing, or a value is invalid.
    """
    for line in unknown_variables(os.environ).values():
        print(f"dynamo-mpi: warning: {line}", file=sys.stderr)
    values, _ = resolve(options, vars(arguments), os.environ, {})
    if values["model"] is None:
        raise UsageError("no model was given", expected="a model", fix="--model DIR, or MODEL_PATH=DIR")
    return values


def role_engine_config(values: dict[str, Any]) -> str | None:
    """Return the engine config of the role's variable, ``PREFILL_ENGINE_CONFIG`` and the like, as the worker uses it."""
    return os.environ.get(f"{values['role'].upper()}_ENGINE_CONFIG") or None if values["role"] != "agg" else None


def read_model(values: dict[str, Any]) -> ModelFiles:
    """Find the model's files.

    Raises:
        ModelNotFoundError: there is no such model.
        ConfigFileError: its config is not text, or too large.
    """
    return find_model(values["model"], os.environ)


def worker_of(values: dict[str, Any], **changes: Any) -> Worker:
    """Return the worker that the values describe.

    Args:
        values: from `read_values`.
        changes: fields of `Worker` with other values.
    """
    names = ("role", "gpus_per_node", "gpu", "trtllm_version", "engine", "min_requests")
    return Worker(**{name: values[name] for name in names} | changes)


def engine_layers(values: dict[str, Any], path: str | None, dynamic: tuple[str, ...]) -> EngineLayers:
    """Return the layers of an engine config: flags, the file, overrides.

    Raises:
        ConfigFileError: the file can't be read.
    """
    # the cluster's GPUs per node, not the engine's flag
    flags = engine_flags({name: value for name, value in values.items() if name != "gpus_per_node"})
    text = None if path is None else read_engine_config(path)
    return EngineLayers(flags, text, path or "the engine's flags", values["override_engine_args"] or "", dynamic)
