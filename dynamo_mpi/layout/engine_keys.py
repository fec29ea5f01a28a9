# SPDX-License-Identifier: Apache-2.0
"""Reads the table of TensorRT-LLM's engine YAML keys: what each version accepts, what replaced the keys that it no longer accepts, and which
key was probably meant by an unknown one.

The engine refuses a file with a single key that it doesn't know, and between 0.20 and 1.3 it renamed or moved dozens of them.
"""

from __future__ import annotations

import os
from functools import cache
from itertools import chain

from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple
from dynamo_mpi.layout.trtllm_version import parse_trtllm_version

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.layout.trtllm_version import TrtllmVersion


class Key(NamedTuple):
    """A key and the versions that accept it, as far as known.

    Args:
        name: the key.
        since: the release that first accepted it; None if not established.
        until: the release that no longer accepted it; None if there is none yet.
    """

    name: str
    since: tuple[int, int] | None = None
    until: tuple[int, int] | None = None


@dataclass(frozen=True)
class Renamed:
    """A key that was renamed, moved or dropped, or that never was one.

    Args:
        old: its dotted path.
        new: dotted path of its replacement; empty if there is none.
        refused: the version from which the engine refuses the old one; empty while it doesn't; ``"0"`` if it never accepted it.
        since: the version from which this row applies.
        inverted: the new key means the opposite.
        values: replacements of certain values; others stay.
        hoisted: its contents move to the top level.
        hint: what to write instead, if it isn't enough to copy a value.
    """

    old: str
    new: str = ""
    refused: str = ""
    since: str = "0.0"
    inverted: bool = False
    values: tuple[tuple[object, object], ...] = ()
    hoisted: bool = False
    hint: str = ""


@dataclass(frozen=True)
class RemovedValues:
    """Values that a key no longer accepts.

    Args:
        path: dotted path of the key.
        values: the replacement of each; None: drop the key.
        refused: the version from which the engine refuses them.
        hint: more about what to choose instead.
    """

    path: str
    values: Mapping[str, str | None]
    refused: str
    hint: str = ""


@dataclass(frozen=True)
class EngineKeys:
    """The table.

    Args:
        newest: the newest version that it is known to cover.
        oldest: the oldest version that can be used with the bootstrap.
        other_backends: backends with which the top level has keys of its own.
        free_before: sections that were free-form mappings, with the release that ended it.
        sections: the keys of each section by name, by the section's dotted path; ``""`` is the top level.
        renamed: by the path of the old key; of several rows the last one whose ``since`` is reached applies.
        removed_values: by the path of the key.
    """

    newest: str
    oldest: str
    other_backends: tuple[str, ...]
    free_before: Mapping[str, tuple[int, int]]
    sections: Mapping[str, Mapping[str, Key]]
    renamed: Mapping[str, tuple[Renamed, ...]]
    removed_values: Mapping[str, RemovedValues]

    def keys_of(self, section: str) -> Mapping[str, Key]:
        """Return the keys of a section, by name; empty if there is no such section."""
        return self.sections.get(section, {})


@cache
def engine_keys() -> EngineKeys:
    """Return the table."""
    # not at the top: most ranks import this module's neighbours without a config to check
    import json

    with open(os.path.join(os.path.dirname(__file__), "engine_keys.json"), encoding="utf-8") as table:
        data = json.load(table)
    renamed: dict[str, tuple[Renamed, ...]] = {}
    for row in (row for group in data["renamed"].values() for row in group):
        values = tuple((old, new) for old, new in row.get("values", ()))
        for old in row["old"].split():
            renamed[old] = (*renamed.get(old, ()), Renamed(**{**row, "old": old, "values": values}))
    sections = {
        path: [_key(text) for line in lines for text in line.split()] for path, lines in data["sections"].items()
    }
    return EngineKeys(
        data["newest"],
        data["oldest"],
        tuple(data["other_backends"]),
        {path: _minor(until) for path, until in data["free_before"].items()},
        {path: {key.name: key for key in keys} for path, keys in sections.items()},
        renamed,
        {row["path"]: RemovedValues(**row) for row in data["removed_values"]},
    )


def _key(text: str) -> Key:
    rest, _, until = text.partition("<")
    name, _, since = rest.partition("@")
    return Key(name, _minor(since) if since else None, _minor(until) if until else None)


def _minor(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


_LONGEST = 60


class KeyLookup:
    """The keys of one version.

    Args:
        version: the engine's version; None if it isn't known; then a key of any version is accepted.
        other_backend: the config is for a backend whose own keys aren't known here.
        keys: another table.
    """

    def __init__(
        self, version: TrtllmVersion | None, *, other_backend: bool = False, keys: EngineKeys | None = None
    ) -> None:
        self._version = version
        self._other_backend = other_backend
        self._keys = keys or engine_keys()

    def row(self, path: str) -> Renamed | None:
        """Return the last renaming of the key at this path."""
        rows = self._keys.renamed.get(path, ())
        if self._other_backend and "." not in path:
            rows = tuple(row for row in rows if row.refused == "0")
        if self._version is not None:
            rows = tuple(row for row in rows if release(row.since) <= self._version)
        return rows[-1] if rows else None

    def has_removed(self, path: str, value: object) -> bool:
        """Return whether this is a value that the key no longer accepts, in this version or in a later one."""
        removed = self._keys.removed_values.get(path)
        return removed is not None and isinstance(value, str) and value in removed.values

    def similar(self, section: str, key: str) -> str | None:
        """Return the path of the key that was probably meant."""
        prefix = f"{section}." if section else ""
        names = [name for name in self._keys.keys_of(section) if self.takes(prefix + name)]
        plain = _plain(key)
        for name in names:
            if _plain(name) == plain:
                return prefix + name
        for row in chain.from_iterable(self._keys.renamed.values()):
            if row.new and not row.inverted and not row.values and _plain(row.old) == _plain(prefix + key):
                return row.new
        elsewhere = self.elsewhere(key.replace("-", "_"))
        if elsewhere is not None:
            return elsewhere
        # imported here: only an invalid file needs it
        from difflib import get_close_matches

        close = get_close_matches(key[:_LONGEST], names, n=1, cutoff=0.75)
        return prefix + close[0] if close else None

    def elsewhere(self, key: str) -> str | None:
        """Return the path of a key that belongs to another section; the key may be such a path already."""
        head, _, leaf = key.rpartition(".")
        if head in self._keys.sections and leaf in self._keys.keys_of(head):
            return key
        paths = [
            f"{section}.{key}" if section else key
            for section in self._keys.sections
            if key in self._keys.keys_of(section)
        ]
        return next((path for path in paths if self.takes(path)), None)

    def takes(self, path: str) -> bool:
        """Return whether the engine accepts the key at this path."""
        section, _, name = path.rpartition(".")
        key = self._keys.keys_of(section).get(name)
        if key is None or (section and not self.takes(section)):
            return False
        version = self._version
        if version is None:
            return True
        row = self.row(path)
        if row is not None and row.refused and release(row.refused) <= version:
            return False
        return (key.since is None or version.minor >= key.since) and (key.until is None or version.minor < key.until)

    def is_free(self, path: str) -> bool:
        """Return whether the engine accepts any key in the section at this path."""
        until = self._keys.free_before.get(path)
        return until is not None and (self._version is None or self._version.minor < until)


@cache
def release(text: str) -> TrtllmVersion:
    """Read a version of the tables, which may be ``1.2``."""
    return parse_trtllm_version(text if "." in text else text + ".0")


def _plain(key: str) -> str:
    return key[: 2 * _LONGEST].lower().replace("-", "").replace("_", "").replace(" ", "")
