# SPDX-License-Identifier: Apache-2.0
"""What `launch` refuses before anything starts: flags that the workers would refuse, folders for staging and caches that are none, and an
mpirun that doesn't run as root. And what a dry run refuses beside, as the deployment would: engine configs that can't be read, and, where the
model is here too, what `check` refuses.

Paths are those of the steps. Without an image they are this machine's; with one, those below a mount whose source is here can be looked at.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.display import shell_word
from dynamo_mpi.common.errors import ConfigFileError, ModelNotFoundError, UsageError
from dynamo_mpi.config.flags import DYNAMO
from dynamo_mpi.config.sources import WorkerSources
from dynamo_mpi.config.worker import load_settings, unknown_flags
from dynamo_mpi.deploy.settings import OPTIONS
from dynamo_mpi.deploy.step_commands import check_flags, worker_environment, worker_flags
from dynamo_mpi.layout.engine_layers import EngineLayers, merge
from dynamo_mpi.layout.library import read_engine_config
from dynamo_mpi.layout.model_files import find_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.deploy.nodes import Placement
    from dynamo_mpi.deploy.settings import LaunchSettings


_AS_ROOT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
_MPIRUN_SECONDS = 30.0


class Refusal(NamedTuple):
    """What `check` refuses.

    Args:
        code: its exit code.
        report: its report.
    """

    code: int
    report: str


def check_worker_flags(
    settings: LaunchSettings, placement: Placement, mounts: Sequence[str] | None, environ: Mapping[str, str]
) -> list[str]:
    """Read each role's flags and variables as its ranks will, for which they need no GPU and no package; return warnings.

    Args:
        settings: the deployment's.
        placement: its workers.
        mounts: ``HOST:CONTAINER[:FLAGS]`` of the steps' image; None without an image.
        environ: this process's environment.

    Raises:
        UsageError: a worker would refuse one.
        ConfigFileError: a worker could not use its settings file.
    """
    # an image, or another Python, may have TensorRT-LLM, which takes flags that aren't known here
    auto_engine = "trtllm" if mounts is not None or settings.python is not None else ""
    warnings: dict[str, None] = {}
    for worker in {worker.role: worker for worker in placement.workers}.values():
        words = worker_flags(settings, worker, "/run")
        sources = WorkerSources(words, {**environ, **worker_environment(settings)})
        if sources.file_name:
            path = _here(sources.file_name, mounts)
            if path is None or not os.path.exists(path):
                return []  # it may say which engine runs, and thus which flags there are
            sources = WorkerSources([*words, "--settings", path], sources.environ)
        try:
            loaded = load_settings(sources, auto_engine)
            _refuse_own(loaded.passed_on)
            warnings |= dict.fromkeys(unknown_flags(loaded.passed_on))
            if loaded.role != worker.role:
                raise UsageError(
                    f"--role is {loaded.role!r} behind --",
                    expected="no role among the workers' flags: launch gives each worker its own",
                    fix="leave it out there; launch --role agg for workers of one kind",
                )
        except (ConfigFileError, UsageError) as error:
            problem = f"each {worker.role} worker would be refused: {error.problem}"
            raise type(error)(problem, expected=error.expected, fix=error.fix) from None
    return list(warnings)


def _refuse_own(passed_on: Sequence[str]) -> None:
    own = {flag for option in OPTIONS for flag in option.flags} - DYNAMO
    for name in (word.partition("=")[0] for word in passed_on):
        if name in own:
            raise UsageError(
                f"{name} is a flag of launch, and is behind --",
                expected="the workers' flags behind --",
                fix=f"{name} before --",
            )


def check_folders(settings: LaunchSettings, *, in_job: bool) -> None:
    """Look at the folders for staging and caches, as far as they are here.

    Args:
        settings: the deployment's.
        in_job: whether this is an allocation, which has the cluster's file systems.

    Raises:
        UsageError: one is no folder; or the shared one, which an image's steps mount, isn't there.
    """
    for name, folder in (
        ("--stage-dir (STAGE_DIR)", settings.stage_dir),
        ("--cache-dir (CACHE_DIR)", settings.cache_dir),
    ):
        if folder is not None and os.path.exists(folder) and not os.path.isdir(folder):
            raise UsageError(f"{name} is {folder}: no folder", expected="a folder", fix=f"correct {name}")
    cache = settings.cache_dir
    # each node has its own folder for staging; and where the one above is missing, so is the file system
    if settings.image and in_job and cache is not None and os.path.isdir(cache.parent) and not os.path.exists(cache):
        raise UsageError(
            f"--cache-dir (CACHE_DIR) is {cache}, which isn't there, so the image's steps can't mount it",
            expected="a folder on a file system that all nodes share",
            fix=f"mkdir {shell_word(cache)}",
        )


def check_root(mpirun: Sequence[str], environ: Mapping[str, str]) -> None:
    """Have mpirun start a program, if this is root and it may refuse: Open MPI does, unless it is allowed in one of several ways.

    Args:
        mpirun: its words.
        environ: its environment.

    Raises:
        UsageError: it refuses.
    """
    if os.geteuid() != 0 or all(environ.get(name) == "1" for name in _AS_ROOT) or "--allow-run-as-root" in mpirun:
        return
    try:
        command = [*mpirun, "-n", "1", "true"]
        done = subprocess.run(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_MPIRUN_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return  # for other reasons, which its first step shows
    if "attempt to run as root" in done.stdout + done.stderr:
        raise UsageError(
            f"{shlex.join(mpirun)} refuses to run as root",
            expected="a user other than root; or, as in a container, both variables with which Open MPI allows it",
            fix=f"export {' '.join(f'{name}=1' for name in _AS_ROOT)}",
        )


def check_inputs(settings: LaunchSettings, mounts: Sequence[str] | None, environ: Mapping[str, str]) -> Refusal | None:
    """Look at the engine configs and the model, as far as they are here; return what the deployment would be refused for.

    Args:
        settings: the deployment's.
        mounts: ``HOST:CONTAINER[:FLAGS]`` of the steps' image; None without an image.
        environ: this process's environment.

    Raises:
        ConfigFileError: an engine config can't be read, or is no YAML.
    """
    if settings.skip_check:
        return None
    found: dict[str, Any] = {}
    for role in settings.worker_roles:
        if (path := _here(settings.of(role)[0] or "", mounts)) is not None:
            merge(EngineLayers(yaml_text=read_engine_config(path), yaml_path=path))
            found[f"{role}_engine_config"] = path
    model = _model_here(settings.model, mounts, environ)
    if model is None or len(found) < len(settings.worker_roles):
        return None
    local = replace(settings, model=model, **found)
    done = subprocess.run(
        [sys.executable, "-m", "dynamo_mpi", "check", *check_flags(local)],
        env={**environ, **worker_environment(local)},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    return Refusal(done.returncode, f"{done.stdout}{done.stderr}".strip()) if done.returncode else None


def _here(path: str, mounts: Sequence[str] | None) -> str | None:
    """Return a step's path as this machine has it; None if that isn't known, or what holds it isn't here."""
    if mounts is None:
        return path
    best: tuple[str, str] | None = None
    for mount in ",".join(mounts).split(","):
        source, _, rest = mount.partition(":")
        target = (rest.partition(":")[0] or source).rstrip("/")
        if (path == target or path.startswith(f"{target}/")) and (best is None or len(target) > len(best[1])):
            best = source, target
    if best is None or not os.path.exists(best[0]):
        return None
    return best[0] + path[len(best[1]) :]


def _model_here(model: str, mounts: Sequence[str] | None, environ: Mapping[str, str]) -> str | None:
    """Return the model as `check` finds it here; None if it doesn't."""
    path = _here(model, mounts) if model.startswith("/") else model
    if path is None:
        return None
    try:
        find_model(path, environ)
    except ModelNotFoundError:
        return None
    return path
