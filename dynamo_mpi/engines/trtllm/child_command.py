# SPDX-License-Identifier: Apache-2.0
"""The command line and the environment of ``dynamo.trtllm``, rank 0's child. Pure."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_mpi.config.engine import ENGINE_OPTIONS
from dynamo_mpi.config.options import MAX_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.config.worker import Settings

# What a launcher tells a rank. In a process that is none, an MPI library would take it for its own and hang or abort in MPI_Init.
# TensorRT-LLM's launcher removes UCX_ too, and with it the tuning of KV transfer. MPI4PY_* and names like OPAL_PREFIX say where the library
# is.
LAUNCH_PREFIXES = (
    "OMPI_",
    "PMIX_",
    "PMI_",
    "PRTE_",
    "ORTE_",
    "SLURM_",
    "SLURMD_",
    "SRUN_",
    "MPI_",
    "I_MPI_",
    "HYDRA_",
    "HYDI_",
    "MPICH_",
    "MPIR_",
    "MV2_",
    "CRAY_",
    "ALPS_",
)
# ours to say; what a shell launcher around us may have left is not meant for this child
_SESSION_PREFIXES = ("TLLM_SPAWN_PROXY_PROCESS", "TLLM_DISABLE_MPI", "tllm_mpi_size")
_HANDED_ON = {
    "SLURM_JOB_ID": "DYN_MPI_JOB_ID",
    "SLURM_STEP_ID": "DYN_MPI_STEP_ID",
    "SLURM_JOB_NAME": "DYN_MPI_JOB_NAME",
    "SLURM_CLUSTER_NAME": "DYN_MPI_CLUSTER_NAME",
}
# as Dynamo's Slurm example has it
_MODALITY = ("MODALITY", "DYN_TRTLLM_MODALITY")
_OURS_ALONE = ("trtllm_version",)
# Dynamo deregisters, waits for the grace period, then cuts off what dynamo.trtllm still answers, and waits for that
_GRACE_VARIABLE = "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS"
_DRAIN_VARIABLE = "DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS"
_USUAL_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class SessionAddress:
    """How the child finds TensorRT-LLM's session.

    Args:
        address: ZeroMQ address of rank 0's session server.
        key: HMAC key, 64 hexadecimal digits; versions since 1.3.0rc29 take no other length.
        size: ranks of the world.
    """

    address: str
    key: str
    size: int

    def __repr__(self) -> str:
        return f"SessionAddress({self.address!r}, size={self.size})"


def child_command(settings: Settings, gpus_per_node: int) -> tuple[str, ...]:
    """Return the command that runs this worker's ``dynamo.trtllm``.

    Only what was said is said again, by the flag's own name; the rest stays ``dynamo.trtllm``'s to default. Variables
    (``DYN_*``) reach it by its environment.

    Args:
        settings: the worker's; flags of ``dynamo.trtllm`` that aren't ours are handed on as they were written.
        gpus_per_node: GPUs, and ranks, of each node: without it the engine takes what it sees on rank 0's (A10).
    """
    words = ["--model", str(settings.model), "--served-model-name", settings.served_model_name]
    words += ["--endpoint", settings.endpoint, "--disaggregation-mode", settings.role]
    words += ["--discovery-backend", settings.discovery_backend, "--request-plane", settings.request_plane]
    for option in ENGINE_OPTIONS:
        value = getattr(settings, option.name)
        if value is None or option.name in _OURS_ALONE:
            continue
        flag = "--" + option.name.replace("_", "-")
        if option.name == "engine_config":
            flag = "--extra-engine-args"
        if option.switch:
            words.append(flag if value else "--no-" + flag[2:])
        else:
            words += [flag, str(value)]
    words += ["--gpus-per-node", str(gpus_per_node)]
    return (sys.executable, "-m", "dynamo.trtllm", *words, *settings.passed_on, *settings.dynamic_flags)


def child_environment(environ: Mapping[str, str], session: SessionAddress, settings: Settings) -> dict[str, str]:
    """Return the child's environment: this rank's without the launch, with the way to the session.

    Args:
        environ: this rank's.
        session: where the session is; a worker of one rank has one, too: without it the engine would spawn its rank.
        settings: the worker's; what the variables say of the drain is stronger.
    """
    kept = {name: value for name, value in environ.items() if not _is_of_the_launch(name)}
    for name, ours in _HANDED_ON.items():
        if name in environ:
            kept.setdefault(ours, environ[name])
    example, variable = _MODALITY
    if environ.get(example):
        kept[variable] = environ.get(variable) or environ[example]
    # without it Dynamo waits for ever
    kept.setdefault(_DRAIN_VARIABLE, f"{settings.drain_timeout:.0f}")
    if settings.origins["drain_timeout"] != "default":
        # not by default: it waits for all of it, also when there is nothing to wait for
        kept.setdefault(_GRACE_VARIABLE, f"{settings.drain_timeout:g}")
    return kept | {
        "TLLM_SPAWN_PROXY_PROCESS": "1",
        "TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR": session.address,
        "TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY": session.key,
        "tllm_mpi_size": str(session.size),
        # MPI's start in the child, a world of one, would leave 16 MiB in /dev/shm whenever the child is killed
        "OMPI_MCA_btl": "self",
    }


def _is_of_the_launch(name: str) -> bool:
    return name.startswith(_SESSION_PREFIXES) or (name.startswith(LAUNCH_PREFIXES) and not name.endswith("_PREFIX"))


def drain_seconds(environment: Mapping[str, str]) -> float:
    """Return how long a child with this environment may take after SIGTERM until it begins to end its engine."""
    return _seconds(environment, _GRACE_VARIABLE, _USUAL_GRACE_SECONDS) + _seconds(environment, _DRAIN_VARIABLE, 0.0)


def _seconds(environment: Mapping[str, str], name: str, usual: float) -> float:
    """Read a number of seconds as Dynamo does, which ignores what is none."""
    try:
        return min(max(0.0, float(environment.get(name) or usual)), MAX_SECONDS)
    except ValueError:
        return usual
