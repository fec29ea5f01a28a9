# SPDX-License-Identifier: Apache-2.0
"""Checks that Dynamo's frontend can load the model. It reads config.json and the tokenizer itself; if it can't, the worker is registered
but its model never appears, and only the frontend's log has the reason."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import ConfigFileError, ModelNotFoundError

if TYPE_CHECKING:
    from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model")


def check_frontend_can_load(folder: Path, config_text: str) -> None:
    """Reject a model folder that a worker could load but the frontend could not serve.

    Args:
        folder: the model folder.
        config_text: its config.json, a JSON object.

    Raises:
        ModelNotFoundError: it holds no tokenizer.
        ConfigFileError: its config.json names no architecture.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelNotFoundError(
            f"the model folder {folder} holds no tokenizer: the frontend could not serve this model",
            needed=f"one of {', '.join(TOKENIZER_FILES)} beside config.json",
            fix="copy the tokenizer's files from where the model comes from",
        )
    architectures = json.loads(config_text).get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ConfigFileError(
            f"{folder / 'config.json'} names no architectures: the frontend could not serve this model",
            needed='the model\'s own config.json, with "architectures": ["..."]',
            fix="copy config.json from where the model comes from",
        )
