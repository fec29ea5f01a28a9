# SPDX-License-Identifier: Apache-2.0
"""Reads the table of TensorRT-LLM's engine YAML keys: what each version accepts, and what replaced the keys that it no longer accepts.

The engine refuses a file with a single key that it doesn't know, and between 0.20 and 1.3 it renamed or moved dozens of them.
"""

from __future__ import annotations

import os
from functools import cache

from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


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
