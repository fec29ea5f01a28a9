# SPDX-License-Identifier: Apache-2.0
"""All rules, in the order of their findings in a report: a user reads the first error first."""

from __future__ import annotations

from dynamo_mpi.common.frozen import replace
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.key_rules import check_keys
from dynamo_mpi.layout.rules import (
    architecture,
    attention,
    attention_dp,
    backends,
    capacity,
    dense,
    experts,
    limits,
    mapping,
    other_backends,
    pipeline,
    reference_engine,
    roles,
)
from dynamo_mpi.layout.value_rules import check_values

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.layout import LayoutSpec, Rule

LAYOUT_RULES: tuple[Rule, ...] = (
    *mapping.RULES,
    *attention.RULES,
    *attention_dp.RULES,
    *experts.RULES,
    *dense.RULES,
    *pipeline.RULES,
    *reference_engine.RULES,
)
CONFIG_RULES: tuple[Rule, ...] = (*backends.RULES, *architecture.RULES, *limits.RULES, *roles.RULES)
CAPACITY_RULES: tuple[Rule, ...] = capacity.RULES
# for an engine backend that isn't PyTorch's
OTHER_LAYOUT_RULES: tuple[Rule, ...] = (mapping.check_world_size, mapping.check_moe_product, *other_backends.RULES)
OTHER_CONFIG_RULES: tuple[Rule, ...] = (
    mapping.check_gpus_per_node,
    limits.check_version,
    limits.check_orchestrator,
    roles.check_transceiver,
)


def layout_findings(subject: LayoutSpec) -> list[Finding]:
    """Apply only the rules about sizes and ranks: the planner does so for every candidate."""
    return _apply(OTHER_LAYOUT_RULES if subject.other_backend else LAYOUT_RULES, subject)


def config_findings(subject: LayoutSpec) -> list[Finding]:
    """Apply the rules whose findings no layout can solve: keys, formats, limits, roles."""
    return [*_key_findings(subject), *_apply(OTHER_CONFIG_RULES if subject.other_backend else CONFIG_RULES, subject)]


def all_findings(subject: LayoutSpec) -> list[Finding]:
    """Apply every rule to one worker.

    Returns:
        What the rules have to say, in their order; empty when there is nothing.
    """
    if subject.other_backend:
        return [*_key_findings(subject), *_apply((*OTHER_LAYOUT_RULES, *OTHER_CONFIG_RULES), subject)]
    # an encode worker's memory is that of its encoders
    capacity_findings = (finding for rule in CAPACITY_RULES for finding in rule(subject))
    return [*_key_findings(subject), *_apply((*LAYOUT_RULES, *CONFIG_RULES), subject), *capacity_findings]


def _key_findings(subject: LayoutSpec) -> list[Finding]:
    keys, version = subject.config.keys, subject.version
    return [*check_keys(keys, version), *check_values(keys, version)]


def _apply(rules: Iterable[Rule], subject: LayoutSpec) -> list[Finding]:
    if subject.role == "encode":
        subject = replace(subject, role="agg")
    return [finding for rule in rules for finding in rule(subject)]
