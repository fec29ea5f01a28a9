# SPDX-License-Identifier: Apache-2.0
"""H: the keys of the engine YAML, checked before the engine reads them.

TensorRT-LLM rejects the whole file for one unknown key, after the ranks were started, and doesn't name the key's replacement.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.engine_keys import KeyLookup, engine_keys, release
from dynamo_mpi.layout.engine_yaml import short_line, shortened, whole, yaml_line
from dynamo_mpi.layout.finding import Finding, Severity

if TYPE_CHECKING:
    from dynamo_mpi.layout.engine_keys import Key, RemovedValues, Renamed
    from dynamo_mpi.layout.trtllm_version import TrtllmVersion

RULE = "H"
_UNKNOWN_SHOWN = 20
_SHOWN = 60


def check_keys(config: Mapping[str, object], version: TrtllmVersion | None) -> list[Finding]:
    """H: keys are the engine's: unknown, misspelt, renamed and removed ones are found, with what to write instead (``BaseLlmArgs``).

    Args:
        config: the engine YAML, parsed.
        version: the engine's version; None if it isn't known; then a key of any version is accepted.

    Returns:
        A finding for each key in question, in the order of the file; empty when there is none.
    """
    check = _Check(config, version)
    check.walk("", config, "")
    return check.done()


class _Check:
    def __init__(self, config: Mapping[str, object], version: TrtllmVersion | None) -> None:
        self._config = config
        self._version = version
        self._findings: list[Finding] = []
        self._unknown = 0
        # content of sections that don't exist yet, so that each is written once and completely
        self._moved: dict[str, dict[str, object]] = {}
        self._keys = engine_keys()
        backend = config.get("backend")
        self._other_backend = isinstance(backend, str) and backend.lower() in self._keys.other_backends
        self._known = KeyLookup(version, other_backend=self._other_backend)

    def walk(self, section: str, mapping: Mapping[object, object] | Mapping[str, object], shown: str) -> None:
        """Check the keys of one section; ``shown`` is the displayed prefix of their paths."""
        if not section:
            self._collect_moves(mapping)
        for key, value in mapping.items():
            if not isinstance(key, str):
                self._add_unknown(
                    f"a key of {shown.rstrip('.') or 'the engine config'} is not text",
                    f"{_shown(key)}: {_shown(value)}",
                    "key names of TensorRT-LLM",
                    "remove the line, or put the key in quotes if it is one",
                )
                continue
            path = f"{section}.{key}" if section else key
            refused = self._check_key(section, key, value, shown + _name(key))
            if (
                not refused
                and path in self._keys.sections
                and isinstance(value, Mapping)
                and not self._known.is_free(path)
            ):
                self.walk(path, value, f"{shown}{key}.")

    def done(self) -> list[Finding]:
        """Return the findings."""
        more = self._unknown - _UNKNOWN_SHOWN
        if more > 0:
            self._findings.append(
                Finding(
                    RULE,
                    self._unknown_severity(),
                    f"{more} more unknown {'key' if more == 1 else 'keys'}",
                    fix="check that this is an engine config of TensorRT-LLM",
                )
            )
        return self._findings

    def _check_key(self, section: str, key: str, value: object, shown: str) -> bool:
        """Return whether the engine rejects the key."""
        path = f"{section}.{key}" if section else key
        if isinstance(value, str) and self._known.has_removed(path, value):
            return self._add_removed_value(self._keys.removed_values[path], value, _found(shown, value))
        row = self._known.row(path)
        if row is not None:
            return self._add_renamed(row, value, shown, _found(shown, value))
        known = self._keys.keys_of(section).get(key)
        if known is None:
            if section or not self._other_backend:
                self._explain_unknown(section, key, value, shown, _found(shown, value))
            return True
        return self._add_out_of_time(known, shown, value)

    def _add_removed_value(self, row: RemovedValues, value: str, found: str) -> bool:
        severity = self._severity(row.refused)
        new = row.values[value]
        if new is not None:
            needed, fix = f"`{new}`", self._write(row.path, new)
        else:
            needed, fix = "no such line", "remove the line"
        if row.hint:
            fix += f"; {row.hint}"
        message = f"`{row.path}: {value}` is {self._refused(row.refused)}"
        self._findings.append(Finding(RULE, severity, message, found, needed, self._when(row.refused, fix)))
        return severity is Severity.ERROR

    def _add_renamed(self, row: Renamed, value: object, shown: str, found: str) -> bool:
        if row.refused == "0":
            severity, message = Severity.ERROR, f"`{shown}` is not a key of TensorRT-LLM's YAML"
        elif row.refused:
            severity, message = self._severity(row.refused), f"`{shown}` is {self._refused(row.refused)}"
        else:
            severity = Severity.WARNING
            message = f"`{shown}` is deprecated from TensorRT-LLM {_since(row.since)} on"
        if row.hoisted:
            needed, fix = "its keys, at the top level", self._hoist(value)
        elif not row.new:
            needed, fix = "no such line", "remove the line"
        elif self._is_set(row.new):
            needed, fix = f"`{row.new}`", f"remove the line: `{row.new}` is there already"
        else:
            needed, fix = f"`{row.new}`", self._write(row.new, _carried(row, value))
        if row.hint:
            fix += f"; {row.hint}"
        if row.new and not self._known.takes(row.new):
            fix = self._when(row.refused, fix)
        self._findings.append(Finding(RULE, severity, message, found, needed, fix))
        if shown == "pytorch_backend_config" and isinstance(value, Mapping):
            self.walk("", value, f"{shown}.")
        return severity is Severity.ERROR

    def _add_out_of_time(self, key: Key, shown: str, value: object) -> bool:
        version = self._version
        if version is None:
            return False
        if key.since is not None and version.minor < key.since:
            since = _dotted(key.since)
            message = f"`{shown}` is known from TensorRT-LLM {since} on, and this is {version}"
            needed, fix = f"TensorRT-LLM {since} or newer", "remove the line, or install a newer TensorRT-LLM"
            self._findings.append(Finding(RULE, Severity.ERROR, message, _found(shown, value), needed, fix))
            return True
        if key.until is not None and version.minor >= key.until:
            # it was removed in one of that release's candidates; which one isn't known
            unsure = version.minor == key.until and not version.is_final
            severity = Severity.WARNING if unsure else Severity.ERROR
            message = f"`{shown}` is {self._refused(_dotted(key.until))}"
            self._findings.append(
                Finding(RULE, severity, message, _found(shown, value), "no such line", "remove the line")
            )
            return severity is Severity.ERROR
        return False

    def _explain_unknown(self, section: str, key: str, value: object, shown: str, found: str) -> None:
        if self._unknown >= _UNKNOWN_SHOWN:
            self._unknown += 1
            return
        where = f"under {section}" if section else "at the top level"
        message = f"`{shown}` is not a key of TensorRT-LLM's YAML"
        path = self._known.similar(section, key)
        if path is None:
            fix, needed = "remove the line", f"a key that TensorRT-LLM takes {where}"
        else:
            target, _, leaf = path.rpartition(".")
            if target != section:
                message = f"`{shown}` belongs {'under ' + target if target else 'at the top level'}"
                if leaf != key:
                    message += f", as `{leaf}`"
            needed, fix = f"`{path}`", self._write(path, value)
        self._add_unknown(message, found, needed, fix)

    def _is_set(self, path: str) -> bool:
        there: object = self._config
        for part in path.split("."):
            if not isinstance(there, Mapping) or part not in there:
                return False
            there = there[part]
        return True

    def _add_unknown(self, message: str, found: str, needed: str, fix: str) -> None:
        self._unknown += 1
        if self._unknown > _UNKNOWN_SHOWN:
            return
        severity = self._unknown_severity()
        if severity is Severity.WARNING:
            message += f", as far as known here up to {self._keys.newest}"
        self._findings.append(Finding(RULE, severity, message, found, needed, fix))

    def _unknown_severity(self) -> Severity:
        newer = self._version is not None and self._version > release(self._keys.newest)
        return Severity.WARNING if newer else Severity.ERROR

    def _severity(self, refused: str) -> Severity:
        """An error if this version rejects it, or, if the version isn't known, if all versions do."""
        version = self._version or release(self._keys.oldest)
        return Severity.ERROR if release(refused) <= version else Severity.WARNING

    def _refused(self, refused: str) -> str:
        version = self._version
        later = version is not None and version < release(refused)
        return f"refused from TensorRT-LLM {refused} on" + (f", and this is {version}" if later else "")

    def _when(self, refused: str, fix: str) -> str:
        """Add the version to a fix that this version doesn't support yet."""
        if self._version is None or not refused or release(refused) <= self._version:
            return fix
        return f"from {refused} on: {fix}"

    def _collect_moves(self, mapping: Mapping[object, object] | Mapping[str, object]) -> None:
        for key, value in mapping.items():
            if not isinstance(key, str):
                continue
            row = self._known.row(key)
            known = row is not None or key in self._keys.keys_of("")
            path = row.new if row is not None else None if known else self._known.elsewhere(key)
            if path is not None and "." in path:
                target, _, leaf = path.rpartition(".")
                self._moved.setdefault(target, {})[leaf] = whole(value if row is None else _carried(row, value))

    def _hoist(self, value: object) -> str:
        """Format the contents of a section as lines of the top level."""
        if not isinstance(value, Mapping) or not value:
            return "remove the line"
        self._collect_moves(value)
        lines: dict[str, None] = {}
        for key, inner in islice(value.items(), _UNKNOWN_SHOWN):
            row = self._known.row(key) if isinstance(key, str) else None
            if row is not None and row.new:
                lines[self._write(row.new, _carried(row, inner))] = None
            elif row is None and key in self._keys.keys_of(""):
                lines[f"{key}: {yaml_line(whole(inner))}"] = None
        return "\n".join(lines) or "remove the line"

    def _write(self, path: str, value: object) -> str:
        """Format the YAML line that sets a key, inside the sections that exist already."""
        parts = path.split(".")
        there: Mapping[object, object] | Mapping[str, object] = self._config
        above: list[str] = []
        while len(parts) > 1 and isinstance(inner := there.get(parts[0]), Mapping) and inner:
            there = inner
            above.append(parts.pop(0))
        written = whole(value)
        if written == {}:
            written = self._moved.get(path, {})
        while len(parts) > 1:
            leaf = parts.pop()
            written = {**self._moved.get(".".join(above + parts), {}), leaf: written}
        where = f" (under {'.'.join(above)})" if above else ""
        return f"{parts[0]}: {yaml_line(written)}{where}"


def _carried(row: Renamed, value: object) -> object:
    """Return the new key's value for the old key's."""
    if row.inverted and isinstance(value, bool):
        return not value
    for old, new in row.values:
        if value is old:
            return new
    return value


def _found(shown: str, value: object) -> str:
    return f"{shown}: {_shown(value)}"


def _since(since: str) -> str:
    # the first candidate represents the release, because which candidate it was isn't known
    return since.partition(".0rc1")[0] if since.endswith(".0rc1") else since


def _dotted(minor: tuple[int, int]) -> str:
    return f"{minor[0]}.{minor[1]}"


def _shown(value: object) -> str:
    return short_line(value, _SHOWN)


def _name(key: str) -> str:
    return shortened(key, _SHOWN) if key.isprintable() and key else short_line(key, _SHOWN)
