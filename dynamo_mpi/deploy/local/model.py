# SPDX-License-Identifier: Apache-2.0
"""Prepares the model folder for the ranks and the frontend."""

from __future__ import annotations

from pathlib import Path

from dynamo_mpi.common.errors import ModelNotFoundError


def prepare_model(given: Path | None, folder: Path) -> tuple[Path, str]:
    """Return a model folder and the name to serve it under.

    Args:
        given: a folder, used as it is, or a GGUF file; None for the installed GGUF.
        folder: the folder for a converted GGUF (neither Dynamo nor the ranks read GGUF).

    Raises:
        UsageError: no model is installed.
        ModelNotFoundError: there is no such model.
    """
    # imported here, so that an error before this point needs no numpy
    from dynamo_mpi.engines.reference.convert_gguf import export_model, find_default_gguf

    if given is not None and not given.exists():
        raise ModelNotFoundError(f"there is no {given}", needed="a model folder or a GGUF file")
    if given is not None and given.is_dir():
        return given.resolve(), given.resolve().name
    gguf = find_default_gguf() if given is None else given.resolve()
    export_model(gguf, folder)
    return folder, served_name(gguf)


def served_name(gguf: Path) -> str:
    """Return the model's name from its file's: ``SmolLM2-135M-Instruct.Q4_1.gguf`` is ``SmolLM2-135M-Instruct``."""
    return gguf.stem.rpartition(".")[0] or gguf.stem
