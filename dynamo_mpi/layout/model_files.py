# SPDX-License-Identifier: Apache-2.0
"""Finds a model's ``config.json``: in a folder, as the file itself, or by a hub id in the cache. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat

from dynamo_mpi.common.config_reader import read_small_text
from dynamo_mpi.common.errors import ModelNotFoundError
from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.format import gib
from dynamo_mpi.layout.model_config import parse_model_shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.layout.engine_config import EngineConfig
    from dynamo_mpi.layout.model_shape import ModelShape

_CONFIG, _QUANT_FILE = "config.json", "hf_quant_config.json"
_PIPELINE = "model_index.json"  # of a diffusers pipeline: a visual generation worker's model
_NEEDED = "a model folder, its config.json, or a hub id that is in the cache"


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
    config: str
    config_text: str
    quant_text: str | None

    def shape(self) -> ModelShape:
        """Read the model's shape.

        Raises:
            ConfigFileError: one of the files is invalid.
        """
        return parse_model_shape(self.config_text, self.config, self.quant_text)


def find_model(model: str, environ: Mapping[str, str] = os.environ) -> ModelFiles:
    """Find a model's files.

    Args:
        model: a directory, a config file, or a hub id such as ``meta-llama/Llama-3.1-8B``.
        environ: environment variables that locate the hub's cache.

    Raises:
        ModelNotFoundError: there is no such model, or its config can't be read.
        ConfigFileError: the config is too large or not text.
    """
    mode = _mode(model)
    if mode is not None and stat.S_ISDIR(mode):
        return _read(os.path.basename(os.path.realpath(model)), os.path.join(model, _CONFIG))
    if mode is not None:
        # in the hub's cache the file is a link to a blob
        folder, name = os.path.split(model)
        stem = os.path.basename(os.path.realpath(folder)) if name == _CONFIG else os.path.splitext(name)[0]
        return _read(stem, model)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.endswith((".json", ".gguf")):
        raise ModelNotFoundError(
            f"there is no model at {model}",
            expected=_NEEDED,
            fix="check --model / MODEL_PATH, and that the container mounts it",
        )
    cache = hub_cache(environ)
    snapshot = _snapshot(os.path.join(cache, f"models--{model.replace('/', '--')}"))
    if snapshot is None:
        raise ModelNotFoundError(
            f"there is no model {model}: neither a folder of this name, nor a snapshot in {cache}",
            expected=_NEEDED,
            fix=f"hf download {model}, or set HF_HOME to where it is"
            if "/" in model
            else "correct the path, or set HF_HOME to where it is",
        )
    return _read(model, os.path.join(snapshot, _CONFIG))


def find_draft(config: EngineConfig, target: str) -> ModelShape | None:
    """Read the shape of the draft model that an engine config names; None if it names none, or one that isn't on this machine.

    Args:
        config: the engine config.
        target: path of the target's config, which may be the draft itself.

    Raises:
        ConfigFileError: its config.json is invalid.
    """
    named = config.speculative.model if config.speculative is not None else None
    if named is None or os.path.join(named, _CONFIG) == target:
        return None
    try:
        return find_model(named).shape()
    except ModelNotFoundError:
        return None


def hub_cache(environ: Mapping[str, str]) -> str:
    """Return the directory of the Hugging Face hub's cache, by the variables that its library uses."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return environ[name]
    home = environ.get("HF_HOME")
    if home:
        return os.path.join(home, "hub")
    base = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".cache")
    return os.path.join(base, "huggingface", "hub")


def _mode(path: str) -> int | None:
    """Return the mode of a file or folder; None if there is none."""
    try:
        return os.stat(path).st_mode
    except ValueError:  # a NUL, which no file's name has
        return None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise ModelNotFoundError(
            f"the model {path[:200]}{'...' if len(path) > 200 else ''} can't be read: {error.strerror}",
            expected=_NEEDED,
            fix="check --model / MODEL_PATH, its rights, and that the container mounts it",
        ) from None


def _snapshot(folder: str) -> str | None:
    """Return the snapshot of ``main``, or else the newest one."""
    snapshots = os.path.join(folder, "snapshots")
    try:
        with open(os.path.join(folder, "refs", "main"), encoding="utf-8") as stream:
            commit = stream.read().strip()
        if commit and os.path.isdir(os.path.join(snapshots, commit)):
            return os.path.join(snapshots, commit)
    except (OSError, UnicodeDecodeError):
        pass
    try:
        found = [entry.path for entry in os.scandir(snapshots) if entry.is_dir()]
    except OSError:
        return None
    return max(found, key=lambda path: os.stat(path).st_mtime, default=None)


def _read(name: str, config: str) -> ModelFiles:
    try:
        text = read_small_text(config)
    except OSError as error:
        if os.path.exists(os.path.join(os.path.dirname(config), _PIPELINE)):
            raise _visual_generation(os.path.dirname(config)) from None
        raise ModelNotFoundError(
            f"the model config {config} can't be read: {error.strerror}",
            expected="a folder with config.json",
            fix="check --model / MODEL_PATH, its rights, and that the container mounts it",
        ) from None
    folder, file = os.path.split(config)
    quant = os.path.join(folder, _QUANT_FILE if file == _CONFIG else f"{os.path.splitext(file)[0]}.{_QUANT_FILE}")
    try:
        quant_text = read_small_text(quant)
    except FileNotFoundError:
        quant_text = None
    except OSError as error:
        raise ModelNotFoundError(
            f"{quant} can't be read: {error.strerror}",
            expected="a file that this user can read, or none",
            fix="check its rights",
        ) from None
    return ModelFiles(name, config, text, quant_text)


def _visual_generation(folder: str) -> ModelNotFoundError:
    """Return the error for a diffusers pipeline, with what its parts weigh."""
    sizes: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for part in os.scandir(folder):
            if part.is_dir():
                files = [entry for entry in os.scandir(part.path) if entry.name.endswith(".safetensors")]
                sizes[part.name] = sum(entry.stat().st_size for entry in files)
    weights = ", ".join(f"{name} {gib(size)}" for name, size in sorted(sizes.items()) if size)
    return ModelNotFoundError(
        f"{folder} is a diffusers pipeline ({_PIPELINE}), whose memory can't be estimated: it depends on the images and videos asked for",
        expected="a language model's folder, with config.json",
        fix=f"leave room on each GPU beside {weights or 'its weights'}; dynamo.trtllm starts a visual generation worker without this check",
    )
