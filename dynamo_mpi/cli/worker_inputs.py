# SPDX-License-Identifier: Apache-2.0
"""The inputs of `check` and `plan`: a model, an engine config, some GPUs."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.config_reader import read_small_text
from dynamo_mpi.common.errors import ConfigFileError, UsageError
from dynamo_mpi.config.engine import ENGINE_OPTIONS, GPU, MIN_REQUESTS, ROLE, engine_flags
from dynamo_mpi.config.options import Option, add_options, resolve, to_count, to_text
from dynamo_mpi.layout.engine_layers import EngineLayers, MergedConfig, merge, with_balancer
from dynamo_mpi.layout.model_files import ModelFiles, find_model

if TYPE_CHECKING:
    import argparse

    from dynamo_mpi.layout.trtllm_version import TrtllmVersion


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
    options = (MODEL, ENGINE, ROLE, *more, *ENGINE_OPTIONS, GPUS_PER_NODE, GPU, MIN_REQUESTS)
    add_options(parser, options)
    parser.add_argument("--output", choices=("text", "json"), default="text", help="of stdout (default: %(default)s)")
    return options


def read_values(arguments: argparse.Namespace, options: tuple[Option, ...]) -> dict[str, Any]:
    """Find the value of each option, flags over environment.

    Raises:
        UsageError: the model is missing, or a value is invalid.
    """
    values, _ = resolve(options, vars(arguments), os.environ, {})
    if values["model"] is None:
        raise UsageError("no model was given", needed="a model", fix="--model DIR, or MODEL_PATH=DIR")
    if values["role"] == "encode" and values["engine"] == "reference":
        raise UsageError(
            "the reference engine doesn't encode images: the role is 'encode'",
            needed="--role agg, prefill or decode, or --engine trtllm",
        )
    return values


def role_engine_config(values: dict[str, Any]) -> Path | None:
    """Return the engine config of the role's variable, ``PREFILL_ENGINE_CONFIG`` and the like, as the worker uses it."""
    path = os.environ.get(f"{values['role'].upper()}_ENGINE_CONFIG", "") if values["role"] != "agg" else ""
    return Path(path) if path else None


def read_model(values: dict[str, Any]) -> ModelFiles:
    """Find the model's files.

    Raises:
        ModelNotFoundError: there is no such model.
        ConfigFileError: its config is not text, or too large.
    """
    return find_model(values["model"], os.environ)


def read_version(values: dict[str, Any]) -> TrtllmVersion | None:
    """Return the given version of TensorRT-LLM, else the installed one.

    Raises:
        UsageError: the given version is invalid.
    """
    from dynamo_mpi.layout.trtllm_version import installed_trtllm_version, parse_trtllm_version

    named = values["trtllm_version"]
    return parse_trtllm_version(named) if named else installed_trtllm_version()


def read_engine(values: dict[str, Any], path: Path | None, dynamic: tuple[str, ...]) -> MergedConfig:
    """Merge an engine config: flags, the file, overrides, and the load balancer's file.

    Raises:
        ConfigFileError: one of the files can't be used.
        UsageError: both kinds of overrides were given.
    """
    # the cluster's GPUs per node, not the engine's flag
    flags = engine_flags({name: value for name, value in values.items() if name != "gpus_per_node"})
    text = None if path is None else _read(path, "engine config")
    merged = merge(
        EngineLayers(
            flags, text, str(path) if path else "the engine's flags", values["override_engine_args"] or "", dynamic
        )
    )
    balancer = merged.config.moe.balancer_path
    if balancer is not None:
        with contextlib.suppress(OSError, ValueError):  # D4 reports it; ValueError: a NUL in the path
            merged = with_balancer(merged, read_small_text(Path(balancer)))
    return merged


def _read(path: Path, label: str) -> str:
    try:
        return read_small_text(path)
    except OSError as error:
        raise ConfigFileError(
            f"the {label} {path} can't be read: {error.strerror}",
            needed="a YAML file",
            fix="check the path and its rights",
        ) from None
