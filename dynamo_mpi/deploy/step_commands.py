# SPDX-License-Identifier: Apache-2.0
"""The command lines of a deployment's steps, for any launcher: services, workers, check, KV check. Pure, but for `find_source`."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dynamo_mpi.common.credentials import SERVICES_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.deploy.nodes import Worker
    from dynamo_mpi.deploy.settings import LaunchSettings

# begins the name of each step that `launch` starts; other steps of a job are never ended by what a file or a record says
STEP_PREFIX = "dynmpi-"
SERVICES = "services.json"
# the folder, in that of the deployment, in which spares write what they have
SPARES = "spares"
# begins the name of the step that copies the model to a spare
COPY_STEP = "stage-"


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        name: the step's name in dynamo_mpi: ``services``, ``prefill-0``.
        step: the step's name in Slurm, unique in the job.
        lines: the command line, split into lines for the display; it contains no secret.
        environment: variables added to our own; they contain no secret, as a dry run shows them.
    """

    name: str
    step: str
    lines: tuple[tuple[str, ...], ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def words(self) -> tuple[str, ...]:
        """The command line."""
        return tuple(word for line in self.lines for word in line)

    def shown(self) -> str:
        """Return it in shell syntax, preceded by the variables."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " \\\n    ".join([*variables, *map(shlex.join, self.lines)])


class CommandBuilder(Protocol):
    """Builds the command of each step."""

    @property
    def checks_in_services(self) -> bool: ...
    def check(self) -> Command: ...
    def kv_check(self, workers: Sequence[Worker]) -> Command: ...
    def services(self) -> Command: ...
    def worker(self, worker: Worker) -> Command: ...
    def probe(self, node: str) -> Command | None: ...
    def prepare(self, node: str) -> Sequence[Command]: ...


# paths of the checkout and of the deployment's folder inside a container
CHECKOUT_INSIDE = "/dynamo_mpi"
RUN_DIR_INSIDE = "/dynamo_mpi_run"
_PACKAGE = Path(__file__).resolve().parents[1]
_MODULES = {
    "start_frontend_services.sh": ("-m", "dynamo_mpi.head_node"),
    "start_worker.sh": ("-m", "dynamo_mpi.worker"),
    "dynamo-mpi.sh": ("-m", "dynamo_mpi"),
    "check_kv.sh": ("-m", "dynamo_mpi.checks.kv"),
    "probe_node.sh": ("-m", "dynamo_mpi.checks.node_probe"),
}


@dataclass(frozen=True)
class CodeLocation:
    """The location of dynamo_mpi's code.

    Args:
        checkout: its folder on the host; None if the package is installed; then the image must have it too.
        inside: the path of that folder in the steps.
        python: the steps' interpreter.
    """

    checkout: Path | None
    inside: str
    python: str

    def entry(self, script: str) -> tuple[str, ...]:
        """Return the start of a command line: one of the checkout's scripts, or the module that it runs."""
        if self.checkout is None:
            return (self.python, *_MODULES[script])
        return (f"{self.inside}/scripts/{script}",)


def find_source(image: str | None, python: str | None) -> CodeLocation:
    """Find dynamo_mpi's code.

    Args:
        image: the container image of the steps, if any.
        python: the user's choice of interpreter.
    """
    interpreter = python or ("python3" if image is not None else sys.executable)
    checkout = _PACKAGE.parent
    if not (checkout / "scripts" / "start_worker.sh").is_file():
        return CodeLocation(None, "", interpreter)
    return CodeLocation(checkout, str(checkout) if image is None else CHECKOUT_INSIDE, interpreter)


def services_environment(run_dir: str) -> dict[str, str]:
    """Return the variable by which a worker's ranks find the services; their credentials are in no environment."""
    return {SERVICES_FILE: f"{run_dir}/{SERVICES}"}


def own_files(name: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return variables with file names of a worker's own, if all workers have the same ones: they would overwrite each other's. Pure."""
    files = {}
    if folder := environ.get("DYN_MPI_LOG_DIR"):
        files["DYN_MPI_LOG_DIR"] = f"{folder}/{name}"
    if metrics := environ.get("DYN_MPI_METRICS_FILE"):
        files["DYN_MPI_METRICS_FILE"] = f"{metrics.removesuffix('.prom')}-{name}.prom"
    return files


def worker_environment(settings: LaunchSettings) -> dict[str, str]:
    """Return the settings that all workers of a deployment share, as variables: a model's path is the same on all nodes."""
    shared = {
        "MODEL_PATH": settings.model,
        "SERVED_MODEL_NAME": settings.served_model_name,
        "MODALITY": settings.modality,
        "DYN_MPI_STAGE": None if settings.stage_dir is None else str(settings.stage_dir),
        "DYN_MPI_CACHE": None if settings.cache_dir is None else str(settings.cache_dir),
    }
    return {name: value for name, value in shared.items() if value is not None}


def services_words(source: CodeLocation, run_dir: str, check: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the command line of the services; ``check`` has flags of ``dynamo-mpi check``, which then runs first."""
    first = ("--check", shlex.join(check)) if check else ()
    return (*source.entry("start_frontend_services.sh"), "--run-dir", run_dir, *first)


def ready_file(run_dir: str, worker: Worker) -> str:
    """Return the path of a worker's ready file."""
    return f"{run_dir}/ready/{worker.name}.json"


def worker_words(settings: LaunchSettings, source: CodeLocation, worker: Worker, run_dir: str) -> tuple[str, ...]:
    """Return the command line of a worker's ranks."""
    return (*source.entry("start_worker.sh"), *worker_flags(settings, worker, run_dir))


def worker_flags(settings: LaunchSettings, worker: Worker, run_dir: str) -> tuple[str, ...]:
    """Return a worker's flags."""
    engine = () if settings.engine == "auto" else ("--engine", settings.engine)
    return (
        *("--role", worker.role, "--engine-config", worker.engine_config, *engine),
        *("--ready-file", ready_file(run_dir, worker)),
        *("--failure-dir", f"{run_dir}/failures/{worker.name}"),
        *("--timeline", f"{run_dir}/timeline/{worker.name}.html"),
        *settings.worker_args,
        *_own_failure_dir(worker.name, settings.worker_args),
    )


def _own_failure_dir(name: str, words: Sequence[str]) -> tuple[str, ...]:
    """Return the flag that makes the user's folder for failure files the worker's own: by them it is seen which worker has failed."""
    folders = [word.partition("=")[2] for word in words if word.startswith("--failure-dir=")]
    folders += [word for before, word in itertools.pairwise(words) if before == "--failure-dir"]
    return ("--failure-dir", f"{folders[-1]}/{name}") if folders else ()


def check_words(settings: LaunchSettings, source: CodeLocation) -> tuple[str, ...]:
    """Return the command line of ``dynamo-mpi check`` for the worker, or for the pair."""
    return (*source.entry("dynamo-mpi.sh"), "check", *check_flags(settings))


def check_flags(settings: LaunchSettings) -> tuple[str, ...]:
    """Return the check's flags."""
    words: list[str] = []
    for role in settings.worker_roles:
        flag = "" if role == "agg" else f"{role}-"
        config, nodes, _ = settings.of(role)
        words += [f"--{flag}engine-config", str(config), f"--{flag}nodes", str(nodes)]
    if settings.engine != "auto":
        words += ["--engine", settings.engine]
    return (*words, "--gpus-per-node", str(settings.gpus_per_node))


def probe_words(source: CodeLocation) -> tuple[str, ...]:
    """Return the command line of the probe of a node."""
    return source.entry("probe_node.sh")


def spare_words(settings: LaunchSettings, source: CodeLocation, run_dir: str, node: str) -> tuple[str, ...]:
    """Return the command line of the check of a spare; `worker_environment` has the model."""
    configs = dict.fromkeys(filter(None, (settings.of(role)[0] for role in settings.worker_roles)))
    files = [word for config in configs for word in ("--engine-config", config)]
    return (*probe_words(source), "--full", "--facts", f"{run_dir}/{SPARES}/{node}.json", *files)


def only_stage_words(source: CodeLocation) -> tuple[str, ...]:
    """Return the command line that copies the model to a node's disk; `worker_environment` has the model and the folder."""
    return (*source.entry("start_worker.sh"), "--only-stage")


KV_CHECK = "kv-check"
_ERROR = "error in kv check: "
# the beginnings of a report's lines after the first
_MORE = re.compile(r"  |(?:error|warning|info) T\d+: ")


def nodes_of(workers: Sequence[Worker], *roles: str) -> tuple[str, ...]:
    """Return the nodes of all workers of some roles, each once."""
    return tuple(dict.fromkeys(node for worker in workers if worker.role in roles for node in worker.nodes))


def needs_kv_check(settings: LaunchSettings, workers: Sequence[Worker]) -> bool:
    """Return whether the check runs: both roles have workers, on nodes of their own, and it isn't turned off."""
    prefill, decode = nodes_of(workers, "prefill"), nodes_of(workers, "decode")
    return settings.kv_check != "off" and bool(prefill and decode) and not set(prefill) & set(decode)


def kv_check_words(settings: LaunchSettings, source: CodeLocation, workers: Sequence[Worker]) -> tuple[str, ...]:
    """Return the command line of the check's ranks."""
    roles = ("--prefill", ",".join(nodes_of(workers, "prefill")), "--decode", ",".join(nodes_of(workers, "decode")))
    # the reference engine transfers KV only by TCP
    transport = ("--transport", "tcp") if settings.engine == "reference" else ()
    # the same interface as for the workers
    words = settings.worker_args
    network: tuple[str, ...] = ()
    for place, word in enumerate(words):
        if word == "--kv-network":
            network = tuple(words[place : place + 2])
        elif word.startswith("--kv-network="):
            network = (word,)
    return (*source.entry("check_kv.sh"), *roles, *transport, *network)


def report_of_kv_check(words: str) -> str:
    """Return the failure report of the check's rank 0, without srun's labels; empty if there is none."""
    label, report = "", list[str]()
    for line in words.splitlines():
        if _ERROR in line and not report:
            label = line[: line.index("dynamo_mpi: ")] if "dynamo_mpi: " in line else ""
            report.append(line.partition(_ERROR)[2])
        elif report and line.startswith(label) and _MORE.match(line[len(label) :]):
            report.append(line[len(label) :])
    return "\n".join(report)
