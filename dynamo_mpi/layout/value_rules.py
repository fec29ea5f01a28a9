# SPDX-License-Identifier: Apache-2.0
"""H: the values of the engine YAML, checked before the engine reads them: closed sets, bounds, kinds, and keys that exclude each other.

Nothing here is stricter than the engine's own validation. A version between two known ones accepts what either does (`engine_values`).
"""

from __future__ import annotations

from collections.abc import Mapping

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.engine_keys import KeyLookup, release
from dynamo_mpi.layout.engine_values import describe, engine_values
from dynamo_mpi.layout.engine_yaml import short_line
from dynamo_mpi.layout.finding import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.layout.trtllm_version import TrtllmVersion

RULE = "H"
_SHOWN = 60
_MOST = 20
# D8, A8, H5, H6 and H15 check these, and have more to say
_ELSEWHERE = frozenset(
    {
        *("moe_config.backend", "cp_config.cp_type", "orchestrator_type"),
        *("kv_cache_config.free_gpu_memory_fraction", "kv_cache_config.max_attention_window"),
    }
)
# this backend's arguments are another class, which isn't in the table
_NOT_KNOWN = ("tensorrt", "trt")


def check_values(config: Mapping[str, object], version: TrtllmVersion | None) -> list[Finding]:
    """H: values are ones that the engine accepts (``llmapi/llm_args.py``, its types and validators).

    Args:
        config: the engine YAML, parsed.
        version: the engine's version; None if it isn't known; then a value that any version accepts is accepted.

    Returns:
        A finding for each value in question, in the order of the file; then one for each combination that is refused.
    """
    around, backend = engine_values().around(version), config.get("backend")
    if around is None or (isinstance(backend, str) and backend.lower() in _NOT_KNOWN):
        return []
    findings = list(_Check(version, around).walk("", config))
    more = len(findings) - _MOST
    if more > 0:
        findings[_MOST:] = [Finding(RULE, Severity.ERROR, f"{more} more values that the engine refuses")]
    return [*findings, *_conflicts(config, version)]


def accepted_texts(path: str, version: TrtllmVersion | None) -> tuple[str, ...]:
    """Return the texts that a key with a closed set accepts; those of the oldest known version if it is older than that."""
    section, _, key = path.rpartition(".")
    around = engine_values().around(version) or range(1)
    specs = engine_values().specs(section, key, None, around)
    return tuple(dict.fromkeys(value for spec in specs for choice in spec.choices for value in choice.values))


class _Check:
    def __init__(self, version: TrtllmVersion | None, around: range) -> None:
        self._version = version
        self._around = around
        self._values = engine_values()
        self._known = KeyLookup(version)

    def walk(self, section: str, mapping: Mapping[object, object] | Mapping[str, object]) -> Iterator[Finding]:
        """Check the values of one section and of those below it."""
        selector = self._values.variants.get(section)
        variant = mapping.get(selector) if selector is not None else None
        variant = variant if isinstance(variant, str) else None
        keys = self._values.keys_of_variant(section, variant, self._around) if variant is not None else None
        for key, value in mapping.items():
            path = f"{section}.{key}" if section else key
            # `check_keys` reports keys that this version doesn't have
            if not isinstance(key, str) or not isinstance(path, str) or not self._known.takes(path):
                continue
            if keys is not None and key not in keys:
                yield self._foreign(section, key, f"{selector}: {variant}", value)
                continue
            specs = self._values.specs(section, key, variant, self._around)
            if path in _ELSEWHERE or self._known.has_removed(path, value):
                continue
            if specs and not any(spec.accepts(value) for spec in specs):
                yield self._refused(path, value, describe(specs))
            elif isinstance(value, Mapping) and path in self._values.sections and not self._known.is_free(path):
                yield from self.walk(path, value)

    def _refused(self, path: str, value: object, needed: str) -> Finding:
        return self._finding(
            f"the engine refuses this value of `{path}`",
            path,
            value,
            needed,
            f"set {path} to {needed}, or remove the line",
        )

    def _foreign(self, section: str, key: str, variant: str, value: object) -> Finding:
        return self._finding(
            f"`{section}.{key}` doesn't belong to {variant}",
            f"{section}.{key}",
            value,
            f"keys of {section} with {variant}",
            "remove the line",
        )

    def _finding(self, message: str, path: str, value: object, needed: str, fix: str) -> Finding:
        severity, newest = Severity.ERROR, self._values.newest
        if self._version is not None and self._version > newest:
            severity, message = Severity.WARNING, f"{message}, as far as known here up to {newest}"
        return Finding(RULE, severity, message, f"{path}: {short_line(value, _SHOWN)}", needed, fix)


def _conflicts(config: Mapping[str, object], version: TrtllmVersion | None) -> Iterator[Finding]:
    newest = engine_values().newest
    for row in engine_values().conflicts:
        if (row.since and version is not None and version < release(row.since)) or not row.holds(config):
            continue
        message = str(row)
        severity = Severity.ERROR
        if row.since and version is None:
            severity, message = Severity.WARNING, f"{message}: refused from TensorRT-LLM {row.since} on"
        elif version is not None and version > newest:
            severity, message = Severity.WARNING, f"{message}, as far as known here up to {newest}"
        found = ", ".join(condition.shown(config) for condition in row.conditions)
        yield Finding(RULE, severity, message, found, "", row.fix)
