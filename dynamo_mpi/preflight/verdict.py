# SPDX-License-Identifier: Apache-2.0
"""Rank 0's side of the preflight: read the files, ask the world, apply the rules, say whether to go on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_mpi.errors import DataError, ModelError
from dynamo_mpi.exit_codes import ExitCode
from dynamo_mpi.parallelism.engine_config import EngineConfig, parse_engine_config
from dynamo_mpi.parallelism.finding import Finding, errors, render
from dynamo_mpi.parallelism.model_shape import ModelShape, parse_model_shape
from dynamo_mpi.parallelism.rules import check_layout
from dynamo_mpi.preflight.inquiry import Card, Inquiry, WatchedFile, weight_files
from dynamo_mpi.preflight.roster import check_roster, hosts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dynamo_mpi.settings import Settings

# by rule; the first error decides, and every other rule is about the layout
_EXIT_CODES = {
    "A1": ExitCode.USAGE,
    "A11": ExitCode.USAGE,
    "P1": ExitCode.USAGE,
    "P2": ExitCode.DATA,
    "P3": ExitCode.NO_MODEL,
    "P4": ExitCode.USAGE,
}


@dataclass(frozen=True)
class Plan:
    """What rank 0 read before it asked the others.

    Args:
        shape: the model's shape.
        config: the engine config, flags laid over it.
        inquiry: what every rank is asked.
    """

    shape: ModelShape
    config: EngineConfig
    inquiry: Inquiry


@dataclass(frozen=True)
class Verdict:
    """What the preflight decided.

    Args:
        exit_code: OK to go on, else what every rank leaves with.
        report: for the user; one line when all is well.
        findings: what it rests on.
    """

    exit_code: ExitCode
    report: str
    findings: tuple[Finding, ...]


def read_plan(settings: Settings, argv: Sequence[str]) -> Plan:
    """Read the model's config and the engine config.

    Raises:
        ModelError: the model folder or its config.json can't be read.
        DataError: one of the files isn't what it should be.
    """
    folder = settings.model
    try:
        weights = weight_files(os.listdir(folder))
    except OSError as error:
        raise ModelError(
            f"the model folder {folder} can't be read: {error.strerror}",
            needed="a folder with config.json, the tokenizer's files and the weights, on every node",
            fix="check --model / MODEL_PATH, and that the container mounts it",
        ) from None
    files = [_watch("model config", folder / "config.json", ModelError)]
    if settings.engine_config is not None:
        files.append(_watch("engine config", settings.engine_config, DataError))
    engine_text = files[1].content if len(files) > 1 else ""
    return Plan(
        shape=parse_model_shape(files[0].content, files[0].path),
        config=parse_engine_config(engine_text, str(settings.engine_config), settings.size_flags),
        inquiry=Inquiry(tuple(argv), str(folder), weights, tuple(files)),
    )


def _watch(label: str, path: Path, error_type: type[ModelError] | type[DataError]) -> WatchedFile:
    try:
        return WatchedFile(label, str(path), path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise error_type(
            f"the {label} {path} can't be read: {error.strerror}", fix="check the path and its rights"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"the {label} {path} is not text: {error.reason} at byte {error.start}") from None


def judge(plan: Plan, cards: Sequence[Card]) -> Verdict:
    """Apply all rules to what the world answered. Pure."""
    findings = [*check_roster(cards), *check_layout(plan.shape, plan.config, len(cards))]
    stopping = errors(findings)
    if stopping:
        count = "1 error" if len(stopping) == 1 else f"{len(stopping)} errors"
        report = f"preflight: {count}, nothing was loaded\n{render(findings)}"
        return Verdict(_EXIT_CODES.get(stopping[0].rule, ExitCode.ILLEGAL_LAYOUT), report, tuple(findings))
    nodes = hosts(cards)
    where = nodes[0] if len(nodes) == 1 else f"{len(nodes)} nodes ({nodes[0]} … {nodes[-1]})"
    config = plan.config
    layout = f"tp {config.tp_size}" + "".join(
        f" x {name} {size}" for name, size in (("pp", config.pp_size), ("cp", config.cp_size)) if size > 1
    )
    report = f"preflight: ok: {plan.shape.name}, {layout}, {len(cards)} rank{'' if len(cards) == 1 else 's'} on {where}"
    if findings:
        report += "\n" + render(findings)
    return Verdict(ExitCode.OK, report, tuple(findings))
