# SPDX-License-Identifier: Apache-2.0
"""The stack's workers: an aggregated one, or one for prefill and one for decode; their command lines, environments,
ready files and model folder.

This module starts nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dynamo_mpi.common.errors import ModelNotFoundError, UsageError
from dynamo_mpi.common.own_files import read_own
from dynamo_mpi.common.ports import LOOPBACK
from dynamo_mpi.common.subprocess import with_pdeathsig
from dynamo_mpi.deploy.launchers import UNBOUND
from dynamo_mpi.discovery.records import LAUNCH_VARIABLE


def prepare_model(given: Path | None, folder: Path) -> tuple[Path, str]:
    """Return a model folder and the name to serve it under.

    Args:
        given: a folder, or its config.json, used as it is, or a GGUF file; None for the installed GGUF.
        folder: the folder for a converted GGUF (neither Dynamo nor the ranks read GGUF).

    Raises:
        UsageError: no model is installed.
        ModelNotFoundError: there is no such model, or it is another kind of file.
    """
    # imported here, so that an error before this point needs no numpy
    from dynamo_mpi.engines.reference.convert_gguf import export_model, find_default_gguf

    if given is not None and not given.exists():
        raise ModelNotFoundError(
            f"there is no {given}", expected="a model folder or a GGUF file", fix="correct the path"
        )
    if given is not None and given.name == "config.json":
        given = given.parent
    if given is not None and given.is_dir():
        return given.resolve(), given.resolve().name
    if given is not None and not _is_gguf(given):
        raise ModelNotFoundError(
            f"{given} is neither a folder nor a GGUF file",
            expected="a model folder, its config.json, or a GGUF file",
            fix="correct the path",
        )
    gguf = find_default_gguf() if given is None else given.resolve()
    export_model(gguf, folder)
    return folder, served_name(gguf)


def _is_gguf(path: Path) -> bool:
    """Return whether a file begins as GGUF does, whatever its name; one that can't be read is left to the converter's message."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return True


def served_name(gguf: Path) -> str:
    """Return the model's name from its file's: ``SmolLM2-135M-Instruct.Q4_1.gguf`` is ``SmolLM2-135M-Instruct``."""
    return gguf.stem.rpartition(".")[0] or gguf.stem


StackRole = Literal["agg", "disagg"]
WorkerRole = Literal["agg", "prefill", "decode"]

# the installed model has 9 attention heads: 1 and 3 are its legal sizes below 9
AGG_TP_SIZE = 3
PREFILL_TP_SIZE, DECODE_TP_SIZE = 3, 1
"""Unequal, so that the KV transfer must reshard; decode on one rank, which is fastest for a small model."""


@dataclass(frozen=True)
class WorkerSpec:
    """One worker.

    Args:
        role: its role.
        tp_size: its number of ranks, all for tensor parallelism.
    """

    role: WorkerRole
    tp_size: int

    @property
    def name(self) -> str:
        """Its name in the stack."""
        return "worker" if self.role == "agg" else self.role


def worker_specs(
    role: StackRole, tp: int | None, prefill_tp: int | None, decode_tp: int | None
) -> tuple[WorkerSpec, ...]:
    """Return the workers for the flags, in the order in which they are stopped.

    Args:
        role: ``agg`` or ``disagg``.
        tp: ranks of each worker without its own number; None for the default of its role.
        prefill_tp: ranks of the prefill worker.
        decode_tp: ranks of the decode worker.

    Raises:
        UsageError: a size is given for a worker that doesn't exist.
    """
    if role == "disagg":
        return (
            WorkerSpec("prefill", prefill_tp or tp or PREFILL_TP_SIZE),
            WorkerSpec("decode", decode_tp or tp or DECODE_TP_SIZE),
        )
    for flag, size in (("--prefill-tp", prefill_tp), ("--decode-tp", decode_tp)):
        if size is not None:
            raise UsageError(
                f"{flag} {size} with --role agg", expected="one worker, whose size is --tp", fix="add --role disagg"
            )
    return (WorkerSpec("agg", tp or AGG_TP_SIZE),)


@dataclass(frozen=True)
class MpirunWorker:
    """One worker under mpirun. It is ready when rank 0 has written its ready file."""

    mpirun: tuple[str, ...]
    spec: WorkerSpec
    model: Path
    served_model_name: str
    engine_config: Path
    ready_file: Path
    rank_logs: Path
    scratch: Path
    discovery: Mapping[str, str]
    timeline: Path
    launch: str = ""

    @property
    def name(self) -> str:
        return self.spec.name

    def command(self) -> tuple[str, ...]:
        role = self.spec.role
        worker = (
            *(sys.executable, "-m", "dynamo_mpi.worker", "--role", role, "--engine", "reference"),
            *("--model", str(self.model), "--served-model-name", self.served_model_name),
            *("--engine-config", str(self.engine_config), "--ready-file", str(self.ready_file)),
            *("--timeline", str(self.timeline)),
            *(() if role == "agg" else ("--kv-network", LOOPBACK)),
        )
        return (*self.mpirun, "-n", str(self.spec.tp_size), *with_pdeathsig(worker, rank_logs=self.rank_logs))

    def environment(self) -> dict[str, str]:
        own = {
            "PYTHONUNBUFFERED": "1",
            "DYN_SELF_HOST_METADATA": "0",  # the frontend reads the model's files by their path
            LAUNCH_VARIABLE: self.launch,
        }
        return {**self.discovery, **own, **mpi_environment(self.scratch, root=os.geteuid() == 0)}

    def ready(self) -> dict[str, Any] | None:
        """Return the ready file's content; None if it doesn't exist. It is written atomically."""
        try:
            contents = json.loads(read_own(self.ready_file))
        except FileNotFoundError:
            return None
        return contents if isinstance(contents, dict) else None

    def rank_zero(self) -> int | None:
        """Return rank 0's process id, None unless it serves."""
        try:
            pid = (self.ready() or {}).get("pid")
        except (OSError, ValueError):
            return None
        return pid if isinstance(pid, int) else None


def mpi_environment(scratch: Path, *, root: bool) -> dict[str, str]:
    """Return variables that let Open MPI 4 and 5 run more ranks than cores; other MPIs ignore them.

    Variables, not flags, because each launcher has different flags.

    Args:
        scratch: folder for shared-memory files, which a killed rank can't remove from /dev/shm.
        root: whether this user is root, whom Open MPI rejects unless two variables are set.
    """
    variables = UNBOUND | {
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_btl_sm_backing_directory": str(scratch),
        "OMPI_MCA_btl_vader_backing_directory": str(scratch),
    }
    if root:
        variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return variables
