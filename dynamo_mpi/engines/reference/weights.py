# SPDX-License-Identifier: Apache-2.0
"""One rank's shard of a llama model, as float32 matrices mapped from the model's weights file.

`convert_gguf` writes the file once, in the safetensors format. It contains every matrix as ``[in, out]``, stacked over the layers, so that a
rank maps its layers and rows directly; only columns that are split between ranks are copied.

Column-parallel: query/key/value, gate/up, vocabulary. Row-parallel: attention output, down. The split is that of
Shoeybi et al., "Megatron-LM", 2019, section 3.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dynamo_mpi.common.errors import ModelNotFoundError
from dynamo_mpi.engines.reference.shape import LlamaShape, Share, Stage, share_of, stage_of

Float32Array = NDArray[np.float32]

WEIGHTS_NAME = "reference.safetensors"
FORMAT = "dynamo_mpi reference engine, 1"
_ALIGNMENT = 64
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class ModelFile:
    """A weights file, mapped.

    Args:
        path: the file's path.
        fingerprint: identifies the model.
        shape: the model's sizes.
        tensors: tensors by name; see `tensor_sizes`.
    """

    path: Path
    fingerprint: str
    shape: LlamaShape
    tensors: Mapping[str, Float32Array]


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Matrices are ``[in, out]``, so that a step computes ``x @ matrix``.

    Args:
        attention_norm: ``[hidden]``.
        query_key_value: ``[hidden, (query + 2 * kv heads) * head_dim]``, in this order.
        attention_output: ``[query heads * head_dim, hidden]``.
        feed_forward_norm: ``[hidden]``.
        gate_up: ``[hidden, 2 * intermediate]``, the gate first.
        down: ``[intermediate, hidden]``.
    """

    attention_norm: Float32Array
    query_key_value: Float32Array
    attention_output: Float32Array
    feed_forward_norm: Float32Array
    gate_up: Float32Array
    down: Float32Array


@dataclass(frozen=True)
class Weights:
    """The weights of one rank.

    Args:
        shape: the whole model's sizes.
        share: this rank's shard.
        stage: this rank's pipeline stage.
        layers: the stage's layers, in order.
        embedding: ``[hidden, vocabulary]``; None except on the first stage.
        final_norm: ``[hidden]``; None except on the last stage.
        head: ``[hidden, vocabulary]``, the embedding itself if the model ties them; None except on the last stage.
    """

    shape: LlamaShape
    share: Share
    stage: Stage
    layers: tuple[LayerWeights, ...]
    embedding: Float32Array | None
    final_norm: Float32Array | None
    head: Float32Array | None


def tensor_sizes(shape: LlamaShape, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Return the sizes of a weights file's tensors by name, in order; ``tied``: the embedding is also the head."""
    layers, hidden, vocabulary, inner = (
        shape.num_hidden_layers, shape.hidden_size, shape.vocab_size, shape.intermediate_size
    )  # fmt: skip
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "embedding": (hidden, vocabulary),
        "attention_norm": (layers, hidden),
        "query_key_value": (layers, hidden, queries + 2 * keys),
        "attention_output": (layers, queries, hidden),
        "feed_forward_norm": (layers, hidden),
        "gate_up": (layers, hidden, 2 * inner),
        "down": (layers, inner, hidden),
        "final_norm": (hidden,),
    }
    return sizes if tied else sizes | {"head": (hidden, vocabulary)}


def file_header(shape: LlamaShape, fingerprint: str, *, tied: bool) -> bytes:
    """Return the header of a weights file; the tensors follow without gaps."""
    metadata = {"format": FORMAT, "fingerprint": fingerprint, "shape": json.dumps(asdict(shape))}
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, size in tensor_sizes(shape, tied=tied).items():
        start, end = end, end + math.prod(size) * 4
        header[name] = {"dtype": "F32", "shape": size, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def open_model(model_dir: Path) -> ModelFile:
    """Map the weights file of a model directory; pages are read when they are used.

    Raises:
        ModelNotFoundError: it is missing or incomplete, or has another version.
    """
    path = model_dir / WEIGHTS_NAME
    convert = f"python -m dynamo_mpi.engines.reference.convert_gguf MODEL.gguf {model_dir}"
    try:
        with path.open("rb") as file:
            contents = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = _LENGTH_BYTES + int.from_bytes(contents[:_LENGTH_BYTES], "little")
        header = json.loads(contents[_LENGTH_BYTES:length])
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise ValueError(f"its format is {metadata['format']!r}, not {FORMAT!r}")
        shape = LlamaShape(**json.loads(metadata["shape"]))
        tensors: dict[str, Float32Array] = {}
        for name, size in tensor_sizes(shape, tied="head" not in header).items():
            start, _ = header[name]["data_offsets"]
            tensors[name] = np.frombuffer(contents, "<f4", math.prod(size), length + start).reshape(size)
        return ModelFile(path, metadata["fingerprint"], shape, tensors)
    except FileNotFoundError:
        raise ModelNotFoundError(
            f"the model folder {model_dir} does not exist"
            if not model_dir.is_dir()
            else f"the model folder {model_dir} holds no {WEIGHTS_NAME}",
            expected=f"a folder with config.json, the tokenizer's files and {WEIGHTS_NAME}",
            fix=convert,
        ) from None
    except OSError as error:
        raise ModelNotFoundError(
            f"{path} cannot be read: {error.strerror}", expected="a readable file", fix="check its permissions"
        ) from error
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ModelNotFoundError(
            f"{path} is not a usable weights file: {error}",
            expected="a complete file, as this version of dynamo-mpi writes it",
            fix=convert,
        ) from error


def load_weights(model: ModelFile, rank: int, tp_size: int, pp_size: int = 1) -> Weights:
    """Return the weights of ``rank`` of ``tp_size * pp_size``.

    Raises:
        LayoutError: the model can't be split into ``tp_size`` shares of ``pp_size`` stages.
    """
    shape, tensors = model.shape, model.tensors
    share = share_of(shape, rank % tp_size, tp_size)
    stage = stage_of(shape.num_hidden_layers, rank, tp_size, pp_size)
    embedding = _columns(tensors["embedding"], share.vocabulary) if stage.is_first or stage.is_last else None
    head = embedding
    if stage.is_last and "head" in tensors:
        head = _columns(tensors["head"], share.vocabulary)
    return Weights(
        shape=shape,
        share=share,
        stage=stage,
        layers=tuple(_layer(tensors, index, shape, share) for index in stage.layers),
        embedding=embedding if stage.is_first else None,
        final_norm=tensors["final_norm"] if stage.is_last else None,
        head=head if stage.is_last else None,
    )


def _layer(tensors: Mapping[str, Float32Array], index: int, shape: LlamaShape, share: Share) -> LayerWeights:
    queries, keys = _scaled(share.query_heads, shape.head_dim), _scaled(share.kv_heads, shape.head_dim)
    first_key = shape.num_attention_heads * shape.head_dim
    first_value = first_key + shape.num_key_value_heads * shape.head_dim
    inner = share.intermediate
    return LayerWeights(
        attention_norm=tensors["attention_norm"][index],
        query_key_value=_columns(
            tensors["query_key_value"][index], queries, _shifted(keys, first_key), _shifted(keys, first_value)
        ),
        attention_output=tensors["attention_output"][index, queries.start : queries.stop],
        feed_forward_norm=tensors["feed_forward_norm"][index],
        gate_up=_columns(tensors["gate_up"][index], inner, _shifted(inner, shape.intermediate_size)),
        down=tensors["down"][index, inner.start : inner.stop],
    )


def _columns(matrix: Float32Array, *parts: range) -> Float32Array:
    """Return the parts concatenated and contiguous; the mapped matrix itself if they are all of it."""
    if sum(map(len, parts)) == matrix.shape[1]:
        return matrix
    return np.concatenate([matrix[:, part.start : part.stop] for part in parts], axis=1)


def _scaled(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


def _shifted(columns: range, by: int) -> range:
    return range(columns.start + by, columns.stop + by)
