# SPDX-License-Identifier: Apache-2.0
"""Finds a model's ``config.json``: in a folder, as the file itself, or by a hub id in the cache. Nothing is downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_mpi.common.config_reader import read_small_text
from dynamo_mpi.common.errors import ModelNotFoundError
from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.layout.model_config import parse_model_shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.layout.model_shape import ModelShape

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_QUANT_FILE = "hf_quant_config.json"


@dataclass(frozen=True)
class ModelFiles:
    """The files that describe a model.

    Args:
        name: the model's name: the directory's or file's name, or the hub id.
        config: the config's path.
        config_text: the config's content.
        quant_text: the content of ``hf_quant_config.json`` beside it, if there is one.
    """

    name: str
    config: Path
    config_text: str
    quant_text: str | None

    def shape(self) -> ModelShape:
        """Read the model's shape.

        Raises:
            ConfigFileError: one of the files is invalid.
        """
        return parse_model_shape(self.config_text, str(self.config), self.quant_text)


def find_model(model: str, environ: Mapping[str, str]) -> ModelFiles:
    """Find a model's files.

    Args:
        model: a directory, a config file, or a hub id such as ``meta-llama/Llama-3.1-8B``.
        environ: environment variables that locate the hub's cache.

    Raises:
        ModelNotFoundError: there is no such model, or its config can't be read.
        ConfigFileError: the config is too large or not text.
    """
    path = Path(model)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise ModelNotFoundError(
            f"the model {model[:200]}{'...' if len(model) > 200 else ''} can't be read: {error.strerror}",
            needed="a model folder, its config.json, or a hub id that is in the cache",
            fix="check --model / MODEL_PATH, its rights, and that the container mounts it",
        ) from None
    if is_folder:
        return _read(path.resolve().name, path / "config.json")
    if exists:
        # in the hub's cache the file is a link to a blob
        return _read(path.stem if path.name != "config.json" else path.parent.resolve().name, path)
    if not _HUB_ID.fullmatch(model) or model.endswith((".json", ".gguf")):
        raise ModelNotFoundError(
            f"there is no model at {model}",
            needed="a model folder, its config.json, or a hub id that is in the cache",
            fix="check --model / MODEL_PATH, and that the container mounts it",
        )
    cache = hub_cache(environ)
    snapshot = _snapshot(cache / f"models--{model.replace('/', '--')}")
    if snapshot is None:
        raise ModelNotFoundError(
            f"there is no model {model}: neither a folder of this name, nor a snapshot in {cache}",
            needed="a model folder, its config.json, or a hub id that is in the cache",
            fix=f"huggingface-cli download {model}, or set HF_HOME to where it is",
        )
    return _read(model, snapshot / "config.json")


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Return the directory of the Hugging Face hub's cache, by the variables that its library uses."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return Path(environ[name])
    home = environ.get("HF_HOME")
    if home:
        return Path(home) / "hub"
    base = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".cache")
    return Path(base) / "huggingface" / "hub"


def _snapshot(folder: Path) -> Path | None:
    """Return the snapshot of ``main``, or else the newest one."""
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
        if commit and (folder / "snapshots" / commit).is_dir():
            return folder / "snapshots" / commit
    except (OSError, UnicodeDecodeError):
        pass
    try:
        found = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
    except OSError:
        return None
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _read(name: str, config: Path) -> ModelFiles:
    try:
        text = read_small_text(config)
    except OSError as error:
        raise ModelNotFoundError(
            f"the model config {config} can't be read: {error.strerror}",
            needed="a folder with config.json",
            fix="check --model / MODEL_PATH, its rights, and that the container mounts it",
        ) from None
    quant = config.with_name(_QUANT_FILE)
    if config.name != "config.json":
        quant = config.with_name(f"{config.stem}.{_QUANT_FILE}")
    try:
        quant_text = read_small_text(quant)
    except FileNotFoundError:
        quant_text = None
    except OSError as error:
        raise ModelNotFoundError(f"{quant} can't be read: {error.strerror}", fix="check its rights") from None
    return ModelFiles(name, config, text, quant_text)
