# SPDX-License-Identifier: Apache-2.0
"""``docs/reference/rules.md``: every rule, from the docstrings of the functions that check them."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING

from dynamo_mpi.checks import binding, fabric_rules, gpu_check, gpu_rules, host_rules, kv_rules, rank_rules
from dynamo_mpi.discovery import peer_compat as peers
from dynamo_mpi.layout import contract, engine_layers, key_rules, value_rules
from dynamo_mpi.layout.rules import other_backends, registry
from tools.gen_docs.markdown import WRITTEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HEAD = f"""# Rules

Every rule that `dynamo-mpi check`, `dynamo-mpi plan`, the preflight in the ranks and its probes apply, by the id that stands in its findings.
{WRITTEN}
File names in parentheses are TensorRT-LLM's: where the engine has the rule, as read in its public sources from 1.0 to the 1.3
release candidates. Nothing here was run against the engine itself.

| rule | what it says |
|---|---|
"""
_IDS = re.compile(r"([A-Z]\d*(?:, [A-Z]\d*|-[A-Z]\d+)*): ")


def render() -> str:
    """Return the page."""
    return _HEAD + "".join(f"| {ids} | {text} |\n" for ids, text in _rows())


def _rows() -> Iterator[tuple[str, str]]:
    for rule in (*registry.LAYOUT_RULES, *registry.CONFIG_RULES, *registry.CAPACITY_RULES):
        yield _row(rule)
    for other in (
        *other_backends.RULES,
        key_rules.check_keys,
        value_rules.check_values,
        engine_layers.flag_without_effect,
        engine_layers.gms_in_the_child,
        contract.check_contracts,
        *rank_rules.RULES,
        *peers.RULES,
        *gpu_rules.RULES,
        *host_rules.RULES,
        binding.check_binding,
        *gpu_check.RULES,
        *fabric_rules.RULES,
        *kv_rules.RULES,
    ):
        yield _row(other)


def _row(rule: Callable[..., object]) -> tuple[str, str]:
    text = inspect.getdoc(rule) or ""
    first = " ".join(text.split("\n\n")[0].split())
    found = _IDS.match(first)
    if found is None:
        raise ValueError(f"{rule.__name__} doesn't begin with its rule's id: {first[:60]}")
    said = first[found.end() :].replace("``", "`").replace("|", "\\|")
    return found[1], said[:1].upper() + said[1:]
