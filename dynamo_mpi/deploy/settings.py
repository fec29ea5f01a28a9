# SPDX-License-Identifier: Apache-2.0
"""The settings of a deployment, as flags and as the variables of Dynamo's Slurm example.

This and the modules that it imports need no third-party package: the launcher runs on a cluster's host, outside the container.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.config.options import Option, resolve, run_dir_option, to_count, to_folder, to_path, to_switch, to_text
from dynamo_mpi.config.sources import to_seconds
from dynamo_mpi.config.variables import unknown_variables

if TYPE_CHECKING:
    from collections.abc import Mapping

ROLES = ("agg", "prefill", "decode")
# a worker that only had an accident serves again after the first; a third one in an hour is for a person to look at
RESTARTS_WITH_SPARES = 3


def to_words(text: str) -> tuple[str, ...]:
    """Split a text into words as a shell does."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"words as a shell reads them ({error})") from None


def to_zero_or_count(text: str) -> int:
    """Read a number; 0 is allowed."""
    try:
        return 0 if text.strip() == "0" else to_count(text)
    except ValueError as error:
        raise ValueError(f"0, or {error}") from None


def _of_role(role: str) -> tuple[Option, ...]:
    flag, variable = ("", "") if role == "agg" else (f"{role}-", f"{role.upper()}_")
    return (
        Option(
            f"{role}_engine_config",
            (f"--{flag}engine-config",),
            (f"{variable}ENGINE_CONFIG",),
            None,
            to_text,
            f"engine config of a worker of role {role}, as its ranks see the path",
        ),
        Option(
            f"{role}_nodes",
            (f"--{flag}nodes",),
            (f"NUM_{variable}NODES",),
            1,
            to_count,
            f"nodes of one {role} worker"
            + ("; or which nodes of the allocation to take, as Slurm writes them: n[1-4]" if role == "agg" else ""),
        ),
        Option(
            f"{role}_workers",
            (f"--{flag}workers",),
            (f"NUM_{variable}WORKERS",),
            1,
            to_count,
            f"workers of role {role}, each on nodes of its own",
        ),
    )


OPTIONS: tuple[Option, ...] = (
    Option(
        "role",
        ("--role",),
        (),
        "disagg",
        str,
        "agg: workers that do everything; disagg: prefill and decode workers",
        ("agg", "disagg"),
    ),
    Option(
        "launcher",
        ("--launcher",),
        ("DYN_MPI_LAUNCHER",),
        "auto",
        str,
        "what starts the ranks: auto is mpirun where there is a hostfile, else slurm, in an allocation",
        ("auto", "slurm", "mpirun"),
    ),
    Option("hostfile", ("--hostfile",), ("HOSTFILE",), None, to_path, "hosts for mpirun, one on a line"),
    Option("image", ("--image",), ("IMAGE",), None, to_text, "container image, for Pyxis; without one: bare metal"),
    Option("mounts", ("--mounts",), ("MOUNTS",), None, to_text, "HOST:CONTAINER[,HOST:CONTAINER…] for the image"),
    Option(
        "model",
        ("--model", "--model-path"),
        ("MODEL_PATH", "DYN_TRTLLM_MODEL"),
        None,
        to_text,
        "model folder or hub id, as the ranks see it",
    ),
    Option(
        "served_model_name",
        ("--served-model-name",),
        ("SERVED_MODEL_NAME", "DYN_TRTLLM_SERVED_MODEL_NAME"),
        None,
        to_text,
        "name that clients ask for; the folder's name or the hub id by default",
    ),
    Option(
        "modality",
        ("--modality",),
        ("MODALITY", "DYN_TRTLLM_MODALITY"),
        None,
        to_text,
        "what dynamo.trtllm takes: text, multimodal",
    ),
    Option(
        "stage_dir",
        ("--stage-dir",),
        ("STAGE_DIR",),
        None,
        to_folder,
        "folder on a disk of each node: the nodes of a worker copy the model there, reading its own folder once (the worker's --stage); it "
        "must be there, and is mounted into the image",
    ),
    Option(
        "cache_dir",
        ("--cache-dir",),
        ("CACHE_DIR",),
        None,
        to_folder,
        "folder on the shared file system with archives of compile caches, from which the workers' ranks are seeded (the worker's --cache); "
        "it must be there, and is mounted into the image",
    ),
    *(option for role in ROLES for option in _of_role(role)),
    Option(
        "gpus_per_node", ("--gpus-per-node",), ("NUM_GPUS_PER_NODE",), 4, to_count, "GPUs, and so ranks, of each node"
    ),
    run_dir_option(
        "folder of this deployment on a file system that all nodes share: logs, and the services' addresses and keys; "
        "./dynamo_mpi-JOB by default",
    ),
    Option(
        "engine",
        ("--engine",),
        ("DYN_MPI_ENGINE",),
        "auto",
        str,
        "what runs the model, as the worker's flag",
        ("auto", "reference", "trtllm"),
    ),
    Option("mpi", ("--mpi",), ("DYN_MPI_SRUN_MPI",), "pmix", to_text, "srun's MPI plugin"),
    Option("srun_args", ("--srun-args",), ("SRUN_ARGS",), (), to_words, "further words for srun of each worker"),
    Option(
        "mpirun", ("--mpirun",), ("DYN_MPI_MPIRUN",), ("mpirun",), to_words, "Open MPI's launcher, with further words"
    ),
    Option(
        "python",
        ("--python",),
        ("DYN_MPI_PYTHON",),
        None,
        to_text,
        "interpreter in the steps; python3 in an image, else this one",
    ),
    Option(
        "spare_nodes",
        ("--spare-nodes",),
        ("DYN_MPI_SPARE_NODES", "NUM_SPARE_NODES"),
        0,
        to_zero_or_count,
        "nodes of the allocation that no worker gets at first: one takes the place of a node that is lost or unhealthy; the allocation must "
        "be one of salloc or sbatch --no-kill",
    ),
    Option(
        "max_restarts",
        ("--max-restarts",),
        ("DYN_MPI_MAX_RESTARTS",),
        None,
        to_zero_or_count,
        "how often in an hour a worker that failed is started again while the others live, moves away from bad nodes not counted; mistakes "
        f"(64 to 66, 77, 78) never are. By default 0, with spare nodes {RESTARTS_WITH_SPARES}",
    ),
    Option(
        "start_timeout",
        ("--start-timeout",),
        ("DYN_MPI_START_TIMEOUT",),
        1800.0,
        to_seconds,
        "seconds until the services answer, an image's import included",
    ),
    Option(
        "stop_timeout",
        ("--stop-timeout",),
        ("DYN_MPI_STOP_TIMEOUT",),
        100.0,
        to_seconds,
        "seconds that a worker has to finish what is in flight, and to report itself if it can't; then its step is cancelled",
    ),
    Option(
        "skip_check",
        ("--skip-check",),
        ("DYN_MPI_SKIP_CHECK",),
        False,
        to_switch,
        "don't run `dynamo-mpi check` first (the ranks' preflight checks again)",
        switch=True,
    ),
    Option(
        "kv_check",
        ("--kv-check",),
        ("DYN_MPI_KV_CHECK",),
        "on",
        str,
        "have each decode node pull a pattern from each prefill node before the workers start: on refuses to start if a pair is cut, "
        "slow or gets wrong bytes, warn reports it, off leaves the check out",
        ("on", "warn", "off"),
    ),
)


def unknown(environ: Mapping[str, str]) -> list[str]:
    """Return a warning for each variable that isn't ours and looks like it."""
    names = {name for option in OPTIONS for name in option.variables if not name.startswith("DYN_")}
    return list(unknown_variables(environ, names).values())


@dataclass(frozen=True)
class LaunchSettings:
    """All settings of a deployment; see `OPTIONS` for what each means. ``worker_args`` go to every worker."""

    role: str
    launcher: str
    hostfile: Path | None
    image: str | None
    mounts: str | None
    model: str
    served_model_name: str | None
    modality: str | None
    stage_dir: Path | None
    cache_dir: Path | None
    agg_engine_config: str | None
    agg_nodes: int
    agg_workers: int
    prefill_engine_config: str | None
    prefill_nodes: int
    prefill_workers: int
    decode_engine_config: str | None
    decode_nodes: int
    decode_workers: int
    gpus_per_node: int
    run_dir: Path | None
    engine: str
    mpi: str
    srun_args: tuple[str, ...]
    mpirun: tuple[str, ...]
    python: str | None
    spare_nodes: int
    max_restarts: int
    start_timeout: float
    stop_timeout: float
    skip_check: bool
    kv_check: str
    worker_args: tuple[str, ...] = ()

    @property
    def worker_roles(self) -> tuple[str, ...]:
        """The workers' roles, in the order in which they get nodes."""
        return ("agg",) if self.role == "agg" else ("prefill", "decode")

    @property
    def no_kill(self) -> bool:
        """Whether a worker's step goes on without a node that is lost, and is then ended by `launch`: Slurm would end it late."""
        return self.spare_nodes > 0

    def of(self, role: str) -> tuple[str | None, int, int]:
        """Return the engine config, nodes of a worker, and number of workers of a role."""
        return tuple(getattr(self, f"{role}_{what}") for what in ("engine_config", "nodes", "workers"))


def read_settings(
    given: Mapping[str, str | None], worker_args: tuple[str, ...], environ: Mapping[str, str]
) -> LaunchSettings:
    """Find every setting, flags over environment over defaults.

    Raises:
        UsageError: a value is invalid, or a required setting is missing.
    """
    values, _ = resolve(OPTIONS, given, environ, {})
    if values["launcher"] == "auto":
        values["launcher"] = "mpirun" if values["hostfile"] is not None else "slurm"
    if values["max_restarts"] is None:
        values["max_restarts"] = RESTARTS_WITH_SPARES if values["spare_nodes"] else 0
    if values["model"] is None:
        raise UsageError("no model was given", expected="a model", fix="--model DIR, or MODEL_PATH=DIR")
    if values["launcher"] == "slurm" and values["hostfile"] is not None:
        raise UsageError(
            f"a hostfile is given, {values['hostfile']}, and the launcher is slurm, which takes the allocation's nodes",
            expected="one of both",
            fix="for Slurm, leave out --hostfile and unset HOSTFILE, --nodes selects nodes; for mpirun, --launcher mpirun",
        )
    settings = LaunchSettings(**values, worker_args=worker_args)
    for role in settings.worker_roles:
        if settings.of(role)[0] is None:
            flag = "" if role == "agg" else f"{role}-"
            raise UsageError(
                f"no engine config for the {role} worker was given",
                expected="TensorRT-LLM's YAML",
                fix=f"--{flag}engine-config FILE, or {flag.upper().replace('-', '_')}ENGINE_CONFIG=FILE",
            )
    if settings.launcher == "mpirun" and settings.image is not None:
        raise UsageError(
            "a container image was given for mpirun, which starts none",
            expected="ranks on bare metal, or all of it inside a container",
            fix="unset IMAGE, or launch with Slurm and Pyxis",
        )
    if settings.launcher == "mpirun" and settings.hostfile is None:
        raise UsageError(
            "mpirun needs to know the hosts",
            expected="a file with the hosts",
            fix="--hostfile FILE, one host on a line",
        )
    return settings
