# SPDX-License-Identifier: Apache-2.0
"""Section I, rules between two workers: what a prefill and a decode worker must have in common.

The engine compares these values only at the first request, in the sender's thread, while both workers look healthy; a mismatch is an error, a
timeout, a hang or wrong text. Here each side has a `Contract`, plain data that is also in the worker record, and two contracts are compared.
"""

from __future__ import annotations

from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.layout.finding import error, warning
from dynamo_mpi.layout.kv_cache import resolve_kv_dtype, tokens_per_block
from dynamo_mpi.layout.trtllm_version import parse_trtllm_version

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.layout import LayoutSpec


@dataclass(frozen=True)
class Contract:
    """One side of a pair. None means not known.

    Args:
        role: ``prefill`` or ``decode``.
        model: the architecture.
        num_layers: number of the model's layers.
        kv_heads: over all ranks; None with latent attention.
        head_dim: elements of a head, or of the latent with its rotary part.
        latent_attention: whether it has latent attention (MLA).
        index_head_dim: of the sparse-attention indexer's cache; 0 without one.
        state_heads: of a hybrid; 0 for none.
        state_dtype: of its states; None for the engine's own.
        kv_dtype: of keys and values, ``auto`` resolved.
        tokens_per_block: block size of the KV cache that the attention backend uses.
        backend: transport of the KV.
        runtime: ``CPP``, ``PYTHON`` or ``AUTO``.
        tp_size: tensor-parallel size.
        pp_size: pipeline stages.
        cp_size: context-parallel size.
        enable_attention_dp: attention is data-parallel.
        max_seq_len: longest request; None if the model decides.
        max_tokens_in_buffer: of the transceiver.
        trtllm_version: of TensorRT-LLM.
    """

    role: str
    model: str
    num_layers: int | None
    kv_heads: int | None
    head_dim: int | None
    latent_attention: bool
    index_head_dim: int
    state_heads: int
    state_dtype: str | None
    kv_dtype: str | None
    tokens_per_block: int
    backend: str | None
    runtime: str
    tp_size: int
    pp_size: int
    cp_size: int
    enable_attention_dp: bool
    max_seq_len: int | None
    max_tokens_in_buffer: int | None
    trtllm_version: str | None

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return dict(vars(self))


def contract_of(subject: LayoutSpec) -> Contract:
    """Return the contract of ``subject``."""
    shape, config, layout = subject.shape, subject.config, subject.layout
    latent = shape.latent
    transceiver = config.transceiver
    return Contract(
        role=subject.role,
        model=shape.name,
        num_layers=shape.num_layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim if latent is None else latent.kv_lora_rank + (latent.qk_rope_head_dim or 0),
        latent_attention=latent is not None,
        index_head_dim=shape.index_head_dim or 0,
        state_heads=shape.state_space.heads if shape.state_space is not None else 0,
        state_dtype=config.kv_cache.state_dtype if shape.state_space is not None else None,
        kv_dtype=resolve_kv_dtype(subject),
        tokens_per_block=tokens_per_block(subject),
        backend=transceiver.backend.upper() if transceiver is not None and transceiver.backend else None,
        runtime=((transceiver.runtime if transceiver is not None else None) or "auto").upper(),
        tp_size=layout.tp_size,
        pp_size=layout.pp_size,
        cp_size=layout.cp_size,
        enable_attention_dp=layout.enable_attention_dp,
        max_seq_len=config.max_seq_len,
        max_tokens_in_buffer=transceiver.max_tokens_in_buffer if transceiver is not None else None,
        trtllm_version=None if subject.version is None else str(subject.version),
    )


# field, rule, name for the user, advice
_SHARED = (
    ("model", "I1", "the model", "serve the same checkpoint on both sides"),
    ("num_layers", "I1", "number of layers", "serve the same checkpoint on both sides"),
    ("kv_heads", "I1", "KV heads", "serve the same checkpoint on both sides"),
    ("head_dim", "I1", "head size", "serve the same checkpoint on both sides"),
    ("latent_attention", "I1", "kind of attention", "serve the same checkpoint on both sides"),
    ("index_head_dim", "I3", "the indexer's cache", "serve the same checkpoint on both sides"),
    ("state_heads", "I5", "state heads", "serve the same checkpoint on both sides"),
    ("state_dtype", "I5", "type of states", "set the same kv_cache_config.mamba_ssm_cache_dtype on both sides"),
    ("kv_dtype", "I1", "KV cache dtype", "set the same kv_cache_config.dtype on both sides"),
    ("tokens_per_block", "I1", "tokens per KV block", "set the same kv_cache_config.tokens_per_block on both sides"),
    ("backend", "I6", "cache transceiver backend", "set the same cache_transceiver_config.backend on both sides"),
    ("runtime", "I7", "transceiver runtime", "set the same cache_transceiver_config.transceiver_runtime on both sides"),
)


def check_contracts(prefill: Contract, decode: Contract) -> list[Finding]:
    """I1-I8, F11: prefill and decode must agree in KV type, blocks, heads, layers and transceiver; layouts and limits may differ
    (``CacheFormatter::inquireSupport``, ``PeerRegistrar``)."""
    return [*_shared(prefill, decode), *_context(prefill, decode), *_advice(prefill, decode)]


def _shared(prefill: Contract, decode: Contract) -> Iterator[Finding]:
    for field, rule, name, fix in _SHARED:
        ours, theirs = getattr(prefill, field), getattr(decode, field)
        if ours == theirs or ours is None or theirs is None:
            continue
        if _may_be_the_same(field, {ours, theirs}):
            yield warning(
                rule,
                f"whether prefill and decode have the same {name} is left to their engines",
                found=f"prefill {ours}, decode {theirs}",
                expected=f"the same {name}, by name",
                fix=fix,
            )
            continue
        yield error(
            rule,
            f"prefill and decode differ in {name}: one can't use the other's KV",
            found=f"prefill {ours}, decode {theirs}",
            expected=f"the same {name}",
            fix=fix,
        )


def _may_be_the_same(field: str, values: set[object]) -> bool:
    """Return whether different values may mean the same: each engine resolves AUTO, and DEFAULT is NIXL unless a variable is set (I6, I7)."""
    return (field == "backend" and values == {"DEFAULT", "NIXL"}) or (field == "runtime" and "AUTO" in values)


def _context(prefill: Contract, decode: Contract) -> Iterator[Finding]:
    if prefill.cp_size > 1 and decode.cp_size > 1:
        yield error(
            "I4",
            "both sides use context parallelism",
            found=f"prefill cp_size {prefill.cp_size}, decode cp_size {decode.cp_size}",
            expected="cp_size 1 on the prefill side",
            fix="set context_parallel_size: 1 on the prefill worker",
        )


def _is_1_2(version: str | None) -> bool:
    return version is not None and parse_trtllm_version(version).minor == (1, 2)


def _advice(prefill: Contract, decode: Contract) -> Iterator[Finding]:
    versions = {prefill.trtllm_version, decode.trtllm_version}
    if None not in versions and len(versions) > 1:
        yield warning(
            "I1",
            "prefill and decode run different releases of TensorRT-LLM, whose hand-over may differ",
            found=f"prefill {prefill.trtllm_version}, decode {decode.trtllm_version}",
            expected="one release",
            fix="use one container image",
        )
    if prefill.pp_size > 1 and decode.tp_size > 1 and any(map(_is_1_2, versions)):
        yield warning(
            "F11",
            "TensorRT-LLM 1.2 can hang when prefill has pipeline stages and decode has tensor parallelism",
            found=f"prefill pp_size {prefill.pp_size}, decode tp_size {decode.tp_size}",
            expected="no pipeline stages on the prefill side with 1.2",
            fix="set pipeline_parallel_size to 1 for prefill, or take another release",
        )
    if prefill.max_seq_len is not None and decode.max_seq_len is not None and prefill.max_seq_len > decode.max_seq_len:
        yield warning(
            "I8",
            "prefill accepts longer requests than decode can continue",
            found=f"max_seq_len: prefill {prefill.max_seq_len}, decode {decode.max_seq_len}",
            expected="max_seq_len of decode at least that of prefill",
            fix=f"set max_seq_len: {prefill.max_seq_len} on the decode worker, or less on the prefill worker",
        )
    for side in (prefill, decode):
        buffer, length = side.max_tokens_in_buffer, prefill.max_seq_len
        # zero is "no limit of its own" too (`CacheTransceiverConfig`)
        if buffer is not None and length is not None and 0 < buffer < length:
            yield warning(
                "I8",
                f"the {side.role} worker's transfer buffer is smaller than the longest prompt: such transfers are slow",
                found=f"cache_transceiver_config.max_tokens_in_buffer {buffer}, longest request {length}",
                expected=f"at least {length}",
                fix=f"set max_tokens_in_buffer: {length} in cache_transceiver_config",
            )
