# SPDX-License-Identifier: Apache-2.0
"""`check` and `plan` as functions, for programs that write or judge recipes. ``dynamo-mpi check`` and ``plan`` are made of them.

    from dynamo_mpi.layout.format import counted
from dynamo_mpi.layout import Worker, check

    report = check("DeepSeek-R1/config.json", "decode.yaml", Worker(nodes=2, gpus_per_node=8, gpu="h200", role="decode"))
    for finding in report.findings: ...

A layout, key or value that TensorRT-LLM refuses is a finding, never an exception. What can't be judged at all raises one of these, all of
them `DynamoMpiError` with ``problem``, ``expected``, ``fix`` and ``exit_code``:

- `ModelNotFoundError` (66): there is no such model, or its config.json can't be read;
- `ConfigFileError` (65): config.json or the engine config is no JSON or YAML mapping, or one of its values has the wrong type;
- `UsageError` (64): an argument is wrong: an unknown role, kind of GPU or version; ranks that can't be spread over the nodes.

All results are frozen, with ``ok``, ``exit_code`` and, as the command line prints it, ``as_json()``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.config_reader import MAX_SIZE, read_small_text
from dynamo_mpi.common.errors import ConfigFileError, UsageError
from dynamo_mpi.common.frozen import dataclass, field
from dynamo_mpi.layout.engine_config import MAX_RANKS, TENSORRT, type_engine_config
from dynamo_mpi.layout.engine_layers import EngineLayers, MergedConfig, merge, with_balancer
from dynamo_mpi.layout.gpus import find_gpu
from dynamo_mpi.layout.layout import ROLES, Cluster, LayoutSpec, cluster_for
from dynamo_mpi.layout.model_files import ModelFiles, find_draft, find_model
from dynamo_mpi.layout.report import Report, check_worker
from dynamo_mpi.layout.staging_room import staging_room
from dynamo_mpi.layout.trtllm_version import installed_trtllm_version, parse_trtllm_version

if TYPE_CHECKING:
    from dynamo_mpi.common.errors import ExitCode
    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.planner import Plan
    from dynamo_mpi.layout.staging_room import StagingRoom
    from dynamo_mpi.layout.trtllm_version import TrtllmVersion

    Model = str | os.PathLike[str] | ModelFiles
    EngineInput = str | os.PathLike[str] | Mapping[str, Any] | EngineLayers | None

ENGINES = ("trtllm", "reference")
_DEFAULT_GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Worker:
    """What a worker is started with, beside its model and its engine config.

    Args:
        role: ``agg``, ``prefill``, ``decode`` or ``encode``.
        nodes: its nodes; None for as many as its ranks fill. `plan` derives them from the number of GPUs.
        gpus_per_node: GPUs of a node; None for ``gpus_per_node`` of the engine config, or for as many as the ranks need (8 for `plan`).
        gpu: kind of GPU, such as ``h200``: without it neither memory nor number formats are judged.
        trtllm_version: such as ``1.2.1``; None for the installed one, or the newest known one if none is installed.
        engine: ``trtllm`` or ``reference``.
        min_requests: requests of full length that should fit into the KV cache.
    """

    role: str = "agg"
    nodes: int | None = 1
    gpus_per_node: int | None = None
    gpu: str | None = None
    trtllm_version: str | None = None
    engine: str = "trtllm"
    min_requests: int = 1


_WORKER = Worker()


@dataclass(frozen=True)
class PlanReport:
    """The legal layouts of a model on some GPUs.

    Args:
        model: the model's name.
        path: the model, as ``--model`` takes it.
        subject: the requested worker.
        layouts: the layouts, best first; empty if there is none.
        findings: what no layout can solve: keys, number formats, limits.
        staging: the room that a staged copy of the model takes on each node; None if it isn't known.
    """

    model: str
    path: str
    subject: LayoutSpec
    layouts: tuple[Plan, ...]
    findings: tuple[Finding, ...] = field(default=())
    staging: StagingRoom | None = None

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of ``dynamo-mpi plan``: of the findings; 78 if there is no layout, or if none fits."""
        from dynamo_mpi.common.errors import ExitCode
        from dynamo_mpi.layout.report import exit_code_of

        code = exit_code_of(self.findings)
        nothing_fits = all(made.memory is not None and not made.memory.weights_fit for made in self.layouts)
        return ExitCode.ILLEGAL_LAYOUT if code is ExitCode.OK and nothing_fits else code

    @property
    def ok(self) -> bool:
        """Whether there is a layout that fits, and no error."""
        return self.exit_code == 0

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data, in the stable format for scripts."""
        subject, cluster = self.subject, self.subject.cluster
        return {
            "model": self.model,
            "architecture": subject.shape.name,
            "role": subject.role,
            "gpus": cluster.world_size,
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.gpus_per_node,
            "gpu": cluster.gpu,
            "trtllm_version": None if subject.version is None else str(subject.version),
            "findings": [finding.as_json() for finding in self.findings],
            "staging": self.staging.as_json() if self.staging is not None else {},
            "layouts": [made.as_json(self.model, self.path) for made in self.layouts],
        }

    def workable_sizes(self) -> list[int]:
        """Return the next smaller numbers of GPUs that a legal layout uses to the full."""
        from dynamo_mpi.layout.planner import workable_sizes

        return workable_sizes(self.subject)


def check(model: Model, engine_config: EngineInput = None, worker: Worker = _WORKER) -> Report:
    """Apply all rules to one worker.

    Args:
        model: model folder, its config.json, a hub id that is in the cache, or what `find_model` returned, to read it once for many checks.
        engine_config: path of TensorRT-LLM's YAML, the same as a mapping, or `EngineLayers` with Dynamo's flags and overrides.
        worker: what else it is started with.

    Raises:
        ModelNotFoundError: see the module.
        ConfigFileError: likewise.
        UsageError: likewise.
    """
    files, merged = _read(model, engine_config, worker)
    subject = _spec(files, merged, worker, _cluster(merged, worker))
    return check_worker(subject, merged.findings, staging=staging_room(files.config, subject.shape))


def plan(model: Model, gpus: int, engine_config: EngineInput = None, worker: Worker = _WORKER) -> PlanReport:
    """Find all legal layouts of a worker on ``gpus`` GPUs, best first.

    Args:
        model: as for `check`.
        gpus: GPUs of the worker, all nodes together.
        engine_config: as for `check`; its sizes are replaced, all else is kept.
        worker: what else it is started with.

    Raises:
        ModelNotFoundError: see the module.
        ConfigFileError: likewise.
        UsageError: likewise, or the GPUs aren't a whole number of nodes.
    """
    # imported here: `check` needs the planner only for errors
    from dynamo_mpi.layout.engine_yaml import for_role
    from dynamo_mpi.layout.planner import plan as find_layouts
    from dynamo_mpi.layout.rules.registry import config_findings

    files, merged = _read(model, engine_config, worker)
    _check_size("gpus", gpus, MAX_RANKS)
    per_node = worker.gpus_per_node or _DEFAULT_GPUS_PER_NODE
    cluster = cluster_for(gpus, per_node, _gpu(worker))
    if cluster is None:
        raise UsageError(
            f"{gpus} GPUs are not a whole number of nodes with {per_node} each",
            expected="equally many GPUs on each node",
            fix=f"--gpus {gpus // per_node * per_node}, or another --gpus-per-node",
        )
    if merged.config.backend == TENSORRT and worker.engine == "trtllm":
        raise UsageError(
            "layouts of the TensorRT engine backend can't be planned: they are those of its engine files",
            expected="backend pytorch, the default, or _autodeploy",
            fix="leave backend out of the engine config",
        )
    merged = MergedConfig(for_role(merged.config, worker.role), merged.findings)
    subject = _spec(files, merged, worker, cluster)
    path = files.config if isinstance(model, ModelFiles) else os.fspath(model)
    return PlanReport(
        files.name,
        path,
        subject,
        tuple(find_layouts(subject)),
        (*merged.findings, *config_findings(subject)),
        staging_room(files.config, subject.shape),
    )


def _read(model: Model, engine_config: EngineInput, worker: Worker) -> tuple[ModelFiles, MergedConfig]:
    _check_worker(worker)
    files = model if isinstance(model, ModelFiles) else find_model(os.fspath(model))
    merged = _merge(engine_config)
    balancer = merged.config.moe.balancer_path
    if balancer is not None:
        with contextlib.suppress(OSError, ValueError):  # D4 reports it; ValueError: a NUL in the path
            merged = with_balancer(merged, read_small_text(balancer))
    return files, merged


def _merge(engine_config: EngineInput) -> MergedConfig:
    if engine_config is None:
        return merge(EngineLayers())
    if isinstance(engine_config, EngineLayers):
        return merge(engine_config)
    if isinstance(engine_config, Mapping):
        return MergedConfig(type_engine_config(_plain(engine_config), "the engine config"))
    return merge(EngineLayers(yaml_text=read_engine_config(engine_config), yaml_path=os.fspath(engine_config)))


def _plain(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy that a YAML file could hold: a value that contains itself would have no end."""
    import json

    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(keys), default=_plain_value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigFileError(
            f"the engine config holds what YAML can't: {error}",
            expected="keys and plain values",
            fix="pass a mapping as yaml.safe_load returns it, or the path of the file",
        ) from None
    return copy


def _plain_value(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"a value of type {type(value).__name__}")


def read_engine_config(path: str | os.PathLike[str]) -> str:
    """Return the text of an engine config.

    Raises:
        ConfigFileError: it can't be read.
    """
    try:
        return read_small_text(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigFileError(
            f"the engine config {os.fspath(path)} can't be read: {reason}",
            expected="a YAML file",
            fix="check the path and its rights",
        ) from None


def _spec(files: ModelFiles, merged: MergedConfig, worker: Worker, cluster: Cluster) -> LayoutSpec:
    version = version_of(worker)
    return LayoutSpec(
        files.shape(),
        merged.config,
        cluster,
        worker.role,
        version,
        worker.engine,
        worker.min_requests,
        draft=find_draft(merged.config, files.config),
    )


def version_of(worker: Worker) -> TrtllmVersion | None:
    """Return the version of TensorRT-LLM by which a worker is judged; None for the newest known one.

    Raises:
        UsageError: the given version is invalid.
    """
    named = worker.trtllm_version
    return installed_trtllm_version() if named is None else parse_trtllm_version(named)


def _cluster(merged: MergedConfig, worker: Worker) -> Cluster:
    """Return the worker's GPUs; without a number of them, as many as the layout needs."""
    config = merged.config
    gpus, world_size = worker.gpus_per_node or config.gpus_per_node, config.world_size
    nodes = worker.nodes or -(-world_size // (gpus or world_size))
    if gpus is None:
        if world_size % nodes:
            raise UsageError(
                f"{world_size} ranks can't be spread evenly over {nodes} nodes",
                expected="the number of GPUs of a node",
                fix="--gpus-per-node G",
            )
        gpus = world_size // nodes
    return Cluster(nodes, gpus, _gpu(worker))


def _gpu(worker: Worker) -> str | None:
    return None if worker.gpu is None else find_gpu(worker.gpu).name


def _check_worker(worker: Worker) -> None:
    for name, value, known in (("role", worker.role, ROLES), ("engine", worker.engine, ENGINES)):
        if value not in known:
            raise UsageError(
                f"no {name} is called {value!r}",
                expected=f"one of {', '.join(known)}",
                fix=f"leave the {name} out for {known[0]}, or give another one",
            )
    if worker.role == "encode" and worker.engine == "reference":
        raise UsageError(
            "the reference engine doesn't encode images: the role is 'encode'",
            expected="the role agg, prefill or decode",
            fix="--role agg, or --engine trtllm",
        )
    _check_size("nodes", 1 if worker.nodes is None else worker.nodes, MAX_RANKS)
    _check_size("gpus_per_node", 1 if worker.gpus_per_node is None else worker.gpus_per_node, MAX_RANKS)
    _check_size("min_requests", worker.min_requests, MAX_SIZE)


def _check_size(name: str, value: object, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise UsageError(
            f"{name} is {value!r}",
            expected=f"a positive whole number, at most {most}",
            fix=f"give {name} as such a number",
        )
