# SPDX-License-Identifier: Apache-2.0
"""Section G: the GPU must support the checkpoint's number formats. (TensorRT-LLM's support matrix, ``MOE_DEVELOPER_GUIDE.md``, ``linear.py``)

Nothing is said where the kind of GPU isn't known. A format that NVIDIA's matrix lacks, though code for it exists, is a warning.
"""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.engine_reader import as_bool
from dynamo_mpi.layout.finding import error, info, warning
from dynamo_mpi.layout.format import listed
from dynamo_mpi.layout.gpus import ADA, AMPERE, BLACKWELL, CONSUMER_BLACKWELL, DATACENTRE_BLACKWELL, GPUS, HOPPER
from dynamo_mpi.layout.kv_cache import resolve_kv_dtype
from dynamo_mpi.layout.model_shape import Feed, Mixer
from dynamo_mpi.layout.quantisation import NVFP4
from dynamo_mpi.layout.value_rules import accepted_texts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.gpus import Gpu
    from dynamo_mpi.layout.layout import LayoutSpec
    from dynamo_mpi.layout.model_shape import ModelShape

_NONE: frozenset[int] = frozenset()
_HOPPER_UP = HOPPER | BLACKWELL
_ADA_UP = ADA | _HOPPER_UP
_AMPERE_UP = AMPERE | _ADA_UP

# architectures that support a format; and those with code that no matrix lists
_FORMATS: dict[str, tuple[frozenset[int], frozenset[int]]] = {
    "FP8": (_ADA_UP, _NONE),
    "FP8_PER_CHANNEL_PER_TOKEN": (frozenset({90}), _ADA_UP - {90}),
    "FP8_ROWWISE": (frozenset({90}), _ADA_UP - {90}),
    "FP8_BLOCK_SCALES": (_ADA_UP - {121}, frozenset({121})),
    NVFP4: (BLACKWELL, _NONE),
    "MXFP4": (_HOPPER_UP, _NONE),
    "W4A16_MXFP4": (_HOPPER_UP, _NONE),
    "W4A8_MXFP4_FP8": (_HOPPER_UP, _NONE),
    "W4A8_MXFP4_MXFP8": (BLACKWELL, _NONE),
    "W4A8_AWQ": (frozenset({89, 90}), BLACKWELL),
    "W4A16_AWQ": (_AMPERE_UP - CONSUMER_BLACKWELL, CONSUMER_BLACKWELL),
    "W4A16_GPTQ": (_AMPERE_UP - CONSUMER_BLACKWELL, CONSUMER_BLACKWELL),
}
_MARLIN = frozenset(range(89, 100))
_KV_FP8 = _ADA_UP
_SPARSE_MLA_KV = frozenset({90, 120, 121})
_MLA_REUSE = frozenset({90, 100, 103, 120})
_KV_DTYPES = ("auto", "fp8", "fp8_ds_mla", "nvfp4")
_TORCH_DTYPES = frozenset(
    {
        *("bfloat16", "float16", "half", "float32", "float", "float64", "double"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("int8", "uint8", "int16", "short", "uint16", "int32", "int", "uint32", "int64", "long", "uint64", "bool"),
        *("chalf", "cfloat", "cdouble", "complex32", "complex64", "complex128"),
    }
)


def gpu_of(subject: LayoutSpec) -> Gpu | None:
    """Return the kind of GPU; None if it isn't known."""
    return GPUS.get(subject.cluster.gpu or "")


def format_runs(algo: str, sm: int) -> bool | None:
    """Return whether GPUs of this compute capability support a format; None if that isn't documented."""
    if algo not in _FORMATS:
        return None
    runs, doubtful = _FORMATS[algo]
    return True if sm in runs else None if sm in doubtful else False


def experts_formats(shape: ModelShape) -> tuple[str, ...] | None:
    """E11: return the formats of routed experts, an empty text for those that aren't quantised; None if they are unknown."""
    if shape.layers is None:
        return None if shape.quantisation is not None else ("",)
    found = (layer.formats.feed for layer in shape.kinds[0] if layer.feed is Feed.EXPERTS)
    return tuple(dict.fromkeys("" if form is None else form.algo for form in found))


def weight_formats(shape: ModelShape) -> tuple[str, ...]:
    """Return the formats of a checkpoint's quantised weights, by name: those of its layers, or where these aren't known its own."""
    quantisation = shape.quantisation
    if quantisation is None or quantisation.algo in ("", "NONE"):
        return ()
    forms = [form for part in ("mixer", "output", "feed", "shared") for form in shape.formats(part)]
    forms += [shape.head_format] if shape.head_format is not None else []
    if not forms and (shape.layers is None or not quantisation.certain):
        return (quantisation.algo,)
    return tuple(dict.fromkeys(form.algo for form in forms))


def check_format(subject: LayoutSpec) -> Iterator[Finding]:
    """G: the format of the weights (``Unsupported SM version for FP8 block scaling GEMM`` and its like, once the weights are loaded)."""
    if gpu_of(subject) is not None:
        for algo in weight_formats(subject.shape):
            yield from _check_format(subject, algo)


def _check_format(subject: LayoutSpec, algo: str) -> Iterator[Finding]:
    gpu, quantisation = gpu_of(subject), subject.shape.quantisation
    if gpu is None or quantisation is None:
        return
    found = f"{quantisation.source or 'the checkpoint'}: {algo}; {gpu.name}, SM {gpu.sm}"
    if algo not in _FORMATS:
        yield info("G", f"whether {gpu.name} runs the format {algo} can't be judged", found=found)
        return
    runs, doubtful = _FORMATS[algo]
    needed = f"SM {_names(runs)}"
    fix = "use other GPUs, or a checkpoint in another format"
    if gpu.sm in doubtful:
        yield warning(
            "G",
            f"TensorRT-LLM's support matrix doesn't name {algo} for SM {gpu.sm}",
            found=found,
            expected=needed,
            fix=fix,
        )
    elif algo == "FP8_BLOCK_SCALES" and gpu.sm == 120 and subject.older_than(1, 1):
        yield error(
            "G", f"this version has no {algo} for SM 120", found=f"{found}; {subject.version}", expected="1.1", fix=fix
        )
    elif gpu.sm in runs:
        return
    elif algo == NVFP4 and gpu.sm in _MARLIN and "MARLIN" in accepted_texts("moe_config.backend", subject.version):
        yield _by_marlin(subject, gpu, found)
    else:
        yield error("G", f"{gpu.name} can't run {algo} weights", found=found, expected=needed, fix=fix)


def _by_marlin(subject: LayoutSpec, gpu: Gpu, found: str) -> Finding:
    """Return what is missing for Marlin, which runs NVFP4 without NVFP4 arithmetic, where the config asks for it (PR 13476, PR 16749)."""
    shape, keys = subject.shape, subject.config.keys.get("nvfp4_gemm_config")
    said = keys.get("allowed_backends") if isinstance(keys, dict) else None
    needed = []
    if _has_dense_nvfp4(shape):
        needed.append(("dense layers", "nvfp4_gemm_config: {allowed_backends: [marlin]}", "marlin" in (said or ())))
    if NVFP4 in (experts_formats(shape) or (NVFP4 if shape.experts is not None else "",)):
        by_marlin = (subject.config.moe.backend or "").upper() == "MARLIN"
        needed.append(("experts", "moe_config: {backend: MARLIN}", by_marlin))
    missing = [(part, line) for part, line, is_set in needed if not is_set]
    if not missing:
        return info("G", f"{gpu.name} has no NVFP4 arithmetic: Marlin computes with 16-bit activations", found=found)
    lines = " and ".join(line for _, line in missing)
    return error(
        "G",
        f"{gpu.name} has no NVFP4 arithmetic, and runs {' and '.join(part for part, _ in missing)} in NVFP4 by Marlin alone, "
        "which isn't asked for: the engine fails late",
        found=found,
        expected=f"SM {_names(_FORMATS[NVFP4][0])}, or {lines}",
        fix=f"set {lines}, or use an FP8 checkpoint",
    )


def _has_dense_nvfp4(shape: ModelShape) -> bool:
    if shape.layers is None:
        return True
    shared = shape.experts is not None and shape.experts.shared_intermediate_size > 0
    forms = [shape.head_format]
    for layer in shape.kinds[0]:
        if layer.mixer is not Mixer.NONE:
            forms += [layer.formats.mixer, layer.formats.output]
        if layer.feed in (Feed.DENSE, Feed.LINEAR):
            forms.append(layer.formats.feed)
        if layer.mlp_beside_experts or (shared and layer.feed is Feed.EXPERTS):
            forms.append(layer.formats.shared)
    return any(form is not None and form.algo == NVFP4 for form in forms)


def check_dtype(subject: LayoutSpec) -> Iterator[Finding]:
    """G: bfloat16 (``Unsupported data type, pre SM 80 GPUs do not support bfloat16``)."""
    gpu = gpu_of(subject)
    if gpu is not None and gpu.sm < 80 and subject.shape.dtype == "bfloat16":
        yield error(
            "G",
            f"{gpu.name} has no bfloat16",
            found=f"{subject.shape.name}: torch_dtype bfloat16; {gpu.name}, SM {gpu.sm}",
            expected="SM 80 or newer",
            fix="use other GPUs, or set dtype: float16",
        )


def check_kv_dtype_name(subject: LayoutSpec) -> Iterator[Finding]:
    """G1: the name of the KV cache's data type (``KvCacheConfig``)."""
    dtype = subject.config.kv_cache.dtype
    if dtype not in _KV_DTYPES and dtype not in _TORCH_DTYPES:
        yield error(
            "G1",
            f"the KV cache has no data type {dtype!r}",
            found=f"kv_cache_config.dtype {dtype}",
            expected=f"one of {', '.join(_KV_DTYPES)}, or a torch type such as bfloat16 or float16",
            fix="set kv_cache_config: {dtype: auto}",
        )


def check_kv_format(subject: LayoutSpec) -> Iterator[Finding]:
    """G: the KV cache's format, and its requirements of the model. NVIDIA's matrix lists FP8 on Ampere, but the code rejects it
    (``FP8 FMHA can only be enabled on sm_89, sm_90, …``)."""
    gpu, shape, dtype = gpu_of(subject), subject.shape, resolve_kv_dtype(subject) or ""
    calibrated = ((shape.quantisation.kv_algo if shape.quantisation else None) or "").lower()
    found = f"kv_cache_config.dtype {subject.config.kv_cache.dtype}" + (
        f", the checkpoint's {calibrated}" if calibrated else ""
    )
    if dtype == "fp8_ds_mla" and shape.index_head_dim is None:
        yield error(
            "G",
            "fp8_ds_mla is for models with sparse latent attention (DSA) alone",
            found=f"{shape.name}: no index_topk and index_head_dim; {found}",
            expected="a model such as DeepSeek-V3.2 or GLM-5",
            fix="set kv_cache_config: {dtype: fp8} or auto",
        )
        return
    if dtype == "nvfp4" and calibrated != "nvfp4":
        yield warning(
            "G",
            "an nvfp4 KV cache needs scales that this checkpoint doesn't have",
            found=found,
            expected="a checkpoint that ModelOpt calibrated for it: kv_cache_quant_algo NVFP4",
            fix="set kv_cache_config: {dtype: fp8}, or calibrate the checkpoint",
        )
    needed = {"fp8": _KV_FP8, "fp8_ds_mla": _SPARSE_MLA_KV, "nvfp4": BLACKWELL}.get(dtype)
    if gpu is None or needed is None:
        return
    if dtype == "fp8" and gpu.sm in AMPERE:
        yield warning(
            "G",
            f"NVIDIA's support matrix has an fp8 KV cache for {gpu.name}, but TensorRT-LLM's kernels may refuse it: "
            "'FP8 FMHA can only be enabled on' SM 89 and newer",
            found=f"{found}; {gpu.name}, SM {gpu.sm}",
            expected=f"SM {_names(needed)} to be sure",
            fix="set kv_cache_config: {dtype: bfloat16}, or try it",
        )
    elif gpu.sm not in needed:
        yield error(
            "G",
            f"{gpu.name} can't hold a KV cache in {dtype}",
            found=f"{found}; {gpu.name}, SM {gpu.sm}",
            expected=f"SM {_names(needed)}",
            fix=f"set kv_cache_config: {{dtype: {'fp8' if dtype != 'fp8' and gpu.sm in _KV_FP8 else 'bfloat16'}}}",
        )
    elif dtype == "nvfp4" and gpu.sm in CONSUMER_BLACKWELL:
        yield warning(
            "G",
            f"TensorRT-LLM's support matrix doesn't name an nvfp4 KV cache for SM {gpu.sm}",
            found=f"{found}; {gpu.name}",
            expected=f"SM {_names(DATACENTRE_BLACKWELL)}",
            fix="set kv_cache_config: {dtype: fp8}",
        )


def check_cute_dsl(subject: LayoutSpec) -> Iterator[Finding]:
    """G2: ``use_cute_dsl_*`` is for Blackwell (``TorchLlmArgs``)."""
    gpu, keys = gpu_of(subject), subject.config.keys
    if gpu is None or gpu.sm >= 100:
        return
    switched_on = [
        key for key in keys if isinstance(key, str) and key.startswith("use_cute_dsl_") and as_bool(keys[key])
    ]
    for key in switched_on:
        yield error(
            "G2",
            f"{key} needs a Blackwell GPU",
            found=f"{key} true; {gpu.name}, SM {gpu.sm}",
            expected="SM 100 or newer",
            fix=f"leave {key} out",
        )


def check_latent_reuse(subject: LayoutSpec) -> Iterator[Finding]:
    """G4: block reuse and chunked prefill of latent attention are switched off, with a warning, if they aren't supported
    (``py_executor_creator``)."""
    gpu, config = gpu_of(subject), subject.config
    asked = [
        name
        for name, on in (
            ("kv_cache_config.enable_block_reuse", config.kv_cache.enable_block_reuse),
            ("enable_chunked_prefill", config.enable_chunked_prefill),
        )
        if on
    ]
    if gpu is not None and subject.shape.latent is not None and gpu.sm not in _MLA_REUSE and asked:
        yield warning(
            "G4",
            f"the engine switches {' and '.join(asked)} off: latent attention doesn't have it on SM {gpu.sm}",
            found=f"{subject.shape.name}; {gpu.name}, SM {gpu.sm}; {', '.join(f'{name} true' for name in asked)}",
            expected=f"SM {_names(_MLA_REUSE)}",
            fix="; ".join(f"set {name}: false" for name in asked),
        )


def check_state_reuse(subject: LayoutSpec) -> Iterator[Finding]:
    """G4: hybrids keep no states for reused blocks up to 1.2, whose cache manager asserts that reuse is off if the config turns it on
    (``mamba hybrid cache requires block reuse to be disabled in KV cache config``)."""
    keys = subject.config.keys.get("kv_cache_config")
    asked = isinstance(keys, dict) and as_bool(keys.get("enable_block_reuse"))
    if asked and subject.shape.state_space is not None and subject.older_than(1, 3):
        yield error(
            "G4",
            f"{subject.shape.name} keeps a state, which this version can't have together with block reuse",
            found=f"kv_cache_config.enable_block_reuse true; TensorRT-LLM {subject.version}",
            expected="enable_block_reuse: false, or TensorRT-LLM 1.3",
            fix="set kv_cache_config: {enable_block_reuse: false}",
        )


def check_indexer(subject: LayoutSpec) -> Iterator[Finding]:
    """G5: the sparse indexer's FP4 keys need Blackwell and heads of 128 (sparse attention config's validator)."""
    sparse = subject.config.keys.get("sparse_attention_config")
    if not isinstance(sparse, dict) or sparse.get("indexer_k_dtype") != "fp4":
        return
    gpu, size = gpu_of(subject), _index_head_dim(sparse, subject.shape)
    if (gpu is not None and gpu.sm < 100) or (size is not None and size != 128):
        yield error(
            "G5",
            "the sparse indexer can't keep its keys in fp4 here",
            found=f"sparse_attention_config.indexer_k_dtype fp4, index_head_dim {size}"
            + (f"; {gpu.name}, SM {gpu.sm}" if gpu else ""),
            expected="SM 100 or newer, index_head_dim 128",
            fix="set sparse_attention_config: {indexer_k_dtype: fp8}",
        )


def _index_head_dim(sparse: Mapping[str, object], shape: ModelShape) -> int | None:
    size = sparse.get("index_head_dim")
    return size if isinstance(size, int) else shape.index_head_dim


def _names(architectures: frozenset[int]) -> str:
    return listed(sorted(architectures))


RULES = (
    check_format,
    check_dtype,
    check_kv_dtype_name,
    check_kv_format,
    check_cute_dsl,
    check_latent_reuse,
    check_state_reuse,
    check_indexer,
)
