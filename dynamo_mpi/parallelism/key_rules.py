# SPDX-License-Identifier: Apache-2.0
"""H: the keys of the engine YAML, before the engine sees them.

TensorRT-LLM refuses the whole file for one key that it doesn't know, after the ranks were started, and without saying what the
key is called by now.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING

from dynamo_mpi.parallelism import engine_keys
from dynamo_mpi.parallelism.engine_keys import keys_of
from dynamo_mpi.parallelism.finding import Finding, Severity
from dynamo_mpi.parallelism.trtllm_version import parse_trtllm_version

if TYPE_CHECKING:
    from dynamo_mpi.parallelism.engine_keys import Key, RemovedValue, Renamed
    from dynamo_mpi.parallelism.trtllm_version import TrtllmVersion

RULE = "H"
_UNKNOWN_SHOWN = 20
_SHOWN = 60
_WRITTEN = 2000
_CUT = "..."
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./-")
_NOT_TEXT = frozenset({"true", "false", "yes", "no", "on", "off", "null", "y", "n"})


def check_keys(config: Mapping[str, object], version: TrtllmVersion | None) -> list[Finding]:
    """Find the keys that the engine refuses or ignores, and say what to write instead.

    Args:
        config: the engine YAML, parsed.
        version: the engine's version; None where it isn't known, and then a key that any version takes is accepted.

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
        # what goes into sections that aren't there yet, so that each is written once and whole
        self._moved: dict[str, dict[str, object]] = {}
        backend = config.get("backend")
        self._other_backend = isinstance(backend, str) and backend.lower() in engine_keys.OTHER_BACKENDS

    def walk(self, section: str, mapping: Mapping[object, object] | Mapping[str, object], shown: str) -> None:
        """Check the keys of one section; ``shown`` is what their paths are shown to begin with."""
        if not section:
            self._collect_moves(mapping)
        for key, value in mapping.items():
            if not isinstance(key, str):
                self._add_unknown(
                    f"a key of {shown.rstrip('.') or 'the engine config'} is not text",
                    f"{_short(_flow(key))}: {_short(_flow(value))}",
                    "key names of TensorRT-LLM",
                    "remove the line, or put the key in quotes if it is one",
                )
                continue
            path = f"{section}.{key}" if section else key
            refused = self._check_key(section, key, value, shown + _name(key))
            if not refused and path in engine_keys.SECTIONS and isinstance(value, Mapping) and not self._is_free(path):
                self.walk(path, value, f"{shown}{key}.")

    def done(self) -> list[Finding]:
        """Return what was found."""
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
        """Say whether the engine refuses the key."""
        path = f"{section}.{key}" if section else key
        found = f"{shown}: {_short(_flow(value))}"
        removed = engine_keys.removed_values().get(path)
        if removed is not None and isinstance(value, str) and value in removed.values:
            return self._add_removed_value(removed, value, found)
        row = self._row(path)
        if row is not None:
            return self._add_renamed(row, value, shown, found)
        known = keys_of(section).get(key)
        if known is None:
            if section or not self._other_backend:
                self._explain_unknown(section, key, value, shown, found)
            return True
        return self._add_out_of_time(known, shown, found)

    def _row(self, path: str) -> Renamed | None:
        rows = engine_keys.renamed_by_path().get(path, ())
        if self._other_backend and "." not in path:
            rows = tuple(row for row in rows if row.refused == "0")
        if self._version is not None:
            rows = tuple(row for row in rows if _version(row.since) <= self._version)
        return rows[-1] if rows else None

    def _add_removed_value(self, row: RemovedValue, value: str, found: str) -> bool:
        severity = self._severity(row.refused)
        if row.new:
            new = row.new[row.values.index(value)]
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
        if row.new and not self._takes(row.new):
            fix = self._when(row.refused, fix)
        self._findings.append(Finding(RULE, severity, message, found, needed, fix))
        if shown == "pytorch_backend_config" and isinstance(value, Mapping):
            self.walk("", value, f"{shown}.")
        return severity is Severity.ERROR

    def _add_out_of_time(self, key: Key, shown: str, found: str) -> bool:
        version = self._version
        if version is None:
            return False
        if key.since is not None and version.minor < key.since:
            since = _dotted(key.since)
            message = f"`{shown}` is known from TensorRT-LLM {since} on, and this is {version}"
            needed, fix = f"TensorRT-LLM {since} or newer", "remove the line, or install a newer TensorRT-LLM"
            self._findings.append(Finding(RULE, Severity.ERROR, message, found, needed, fix))
            return True
        if key.until is not None and version.minor >= key.until:
            # it went with one of that release's candidates, and which one isn't known
            unsure = version.minor == key.until and not version.is_final
            severity = Severity.WARNING if unsure else Severity.ERROR
            message = f"`{shown}` is {self._refused(_dotted(key.until))}"
            self._findings.append(Finding(RULE, severity, message, found, "no such line", "remove the line"))
            return severity is Severity.ERROR
        return False

    def _explain_unknown(self, section: str, key: str, value: object, shown: str, found: str) -> None:
        if self._unknown >= _UNKNOWN_SHOWN:
            self._unknown += 1
            return
        where = f"under {section}" if section else "at the top level"
        message = f"`{shown}` is not a key of TensorRT-LLM's YAML"
        path = self._similar(section, key)
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

    def _similar(self, section: str, key: str) -> str | None:
        """Return the path of the key that was probably meant."""
        prefix = f"{section}." if section else ""
        names = [name for name in keys_of(section) if self._takes(prefix + name)]
        plain = _plain(key)
        for name in names:
            if _plain(name) == plain:
                return prefix + name
        for row in engine_keys.RENAMED:
            if row.new and not row.inverted and not row.values and _plain(row.old) == _plain(prefix + key):
                return row.new
        elsewhere = self._elsewhere(key.replace("-", "_"))
        if elsewhere is not None:
            return elsewhere
        # not at the top: only a wrong file needs it
        from difflib import get_close_matches

        close = get_close_matches(key[:_SHOWN], names, n=1, cutoff=0.75)
        return prefix + close[0] if close else None

    def _elsewhere(self, key: str) -> str | None:
        head, _, leaf = key.rpartition(".")
        if head in engine_keys.SECTIONS and leaf in keys_of(head):
            return key
        paths = [f"{section}.{key}" if section else key for section in engine_keys.SECTIONS if key in keys_of(section)]
        return next((path for path in paths if self._takes(path)), None)

    def _takes(self, path: str) -> bool:
        """Say whether the engine takes the key at this path."""
        section, _, name = path.rpartition(".")
        key = keys_of(section).get(name)
        if key is None or (section and not self._takes(section)):
            return False
        version = self._version
        if version is None:
            return True
        row = self._row(path)
        if row is not None and row.refused and _version(row.refused) <= version:
            return False
        return (key.since is None or version.minor >= key.since) and (key.until is None or version.minor < key.until)

    def _is_set(self, path: str) -> bool:
        there: object = self._config
        for part in path.split("."):
            if not isinstance(there, Mapping) or part not in there:
                return False
            there = there[part]
        return True

    def _is_free(self, path: str) -> bool:
        until = engine_keys.FREE_BEFORE.get(path)
        return until is not None and (self._version is None or self._version.minor < until)

    def _add_unknown(self, message: str, found: str, needed: str, fix: str) -> None:
        self._unknown += 1
        if self._unknown > _UNKNOWN_SHOWN:
            return
        severity = self._unknown_severity()
        if severity is Severity.WARNING:
            message += f", as far as known here up to {engine_keys.NEWEST}"
        self._findings.append(Finding(RULE, severity, message, found, needed, fix))

    def _unknown_severity(self) -> Severity:
        newer = self._version is not None and self._version > _version(engine_keys.NEWEST)
        return Severity.WARNING if newer else Severity.ERROR

    def _severity(self, refused: str) -> Severity:
        """An error where this version refuses it; or, where the version isn't known, all of them do."""
        version = self._version or _version(engine_keys.OLDEST)
        return Severity.ERROR if _version(refused) <= version else Severity.WARNING

    def _refused(self, refused: str) -> str:
        version = self._version
        later = version is not None and version < _version(refused)
        return f"refused from TensorRT-LLM {refused} on" + (f", and this is {version}" if later else "")

    def _when(self, refused: str, fix: str) -> str:
        """Put off what this version doesn't take yet."""
        if self._version is None or not refused or _version(refused) <= self._version:
            return fix
        return f"from {refused} on: {fix}"

    def _collect_moves(self, mapping: Mapping[object, object] | Mapping[str, object]) -> None:
        for key, value in mapping.items():
            if not isinstance(key, str):
                continue
            row = self._row(key)
            known = row is not None or key in keys_of("")
            path = row.new if row is not None else None if known else self._elsewhere(key)
            if path is not None and "." in path:
                target, _, leaf = path.rpartition(".")
                self._moved.setdefault(target, {})[leaf] = _written(value if row is None else _carried(row, value))

    def _hoist(self, value: object) -> str:
        """Write the contents of a section as lines of the top level."""
        if not isinstance(value, Mapping) or not value:
            return "remove the line"
        self._collect_moves(value)
        lines: dict[str, None] = {}
        for key, inner in islice(value.items(), _UNKNOWN_SHOWN):
            row = self._row(key) if isinstance(key, str) else None
            if row is not None and row.new:
                lines[self._write(row.new, _carried(row, inner))] = None
            elif row is None and key in keys_of(""):
                lines[f"{key}: {_flow(_written(inner), 2 * _WRITTEN)}"] = None
        return "\n".join(lines) or "remove the line"

    def _write(self, path: str, value: object) -> str:
        """Write the YAML line that sets a key, inside the sections that are there already."""
        parts = path.split(".")
        there: Mapping[object, object] | Mapping[str, object] = self._config
        above: list[str] = []
        while len(parts) > 1 and isinstance(inner := there.get(parts[0]), Mapping) and inner:
            there = inner
            above.append(parts.pop(0))
        written = _written(value)
        if written == {}:
            written = self._moved.get(path, {})
        while len(parts) > 1:
            leaf = parts.pop()
            written = {**self._moved.get(".".join(above + parts), {}), leaf: written}
        where = f" (under {'.'.join(above)})" if above else ""
        return f"{parts[0]}: {_flow(written, 10 * _WRITTEN)}{where}"


class _AsIs(str):
    """Text that is written without quotes."""


def _carried(row: Renamed, value: object) -> object:
    """Return what the new key has to say for what the old one said."""
    if row.inverted and isinstance(value, bool):
        return not value
    for old, new in row.values:
        if value is old:
            return new
    return value


@cache
def _version(text: str) -> TrtllmVersion:
    return parse_trtllm_version(text if "." in text else text + ".0")


def _since(since: str) -> str:
    # a first candidate stands for the release, since which of them it was isn't known
    return since.partition(".0rc1")[0] if since.endswith(".0rc1") else since


def _dotted(minor: tuple[int, int]) -> str:
    return f"{minor[0]}.{minor[1]}"


def _plain(key: str) -> str:
    return key[: 2 * _SHOWN].lower().replace("-", "").replace("_", "").replace(" ", "")


def _name(key: str) -> str:
    return _short(key if key.isprintable() and key else _quoted(key))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - len(_CUT)] + _CUT


def _written(value: object) -> object:
    """Return the value, or what stands for one that is too long to be written."""
    left = [_WRITTEN]
    _put(value, left)
    return value if left[0] > 0 else _AsIs("<the value that is there>")


def _flow(value: object, limit: int = 2 * _SHOWN) -> str:
    """Write a value as YAML, on one line, as far as it is going to be shown."""
    return _put(value, [limit])


def _put(value: object, left: list[int], depth: int = 8) -> str:
    """Write a value; ``left`` counts down the characters that may still follow, since anchors make small files large."""
    if left[0] <= 0 or depth == 0:
        left[0] = 0
        return _CUT
    left[0] -= 2
    if isinstance(value, Mapping | list | tuple):
        opening, closing = "{}" if isinstance(value, Mapping) else "[]"
        parts: list[str] = []
        for item in value:
            part = _put(item, left, depth - 1)
            parts.append(f"{part}: {_put(value[item], left, depth - 1)}" if isinstance(value, Mapping) else part)
            if left[0] <= 0:
                break
        return opening + ", ".join(parts) + closing
    text = _scalar(value)
    left[0] -= len(text)
    return text


def _scalar(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(str(value), str(value))
    if isinstance(value, int):
        return str(value) if value.bit_length() < 1024 else "<a very large number>"
    if isinstance(value, _AsIs):
        return str(value)
    if isinstance(value, str):
        start = value[: 2 * _WRITTEN]
        plain = (start[:1].isalpha() or start[:1] in ("/", "_")) and set(start) <= _PLAIN
        return start if plain and start.lower() not in _NOT_TEXT else _quoted(start)
    return _quoted(str(value)[: 2 * _WRITTEN])


def _quoted(text: str) -> str:
    # not at the top: hardly ever needed
    import json

    return json.dumps(text)
