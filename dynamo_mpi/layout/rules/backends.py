# SPDX-License-Identifier: Apache-2.0
"""D8, D9, G and G3: the MoE backend must exist, and support the experts' format on this GPU.
(TensorRT-LLM, ``moe_resolution.py``, ``create_moe.py``, ``MOE_DEVELOPER_GUIDE.md``)"""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.engine_values import engine_values
from dynamo_mpi.layout.finding import error, warning
from dynamo_mpi.layout.format import listed
from dynamo_mpi.layout.gpus import ADA, AMPERE, BLACKWELL, DATACENTRE_BLACKWELL, HOPPER
from dynamo_mpi.layout.quantisation import FP8_BLOCK_SCALES, NVFP4
from dynamo_mpi.layout.rules.architecture import experts_formats, format_runs, gpu_of
from dynamo_mpi.layout.value_rules import accepted_texts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.layout import LayoutSpec

_SINCE = {"AUTO": (1, 2), "DENSEGEMM": (1, 3), "MARLIN": (1, 3), "MEGAMOE_DEEPGEMM": (1, 3), "MEGAMOE_CUTEDSL": (1, 3)}
_MXFP4 = {
    "CUTLASS": HOPPER | DATACENTRE_BLACKWELL,
    "TRTLLM": DATACENTRE_BLACKWELL,
    "TRITON": HOPPER,
    "MEGAMOE_DEEPGEMM": DATACENTRE_BLACKWELL,
}
# MOE_DEVELOPER_GUIDE.md: architectures on which a backend serves a format
_KERNELS: dict[str, dict[str, frozenset[int]]] = {
    "": {"CUTLASS": AMPERE | ADA | HOPPER | BLACKWELL, "TRTLLM": DATACENTRE_BLACKWELL, "TRITON": HOPPER},
    "FP8": {"CUTLASS": ADA | HOPPER | BLACKWELL, "TRITON": HOPPER},
    FP8_BLOCK_SCALES: {
        "CUTLASS": frozenset({90, 120}),
        "TRTLLM": DATACENTRE_BLACKWELL,
        "DEEPGEMM": DATACENTRE_BLACKWELL,
    },
    NVFP4: {
        "CUTLASS": BLACKWELL,
        "TRTLLM": DATACENTRE_BLACKWELL,
        "CUTEDSL": BLACKWELL,
        "DENSEGEMM": DATACENTRE_BLACKWELL,
        "MEGAMOE_CUTEDSL": DATACENTRE_BLACKWELL,
        "MARLIN": frozenset(range(89, 100)),
    },
    "MXFP4": _MXFP4,
    "W4A16_MXFP4": _MXFP4,
    "W4A8_MXFP4_FP8": {"CUTLASS": DATACENTRE_BLACKWELL, "TRTLLM": DATACENTRE_BLACKWELL, "TRITON": HOPPER},
    "W4A8_MXFP4_MXFP8": {
        "CUTLASS": DATACENTRE_BLACKWELL,
        "TRTLLM": DATACENTRE_BLACKWELL,
        "MEGAMOE_DEEPGEMM": DATACENTRE_BLACKWELL,
    },
    "W4A8_AWQ": {"CUTLASS": ADA | HOPPER},
}
_MEGAMOE_HIDDEN = 512
_KEY = "moe_config.backend"


def check_backend_name(subject: LayoutSpec) -> Iterator[Finding]:
    """D8: the MoE backend's name (``MoeConfig``). WIDEEP, which was removed, is reported with other old keys (H)."""
    backend, known = subject.config.moe.backend, _names(subject)
    if backend is None or backend in known or backend.upper() == "WIDEEP":
        return
    newest = engine_values().newest
    newer = subject.version is not None and subject.version > newest
    later = backend in accepted_texts(_KEY, None)
    fixed = backend.upper() if backend.upper() in known else "AUTO" if "AUTO" in known else "CUTLASS"
    yield (warning if newer else error)(
        "D8",
        f"{'this version has' if later else 'there is'} no MoE backend {backend!r}"
        + (f", as far as known here up to {newest}" if newer else ""),
        found=f"moe_config.backend {backend}" + (f", TensorRT-LLM {subject.version}" if later else ""),
        expected=f"one of {', '.join(known)}",
        fix=f"set moe_config: {{backend: {fixed}}}",
    )


def _names(subject: LayoutSpec) -> list[str]:
    return [name for name in accepted_texts(_KEY, subject.version) if name != "WIDEEP"]


def check_backend(subject: LayoutSpec) -> Iterator[Finding]:
    """D9, G, G3: the chosen kernels serve the experts' format on this GPU, or the engine falls back to CUTLASS, or that has none either
    (``create_moe.get_moe_cls``, ``moe_resolution.resolve_moe_impl``)."""
    if subject.shape.experts is not None:
        for algo in experts_formats(subject.shape) or ():
            yield from _check_backend(subject, algo)


def _check_backend(subject: LayoutSpec, algo: str) -> Iterator[Finding]:
    gpu, layout = gpu_of(subject), subject.layout
    if gpu is None or algo not in _KERNELS:
        return
    serving = [name for name, architectures in _KERNELS[algo].items() if gpu.sm in architectures]
    serving = [name for name in serving if not subject.older_than(*_SINCE.get(name, (0,)))]
    said = subject.config.moe.backend
    # AUTO came with 1.2; until then CUTLASS was the default
    backend = (said or ("CUTLASS" if subject.older_than(1, 2) else "AUTO")).upper()
    what = f"{algo or 'unquantised'} experts"
    found = f"moe_config.backend {said or backend + ' (the default)'}; {what}; {gpu.name}, SM {gpu.sm}"
    if not serving:
        # section G reports a format that the GPU doesn't support
        if format_runs(algo, gpu.sm):
            yield (error if gpu.sm < 120 else warning)(
                "G",
                f"no MoE backend is known to run {what} on {gpu.name}",
                found=found,
                expected=f"SM {listed(sorted(set().union(*_KERNELS[algo].values())))}",
                fix="use other GPUs, or a checkpoint in another format",
            )
        return
    needed = f"one of {', '.join(serving)}"
    fix = f"set moe_config: {{backend: {serving[0]}}}"
    if backend == "CUTEDSL" and gpu.sm >= 120 and (layout.moe_ep_size > 1 or layout.enable_attention_dp):
        yield warning(
            "D9",
            f"CUTEDSL has neither expert parallelism nor attention DP on SM {gpu.sm}",
            found=found,
            expected=needed,
            fix=fix,
        )
    elif backend == "MEGAMOE_DEEPGEMM" and backend in serving and (subject.shape.hidden_size or 0) % _MEGAMOE_HIDDEN:
        yield warning(
            "D9",
            f"MEGAMOE_DEEPGEMM needs a hidden size of whole {_MEGAMOE_HIDDEN}s, not {subject.shape.hidden_size}: the engine falls back",
            found=found,
            expected=f"hidden_size % {_MEGAMOE_HIDDEN} == 0",
            fix=fix,
        )
    elif backend in serving or backend in ("AUTO", "VANILLA", "WIDEEP") or backend not in _names(subject):
        return
    elif backend == "TRTLLM" and gpu.sm >= 120:
        falls_back = "CUTLASS" in serving and not subject.older_than(1, 3)
        yield (warning if falls_back else error)(
            "G3", f"the MoE backend TRTLLM doesn't exist for SM {gpu.sm}", found=found, expected=needed, fix=fix
        )
    elif "CUTLASS" in serving:
        yield warning(
            "D9",
            f"the MoE backend {backend} can't run {what} on {gpu.name}: the engine falls back to CUTLASS",
            found=found,
            expected=needed,
            fix=fix,
        )
    else:
        because = ": fp8 blockscale gemm only support Hopper" if algo == FP8_BLOCK_SCALES else ""
        and_fallback = "" if backend == "CUTLASS" else ", and neither can CUTLASS, which the engine would fall back to"
        yield error(
            "G",
            f"the MoE backend {backend} can't run {what} on {gpu.name}{and_fallback}{because}",
            found=found,
            expected=needed,
            fix=fix,
        )


RULES = (check_backend_name, check_backend)
