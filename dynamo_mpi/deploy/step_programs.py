# SPDX-License-Identifier: Apache-2.0
"""The command lines that a deployment's steps run, for any launcher."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo_mpi.deploy.code_location import CodeLocation
    from dynamo_mpi.deploy.deployment import Worker
    from dynamo_mpi.deploy.settings import LaunchSettings


def worker_environment(settings: LaunchSettings) -> dict[str, str]:
    """Return the settings that all workers of a deployment share, as variables: a model's path is the same on all nodes."""
    shared = {"MODEL_PATH": settings.model, "SERVED_MODEL_NAME": settings.served_model_name}
    return {name: value for name, value in shared.items() if value is not None}


def services_words(source: CodeLocation, run_dir: str) -> tuple[str, ...]:
    """Return the command line of the services."""
    return (*source.entry("start_frontend_services.sh"), "--run-dir", run_dir)


def ready_file(run_dir: str, worker: Worker) -> str:
    """Return the path of a worker's ready file."""
    return f"{run_dir}/ready/{worker.name}.json"


def worker_words(settings: LaunchSettings, source: CodeLocation, worker: Worker, run_dir: str) -> tuple[str, ...]:
    """Return the command line of a worker's ranks."""
    engine = () if settings.engine == "auto" else ("--engine", settings.engine)
    return (
        *source.entry("start_worker.sh"),
        *("--role", worker.role, "--engine-config", worker.engine_config, *engine),
        *(
            "--ready-file",
            ready_file(run_dir, worker),
            "--failure-dir",
            f"{run_dir}/failures/{worker.name}",
            "--timeline",
            f"{run_dir}/timeline/{worker.name}.html",
            *settings.worker_args,
        ),
    )


def check_words(settings: LaunchSettings, source: CodeLocation) -> tuple[str, ...]:
    """Return the command line of ``dynamo-mpi check`` for the worker, or for the pair."""
    words = [*source.entry("dynamo-mpi.sh"), "check"]
    for role in settings.worker_roles:
        flag = "" if role == "agg" else f"{role}-"
        config, nodes, _ = settings.of(role)
        words += [f"--{flag}engine-config", str(config), f"--{flag}nodes", str(nodes)]
    if settings.engine != "auto":
        words += ["--engine", settings.engine]
    return (*words, "--gpus-per-node", str(settings.gpus_per_node))
