# SPDX-License-Identifier: Apache-2.0
"""Resolves ``--model`` to a directory on rank 0 and sends it to the other ranks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import ModelNotFoundError
from dynamo_mpi.layout.model_files import find_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.config.worker import Settings


def resolve_model_dir(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """Return the settings with the model's directory in place of a ``config.json`` or a hub id. The served model name stays the hub id or the
    directory's name.

    Raises:
        ModelNotFoundError: there is no such model, or only a file of it.
        ConfigFileError: its config is not text, or too large.
    """
    if os.path.isfile(settings.model) and settings.model.name != "config.json":
        raise ModelNotFoundError(
            f"the model {settings.model} is a file",
            expected="a model folder, its config.json, or a hub id that is in the cache",
            fix="set --model to the folder with config.json, the tokenizer's files and the weights",
        )
    files = find_model(str(settings.model), environ)
    named = settings.origins["served_model_name"] != "default"
    name = settings.served_model_name if named else files.name
    return replace(settings, model=Path(files.config).parent, served_model_name=name)
