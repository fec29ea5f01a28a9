# SPDX-License-Identifier: Apache-2.0
"""The libraries that compile or tune kernels while TensorRT-LLM starts: where each keeps what it has made, by its own variable. Pure.

Where each was looked up, and which locks it has: docs/guides/caches.md. None is relied on: each rank has folders of its own.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT_VARIABLE = "TRTLLM_CACHE_DIR"
"""Where TensorRT-LLM 1.4 and newer put all of them, each unless its own variable is set. A user who sets it has chosen for all."""


class Library(NamedTuple):
    """One library's cache.

    Args:
        name: its name for the user.
        variable: the variable that it honours.
        place: its folder, or file, below the rank's.
        also: other variables by which a user chooses where it is, or that there is none.
        with_it: variables without which it keeps nothing, each unless the user has set it.
        is_json: whether ``place`` is a JSON file, which stops the engine if it isn't whole.
        is_bound: whether its files are good only where they were made: elsewhere it compiles again, or fails (FlashInfer 0.6.1).
    """

    name: str
    variable: str
    place: str
    also: tuple[str, ...] = ()
    with_it: tuple[tuple[str, str], ...] = ()
    is_json: bool = False
    is_bound: bool = False


LIBRARIES = (
    Library("Triton", "TRITON_CACHE_DIR", "triton", also=("TRITON_HOME", "TRITON_CACHE_MANAGER")),
    Library("torch inductor", "TORCHINDUCTOR_CACHE_DIR", "inductor"),
    Library("torch's extensions", "TORCH_EXTENSIONS_DIR", "torch_extensions", is_bound=True),
    Library(
        "FlashInfer",
        "FLASHINFER_WORKSPACE_BASE",
        "flashinfer",
        also=("TRTLLM_FLASHINFER_WORKSPACE_PER_PROCESS",),
        is_bound=True,
    ),
    Library("DeepGEMM", "DG_JIT_CACHE_DIR", "deep_gemm", also=("TRTLLM_DEEP_GEMM_CACHE_PER_PROCESS",)),
    Library(
        "TensorRT-LLM's DeepGEMM",
        "TRTLLM_DG_CACHE_DIR",
        "trtllm_deep_gemm",
        with_it=(("TRTLLM_DG_JIT_DUMP_CUBIN", "1"),),
    ),
    Library("CuTe DSL", "CUTE_DSL_CACHE_DIR", "cute_dsl"),
    Library("TensorRT-LLM's autotuner", "TLLM_AUTOTUNER_CACHE_PATH", "autotuner/cache.json", is_json=True),
    Library("CUDA", "CUDA_CACHE_PATH", "cuda", also=("CUDA_CACHE_DISABLE",)),
)


class Assignment(NamedTuple):
    """What a rank sets.

    Args:
        variables: the variables, with their values.
        folders: folders that must exist.
        own: lines about what the user has set, which stays as it is.
    """

    variables: dict[str, str]
    folders: tuple[str, ...]
    own: tuple[str, ...]


def assign(folder: str, environ: Mapping[str, str]) -> Assignment:
    """Return the variables that put each library's cache below a rank's folder. What the user has set stays, and that library is left alone.

    Args:
        folder: the rank's folder.
        environ: the rank's environment.
    """
    if environ.get(ROOT_VARIABLE):
        return Assignment({}, (), (f"{ROOT_VARIABLE} is set: all compile caches are where it says",))
    variables: dict[str, str] = {}
    folders: list[str] = []
    own: list[str] = []
    for library in LIBRARIES:
        named = [name for name in (library.variable, *library.also) if environ.get(name)]
        if named:
            own.append(f"{named[0]} is set: {library.name}'s compile cache is left alone")
            continue
        path = os.path.join(folder, library.place)
        variables[library.variable] = path
        folders.append(os.path.dirname(path) if library.is_json else path)
        variables |= {name: value for name, value in library.with_it if name not in environ}
    if len(own) == sum(1 for library in LIBRARIES if environ.get(library.variable)):
        # not where a user chose in another way: TensorRT-LLM would then set that library's variable below it
        root = os.path.join(folder, "trtllm")
        variables[ROOT_VARIABLE] = root
        folders.append(root)
    return Assignment(variables, tuple(folders), tuple(own))


def is_bound(path: str) -> bool:
    """Return whether a file below a rank's folder is good only in a folder of the same path."""
    return any(library.is_bound and path.startswith(f"{library.place}/") for library in LIBRARIES)


def json_places() -> frozenset[str]:
    """Return the files that must be whole JSON."""
    return frozenset(library.place for library in LIBRARIES if library.is_json)
