# SPDX-License-Identifier: Apache-2.0
"""Rank 0's side of the preflight: read the files, apply the rules to all ranks' reports, decide whether to go on."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from dynamo_mpi.checks.hardware import memory_is_awaited
from dynamo_mpi.checks.rank_report import ComparedFile, RankReport, ReportRequest, weight_files
from dynamo_mpi.checks.rank_rules import check_ranks
from dynamo_mpi.common.config_reader import read_small_text
from dynamo_mpi.common.errors import ConfigFileError, ExitCode, ModelNotFoundError
from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.engine_config import EngineConfig
from dynamo_mpi.layout.engine_layers import EngineLayers, MergedConfig, merge, with_balancer
from dynamo_mpi.layout.finding import Finding, Severity, errors, render
from dynamo_mpi.layout.layout import Cluster, LayoutSpec, short_name
from dynamo_mpi.layout.model_config import parse_model_shape
from dynamo_mpi.layout.model_files import find_draft
from dynamo_mpi.layout.model_shape import ModelShape
from dynamo_mpi.layout.report import check_worker, exit_code_of
from dynamo_mpi.layout.trtllm_version import TrtllmVersion, installed_trtllm_version, parse_trtllm_version
from dynamo_mpi.mpi.placement import hosts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.checks.binding import RankBinding
    from dynamo_mpi.checks.rank_facts import RankFacts
    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.layout.memory import MemoryEstimate

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model")


def check_frontend_can_load(folder: Path, config_text: str) -> None:
    """Reject a model folder that a worker could load but the frontend could not serve.

    The frontend reads config.json and the tokenizer itself; if it can't, the worker is registered but its model never appears, and only the
    frontend's log has the reason.

    Args:
        folder: the model folder.
        config_text: its config.json, a JSON object.

    Raises:
        ModelNotFoundError: it holds no tokenizer.
        ConfigFileError: its config.json names no architecture.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelNotFoundError(
            f"the model folder {folder} holds no tokenizer: the frontend could not serve this model",
            expected=f"one of {', '.join(TOKENIZER_FILES)} beside config.json",
            fix="copy the tokenizer's files from where the model comes from",
        )
    architectures = json.loads(config_text).get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ConfigFileError(
            f"{folder / 'config.json'} names no architectures: the frontend could not serve this model",
            expected='the model\'s own config.json, with "architectures": ["..."]',
            fix="copy config.json from where the model comes from",
        )


# exit codes of rules that aren't about the layout itself; problems of hosts and GPUs need another launch
_EXIT_CODES = {
    "A1": ExitCode.USAGE,
    "A11": ExitCode.USAGE,
    **dict.fromkeys(("D10", "G6", "K1", "K9", "V1", "V2", "V8"), ExitCode.USAGE),
    "P1": ExitCode.USAGE,
    "P2": ExitCode.DATA,
    "P3": ExitCode.NO_MODEL,
    "P4": ExitCode.USAGE,
}
# these rules assume a correct placement of the ranks
_PLACEMENT_RULES = ("A10", "A14")
# of the ranks' rules, those that say what the engine needs
_ENGINE_RULES = ("A11",)


@dataclass(frozen=True)
class PreflightInputs:
    """Rank 0's inputs, read before it asks the other ranks.

    Args:
        shape: the model's shape.
        merged: the engine config, with all layers merged.
        role: the worker's role.
        engine: the engine that runs the model.
        version: TensorRT-LLM's version; None for the newest known one.
        gpu: kind of GPU; None if it wasn't given.
        min_requests: requests of full length that should fit into the KV cache.
        report_request: the request to every rank.
        memory_later: whether the GPU check will evaluate the GPUs' free memory.
        draft: the draft model's shape; None without one, or where it can't be read.
        bind: whether ranks are bound to their GPUs' CPUs.
    """

    shape: ModelShape
    merged: MergedConfig
    role: str
    engine: str
    version: TrtllmVersion | None
    gpu: str | None
    min_requests: int
    report_request: ReportRequest
    memory_later: bool = False
    draft: ModelShape | None = None
    bind: bool = True

    @property
    def config(self) -> EngineConfig:
        """The config that the engine gets."""
        return self.merged.config


@dataclass(frozen=True)
class PreflightResult:
    """The preflight's result.

    Args:
        exit_code: OK to go on, otherwise every rank's exit code.
        report: for the user; one line if there is no problem.
        findings: the rules' findings.
        subject: the worker that was checked.
        weights: bytes of each rank's weights; empty if they aren't known.
        bindings: each rank's CPUs; empty if the ranks report none.
    """

    exit_code: ExitCode
    report: str
    findings: tuple[Finding, ...]
    subject: LayoutSpec
    weights: tuple[int, ...] = ()
    bindings: tuple[RankBinding, ...] = ()


def load_inputs(settings: Settings, argv: Sequence[str]) -> PreflightInputs:
    """Read the model's config and the engine config.

    Raises:
        ModelNotFoundError: the model folder or its config.json can't be read.
        ConfigFileError: one of the files is invalid.
        UsageError: the version of TensorRT-LLM is invalid, or both kinds of overrides were given.
    """
    folder = settings.model
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise ModelNotFoundError(
            f"the model folder {folder} can't be read: {error.strerror}",
            expected="a folder with config.json, the tokenizer's files and the weights, on every node",
            fix="check --model / MODEL_PATH, and that the container mounts it",
        ) from None
    files = [_watch("model config", folder / "config.json", ModelNotFoundError)]
    quant_text = None
    if "hf_quant_config.json" in names:
        files.append(_watch("model config", folder / "hf_quant_config.json", ModelNotFoundError))
        quant_text = files[-1].content
    yaml_text = None
    if settings.engine_config is not None:
        files.append(_watch("engine config", settings.engine_config, ConfigFileError))
        yaml_text = files[-1].content
    merged = merge(
        EngineLayers(
            settings.engine_flags,
            yaml_text,
            str(settings.engine_config),
            settings.override_engine_args or "",
            settings.dynamic_flags,
        )
    )
    balancer = merged.config.moe.balancer_path
    if balancer is not None:
        # rank 0 only: the leader builds the engine's arguments. D4 reports a file that can't be read; ValueError: a NUL in the path
        with contextlib.suppress(OSError, ValueError):
            merged = with_balancer(merged, read_small_text(Path(balancer)))
    for_trtllm = settings.engine == "trtllm"
    return PreflightInputs(
        shape=parse_model_shape(files[0].content, files[0].path, quant_text),
        merged=merged,
        role=settings.role,
        engine=settings.engine,
        version=parse_trtllm_version(settings.trtllm_version)
        if settings.trtllm_version
        else installed_trtllm_version(),
        gpu=settings.gpu,
        min_requests=settings.min_requests,
        report_request=ReportRequest(
            tuple(argv),
            str(folder),
            weight_files(names),
            tuple(files),
            hosts=for_trtllm,
            gpus=for_trtllm and not settings.allow_no_gpu,
        ),
        memory_later=for_trtllm and memory_is_awaited(settings),
        draft=find_draft(merged.config, str(folder / "config.json")),
        bind=settings.cpu_bind == "auto",
    )


def _watch(label: str, path: Path, error_type: type[ModelNotFoundError] | type[ConfigFileError]) -> ComparedFile:
    try:
        return ComparedFile(label, str(path), read_small_text(path))
    except OSError as error:
        raise error_type(
            f"the {label} {path} can't be read: {error.strerror}", fix="check the path and its rights"
        ) from None


def refusal_of_ranks(reports: Sequence[RankReport]) -> tuple[ExitCode, str]:
    """Return why the ranks can't work together, whatever the engine: exit code and report; OK if they can. Pure."""
    findings = [finding for finding in check_ranks(reports) if finding.rule not in _ENGINE_RULES]
    return exit_code_of(findings, _EXIT_CODES), render(findings)


def evaluate(plan: PreflightInputs, reports: Sequence[RankReport]) -> PreflightResult:
    """Apply all rules to the ranks' reports. Pure."""
    rank_findings = check_ranks(reports)
    nodes = hosts(reports)
    scattered = any(finding.rule == "A11" for finding in rank_findings)
    # facts from ranks of another version can't be read
    rows = (
        _rows(reports)
        if plan.report_request.hosts and not any(finding.rule == "P4" for finding in rank_findings)
        else []
    )
    gpu = plan.gpu or _kind(rows)
    cluster = Cluster(1, len(reports), gpu) if scattered else Cluster(len(nodes), len(reports) // len(nodes), gpu)
    subject = LayoutSpec(
        plan.shape,
        plan.config,
        cluster,
        plan.role,
        plan.version,
        plan.engine,
        plan.min_requests,
        launched=True,
        draft=plan.draft,
    )
    checked = check_worker(subject, plan.merged.findings)
    ours = [finding for finding in checked.findings if not (scattered and finding.rule in _PLACEMENT_RULES)]
    bindings, unlike = _bindings(plan, rows)
    findings = [*rank_findings, *ours, *_host_findings(plan, rows, checked.memory), *unlike]
    details = render([finding for finding in findings if finding.severity is not Severity.INFO])
    if stopping := errors(findings):
        count = "1 error" if len(stopping) == 1 else f"{len(stopping)} errors"
        report = f"preflight: {count}, nothing was loaded\n{details}"
        if checked.nearest:
            works = ", ".join(f"{short_name(other)} on {other.cluster}" for other in checked.nearest)
            report += f"\nwould work: {works}"
        return PreflightResult(exit_code_of(findings, _EXIT_CODES), report, tuple(findings), subject)
    where = nodes[0] if len(nodes) == 1 else f"{len(nodes)} nodes ({nodes[0]} … {nodes[-1]})"
    ranks = f"{len(reports)} rank{'' if len(reports) == 1 else 's'}"
    report = f"preflight: ok: {plan.shape.name}, {subject.layout}, {ranks} on {where}" + (f", {gpu}" if gpu else "")
    text = report + (f"\n{details}" if details else "")
    return PreflightResult(ExitCode.OK, text, tuple(findings), subject, _weights(plan, checked.memory), bindings)


# The reference engine has no requirements of hosts and GPUs, so its start need not import these modules.


def _rows(reports: Sequence[RankReport]) -> list[RankFacts]:
    from dynamo_mpi.checks.rank_facts import rows_of

    return rows_of(reports)


def _kind(rows: Sequence[RankFacts]) -> str | None:
    if not rows:
        return None
    from dynamo_mpi.checks.gpu_rules import kind_in

    return kind_in(rows)


def _host_findings(plan: PreflightInputs, rows: Sequence[RankFacts], memory: MemoryEstimate | None) -> list[Finding]:
    if not rows:
        return []
    from dynamo_mpi.checks.host_rules import check_hosts
    from dynamo_mpi.checks.rank_facts import Requirements

    needs = Requirements(_weights(plan, memory), not plan.report_request.gpus, plan.memory_later)
    return check_hosts(rows, needs)


def _bindings(plan: PreflightInputs, rows: Sequence[RankFacts]) -> tuple[tuple[RankBinding, ...], list[Finding]]:
    if not rows:
        return (), []
    from dynamo_mpi.checks.binding import check_binding, decide

    bindings = decide(rows, bind=plan.bind)
    return bindings, list(check_binding(rows, bindings))


def _weights(plan: PreflightInputs, memory: MemoryEstimate | None) -> tuple[int, ...]:
    if not plan.report_request.gpus:
        return ()
    from dynamo_mpi.checks.host_rules import weights_by_rank

    return weights_by_rank(memory)
