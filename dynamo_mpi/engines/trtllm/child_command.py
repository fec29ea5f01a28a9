# SPDX-License-Identifier: Apache-2.0
"""The command line and the environment of ``dynamo.trtllm``, rank 0's child. Pure."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_mpi.config.engine import ENGINE_OPTIONS
from dynamo_mpi.config.sources import MAX_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.config.worker import Settings

# Variables that a launcher sets for a rank. In a process that is not a rank, they would make the MPI library hang or abort in MPI_Init.
# TensorRT-LLM's launcher removes UCX_ too, which would lose the tuning of KV transfer. MPI4PY_* and names like OPAL_PREFIX locate the
# library and stay.
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
# set by this module; values of an outer launcher must not reach the child
_SESSION_PREFIXES = ("TLLM_SPAWN_PROXY_PROCESS", "TLLM_DISABLE_MPI", "tllm_mpi_size")
_RENAMED_VARIABLES = {
    "SLURM_JOB_ID": "DYN_MPI_JOB_ID",
    "SLURM_STEP_ID": "DYN_MPI_STEP_ID",
    "SLURM_JOB_NAME": "DYN_MPI_JOB_NAME",
    "SLURM_CLUSTER_NAME": "DYN_MPI_CLUSTER_NAME",
}
# the first is the variable of Dynamo's Slurm example
_MODALITY = ("MODALITY", "DYN_TRTLLM_MODALITY")
_OWN_OPTIONS = ("trtllm_version",)
# Dynamo deregisters, waits for the grace period, then cancels the requests in flight and waits for them
_GRACE_VARIABLE = "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS"
_DRAIN_VARIABLE = "DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS"
_DEFAULT_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class SessionAddress:
    """How the child connects to TensorRT-LLM's session.

    Args:
        address: ZeroMQ address of rank 0's session server.
        key: HMAC key, 64 hexadecimal digits; versions since 1.3.0rc29 accept no other length.
        size: ranks of the world.
    """

    address: str
    key: str
    size: int

    def __repr__(self) -> str:
        return f"SessionAddress({self.address!r}, size={self.size})"


def child_command(settings: Settings, gpus_per_node: int, model_dir: str = "") -> tuple[str, ...]:
    """Return the command that runs this worker's ``dynamo.trtllm``.

    Only options that the user set are passed; for the rest, the defaults of ``dynamo.trtllm`` apply. It inherits ``DYN_*`` variables.

    Args:
        settings: the worker's settings; flags that only ``dynamo.trtllm`` knows are passed on unchanged.
        gpus_per_node: number of GPUs, and of ranks, of each node: without it the engine uses the number visible on rank 0's node (A10).
        model_dir: the folder from which the engine loads the model; empty for the model's own. The frontend gets the model's own in any case.
    """
    argv = ["--model", str(settings.model), "--served-model-name", settings.served_model_name]
    argv += ["--endpoint", settings.endpoint, "--disaggregation-mode", settings.role]
    argv += ["--discovery-backend", settings.discovery_backend, "--request-plane", settings.request_plane]
    overrides, dynamic = settings.override_engine_args, settings.dynamic_flags
    if model_dir and model_dir != str(settings.model):
        # the engine's own key: Dynamo registers --model. Both ways of overriding exclude each other
        if dynamic:
            dynamic = (*dynamic, "--trtllm.model", model_dir)
        else:
            overrides = json.dumps(json.loads(overrides or "{}") | {"model": model_dir})
    for option in ENGINE_OPTIONS:
        value = overrides if option.name == "override_engine_args" else getattr(settings, option.name)
        if value is None or option.name in _OWN_OPTIONS:
            continue
        flag = "--" + option.name.replace("_", "-")
        if option.name == "engine_config":
            flag = "--extra-engine-args"
        if option.switch:
            argv.append(flag if value else "--no-" + flag[2:])
        else:
            argv += [flag, str(value)]
    argv += ["--gpus-per-node", str(gpus_per_node)]
    return (
        sys.executable,
        "-m",
        "dynamo_mpi.common.run_with_services",
        "dynamo.trtllm",
        *argv,
        *settings.passed_on,
        *dynamic,
    )


def child_environment(environ: Mapping[str, str], session: SessionAddress, settings: Settings) -> dict[str, str]:
    """Return the child's environment: this rank's, without the launcher's variables and with the session's address.

    Args:
        environ: this rank's environment.
        session: the session's address; a worker of one rank has a session too: without it the engine would spawn its rank.
        settings: the worker's settings; variables about the drain take precedence.
    """
    kept = {name: value for name, value in environ.items() if not _is_launch_variable(name)}
    for name, renamed in _RENAMED_VARIABLES.items():
        if name in environ:
            kept.setdefault(renamed, environ[name])
    example, variable = _MODALITY
    if environ.get(example):
        kept[variable] = environ.get(variable) or environ[example]
    # without it Dynamo waits forever
    kept.setdefault(_DRAIN_VARIABLE, f"{settings.drain_timeout:.0f}")
    if settings.origins["drain_timeout"] != "default":
        # not by default: Dynamo waits for the whole period, even if no request is in flight
        kept.setdefault(_GRACE_VARIABLE, f"{settings.drain_timeout:g}")
    return kept | {
        "TLLM_SPAWN_PROXY_PROCESS": "1",
        "TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR": session.address,
        "TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY": session.key,
        "tllm_mpi_size": str(session.size),
        # otherwise MPI_Init in the child, a world of one rank, leaves 16 MiB in /dev/shm if the child is killed
        "OMPI_MCA_btl": "self",
    }


def _is_launch_variable(name: str) -> bool:
    return name.startswith(_SESSION_PREFIXES) or (name.startswith(LAUNCH_PREFIXES) and not name.endswith("_PREFIX"))


def drain_seconds(environment: Mapping[str, str]) -> float:
    """Return the seconds that a child with this environment may take after SIGTERM until it shuts down its engine."""
    return _seconds(environment, _GRACE_VARIABLE, _DEFAULT_GRACE_SECONDS) + _seconds(environment, _DRAIN_VARIABLE, 0.0)


def _seconds(environment: Mapping[str, str], name: str, default: float) -> float:
    """Read a number of seconds like Dynamo, which ignores invalid values."""
    try:
        return min(max(0.0, float(environment.get(name) or default)), MAX_SECONDS)
    except ValueError:
        return default
