# SPDX-License-Identifier: Apache-2.0
"""Flags that nothing takes: which one is probably meant, and what becomes of those that a worker hands on to ``dynamo.trtllm``."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_LONGEST = 80
# a slip of the pen
_SLIP = 0.9
# of Dynamo 1.4, without those that the worker takes itself: a test compares it with the installed one
_VALUES = """
allowed-local-media-path attn-backend connector custom-jinja-template default-guidance-scale default-height default-num-frames
default-num-images-per-prompt default-num-inference-steps default-width dit-cfg-size dit-ring-size dit-ulysses-size dump-config-to
dyn-default-thinking-mode dyn-endpoint-types dyn-reasoning-parser dyn-structural-tag-schema dyn-structural-tag-scope dyn-tool-call-parser
encode-endpoint endpoint-types engine-request-limit event-plane guided-decoding-backend health-check-payload kv-block-size
kv-state-endpoint max-file-size-mb media-output-fs-url media-output-http-url modality model-loader-extra-config
multimodal-embedding-cache-capacity-gb output-modalities quant-algo revision teacache-thresh torch-dtype
"""
_SWITCHES = """
conversation-affinity disable-torch-compile dyn-enable-structural-tag enable-cuda-graph enable-fullgraph enable-layerwise-nvtx-marker
enable-multimodal enable-teacache exclude-tools-when-tool-choice-none fpm-trace frontend-decoding multimodal-embedding-cache-publisher
publish-events-and-metrics publish-kv-events quant-dynamic skip-warmup teacache-use-ret-steps
"""
SWITCHES = frozenset(f"--{name}" for name in _SWITCHES.split())
"""Those that also have a ``--no-…`` form."""
DYNAMO = SWITCHES | {f"--{name}" for name in (*_VALUES.split(), *(f"no-{name}" for name in _SWITCHES.split()))}


def did_you_mean(message: str, flags: Iterable[str]) -> str:
    """Return a question about what was probably meant, to be set before a fix; empty if nothing is near.

    Args:
        message: argparse's: of flags that it doesn't know, or of a value that is none of its choices.
        flags: those that there are.
    """
    if "nrecognized arguments: " in message:
        words = [word.partition("=")[0] for word in message.partition(": ")[2].split() if word.startswith("-")]
        known = sorted(flags)
    else:
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        words, known = ([choice[1]], re.findall(r"[\w-]+", choice[2])) if choice else ([], [])
    near = next(filter(None, (_nearest(word, known, 0.7) for word in words)), "")
    return f"is {near} meant? " if near else ""


def foreign_flags(words: Sequence[str], flags: Iterable[str]) -> list[str]:
    """Return a warning for each flag that is handed on to ``dynamo.trtllm`` and that isn't known to be one of its flags.

    Args:
        words: what is handed on.
        flags: the worker's own.

    Raises:
        UsageError: a flag is a misspelt one of the worker's, or the beginning of one, which neither the preflight nor the checks would see.
    """
    ours, warnings = sorted(flags), []
    for name in _names(words):
        # Dynamo takes a beginning for the whole
        if any(flag.startswith(name) for flag in DYNAMO):
            continue
        near = next((flag for flag in ours if flag.startswith(name)), "") or _nearest(name, {*ours, *DYNAMO}, _SLIP)
        shown = sanitize(name, _LONGEST)
        if near in ours:
            raise UsageError(
                f"unknown flag {shown}", expected="flags of the worker, or of dynamo.trtllm", fix=f"is {near} meant?"
            )
        # a later Dynamo may have it
        guess = f"; is {near} meant?" if near else ""
        warnings.append(f"unknown flag {shown}, which is passed on: dynamo.trtllm of Dynamo 1.4 refuses it{guess}")
    return warnings


def _names(words: Sequence[str]) -> Iterator[str]:
    return (word.partition("=")[0] for word in words if word.startswith("--") and len(word) > len("--"))


def _nearest(word: str, known: Iterable[str], cutoff: float) -> str:
    return next(iter(get_close_matches(word[:_LONGEST], sorted(known), n=1, cutoff=cutoff)), "")
