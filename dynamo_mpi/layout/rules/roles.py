# SPDX-License-Identifier: Apache-2.0
"""Section I, one worker at a time: what a prefill or a decode worker needs, independently of its partner. The engine reports a
missing setting only at the first request."""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.finding import error, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.layout import LayoutSpec


def check_transceiver(subject: LayoutSpec) -> Iterator[Finding]:
    """I6: KV is transferred only if a transceiver backend is set (``CacheTransceiverFactory``); DEFAULT differs between releases."""
    # the reference engine always has one transport
    if subject.role == "agg" or subject.engine == "reference":
        return
    transceiver = subject.config.transceiver
    backend = transceiver.backend if transceiver is not None else None
    if backend is None:
        yield error(
            "I6",
            f"this {subject.role} worker has no way to hand KV over",
            found="cache_transceiver_config.backend is not set",
            expected="the same backend on prefill and decode workers",
            fix="set cache_transceiver_config: {backend: UCX} on both",
        )
    elif backend.upper() == "DEFAULT":
        yield warning(
            "I6",
            "cache_transceiver_config.backend DEFAULT depends on the release and on TRTLLM_USE_*_KVCACHE variables",
            found=f"cache_transceiver_config.backend {backend}",
            expected="one backend by name, the same on both sides",
            fix="set cache_transceiver_config: {backend: UCX} (or NIXL) on both",
        )


def check_runtime(subject: LayoutSpec) -> Iterator[Finding]:
    """I7: the Python transceiver works only over NIXL, and needs a timeout (``_torch/disaggregation``)."""
    transceiver = subject.config.transceiver
    if transceiver is None or (transceiver.runtime or "").upper() != "PYTHON":
        return
    if (transceiver.backend or "").upper() not in ("NIXL", "DEFAULT"):
        yield error(
            "I7",
            "the Python transceiver works over NIXL alone",
            found=f"transceiver_runtime {transceiver.runtime}, backend {transceiver.backend}",
            expected="backend NIXL",
            fix="set cache_transceiver_config: {backend: NIXL, transceiver_runtime: PYTHON} on both",
        )
    keys = subject.config.keys.get("cache_transceiver_config")
    if isinstance(keys, dict) and "kv_transfer_timeout_ms" in keys and keys["kv_transfer_timeout_ms"] is None:
        yield error(
            "I7",
            "the Python transceiver needs a time after which it gives up",
            found="kv_transfer_timeout_ms null",
            expected="a positive number of milliseconds",
            fix="set cache_transceiver_config.kv_transfer_timeout_ms: 60000",
        )


def check_hybrid_transceiver(subject: LayoutSpec) -> Iterator[Finding]:
    """I5: hybrids transfer their states over NIXL only by the Python transceiver (RNN formatter, PR 14060)."""
    transceiver = subject.config.transceiver
    if subject.role == "agg" or subject.shape.state_space is None or transceiver is None:
        return
    runtime = (transceiver.runtime or "auto").upper()
    if (transceiver.backend or "").upper() == "NIXL" and runtime != "PYTHON":
        say = warning if runtime == "AUTO" and not subject.older_than(1, 2) else error
        yield say(
            "I5",
            f"{subject.shape.name} keeps a state besides its KV cache, which the C++ transceiver can't hand over by NIXL",
            found=f"backend {transceiver.backend}, transceiver_runtime {transceiver.runtime or 'auto'}",
            expected="transceiver_runtime PYTHON",
            fix="set cache_transceiver_config: {backend: NIXL, transceiver_runtime: PYTHON} on both",
        )


def check_overlap(subject: LayoutSpec) -> Iterator[Finding]:
    """I9: prefill workers run without the overlap scheduler (``base_worker._enqueue_request``; allowed since PR 10755, 1.3)."""
    if subject.role != "prefill" or subject.engine == "reference" or subject.config.disable_overlap_scheduler:
        return
    say = error if subject.older_than(1, 3) else warning
    yield say(
        "I9",
        "the overlap scheduler is on: releases up to 1.2 refuse every request on a prefill worker then",
        found="role prefill, disable_overlap_scheduler false",
        expected="disable_overlap_scheduler: true",
        fix="set disable_overlap_scheduler: true",
    )


def check_beams(subject: LayoutSpec) -> Iterator[Finding]:
    """I10: disaggregation supports one beam, and decoder-only models (disaggregated serving FAQ)."""
    if subject.role == "agg":
        return
    beams = subject.config.max_beam_width or 1
    if beams > 1:
        yield error(
            "I10",
            "disaggregated serving has no beam search",
            found=f"role {subject.role}, max_beam_width {beams}",
            expected="max_beam_width 1",
            fix="set max_beam_width: 1",
        )
    if subject.shape.encoder_decoder:
        yield error(
            "I10",
            "disaggregated serving is for decoder-only models",
            found=f"role {subject.role}, {subject.shape.name}",
            expected="a decoder-only model",
            fix="run it with --role agg",
        )


RULES = (check_transceiver, check_runtime, check_hybrid_transceiver, check_overlap, check_beams)
