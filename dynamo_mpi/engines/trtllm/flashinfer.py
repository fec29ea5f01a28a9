# SPDX-License-Identifier: Apache-2.0
"""A FlashInfer workspace for each rank, as TensorRT-LLM's launcher gives its ranks one.

FlashInfer compiles kernels into its workspace, and ranks that share one read files that another one is writing. A rank takes a slot that no
other process holds, so that worlds beside each other, or with one home directory, don't meet; slots stay, with what was compiled. Compiled
libraries are loaded from there, so no other user may write or replace the folder.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import EngineError
from dynamo_mpi.common.files import FLASHINFER_PREFIX, private_dir
from dynamo_mpi.common.own_files import OwnFolder

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_WORKSPACE = "FLASHINFER_WORKSPACE_BASE"
_PER_PROCESS = "TRTLLM_FLASHINFER_WORKSPACE_PER_PROCESS"
_MANAGED = "TRTLLM_FLASHINFER_WORKSPACE_MANAGED"


def claim_workspace(rank: int, size: int, environ: MutableMapping[str, str]) -> str:
    """Give this rank a workspace until its process ends, unless the user has set one or none is wanted.

    Args:
        rank: this rank.
        size: ranks of the world; a slot that is taken is passed over by so many, as no other rank of this world wants the next one.
        environ: this rank's environment, which gets the variables.

    Returns:
        A warning; empty for none.

    Raises:
        EngineError: no folder can be made.
    """
    if environ.get(_WORKSPACE) or environ.get(_PER_PROCESS) == "0":
        return ""
    # "~" stays where there is neither HOME nor an entry for this user
    home = environ.get("HOME") or os.path.expanduser("~")
    # one root for all of TensorRT-LLM's caches, if the user has named it
    root = Path(os.path.expanduser(environ.get("TRTLLM_CACHE_DIR") or f"{home}/.cache/tensorrt_llm"))
    warning = ""
    try:
        if str(root).startswith("~"):
            raise FileNotFoundError(errno.ENOENT, "HOME isn't set, and this user has no home directory")
        workspace = _lock_slot(root / "flashinfer", rank, size)
    except OSError as error:
        workspace = _temporary_workspace(error)
        warning = (
            f"no FlashInfer workspace in {root} ({error.strerror}): kernels are compiled into a temporary folder, at each start; "
            f"set TRTLLM_CACHE_DIR to a folder that this user, and no other, can write"
        )
    environ[_WORKSPACE] = str(workspace)
    environ[_MANAGED] = "1"
    if home != "~":
        # the cubins that it downloads are shared
        environ.setdefault("FLASHINFER_CUBIN_DIR", os.path.join(home, ".cache/flashinfer/cubins"))
    return warning


def _lock_slot(root: Path, slot: int, stride: int) -> Path:
    """Return the first free slot. Its lock is this process's until it ends."""
    while True:
        workspace = root / f"rank-{slot}"
        with OwnFolder(workspace, guarded=True, create=True) as folder:
            # never closed, and not inherited: the kernel releases the lock with the process
            lock = folder.open(".lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if not isinstance(error, BlockingIOError):
                raise
            slot += stride
        else:
            return workspace


def _temporary_workspace(reason: OSError) -> Path:
    held = contextlib.ExitStack()
    try:
        folder = held.enter_context(private_dir(None, prefix=FLASHINFER_PREFIX))
    except OSError as error:
        raise EngineError(
            f"no folder for FlashInfer's kernels: {reason}; {error}",
            expected="a folder that this rank can write, under TRTLLM_CACHE_DIR, the home directory or TMPDIR",
            fix=f"set TRTLLM_CACHE_DIR, or a {_WORKSPACE} of each rank's own; {_PER_PROCESS}=0 lets all ranks share FlashInfer's",
        ) from None
    atexit.register(held.close)
    return Path(folder)
