# SPDX-License-Identifier: Apache-2.0
"""Reads the table of values that TensorRT-LLM's arguments accept, by key and by version: kinds, bounds and closed sets.

The table (``engine_values.json``) has what was read in several versions of ``llmapi/llm_args.py``. Between two of them each release and
candidate may have been the one that changed: it accepts what either side accepts, because the check must not refuse what works.
"""

from __future__ import annotations

import os
from functools import cache

from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.layout.key_conflicts import read_conflict
from dynamo_mpi.layout.trtllm_version import parse_trtllm_version
from dynamo_mpi.layout.value_spec import ValueSpec, parse_spec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.layout.trtllm_version import TrtllmVersion


@dataclass(frozen=True)
class Source:
    """One version of the engine's arguments that was read.

    Args:
        first: the first release that it can be of.
        last: the last one.
        partial: whether only some sections of it were read.
    """

    first: TrtllmVersion
    last: TrtllmVersion
    partial: bool = False


class EngineValues:
    """The table.

    Args:
        data: as ``engine_values.json`` has it.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.names: tuple[str, ...] = tuple(row["name"] for row in data["sources"])
        self.sources = tuple(
            Source(parse_trtllm_version(row["from"]), parse_trtllm_version(row["to"]), row.get("partial", False))
            for row in data["sources"]
        )
        self.variants: Mapping[str, str] = data["variants"]
        self.newest = next(source.last for source in reversed(self.sources) if not source.partial)
        self._values: Mapping[str, Mapping[str, str | Mapping[str, str]]] = data["values"]
        self._code: Mapping[str, str | Mapping[str, str]] = data["code"]
        self.conflicts = tuple(map(read_conflict, data["key_conflicts"]))
        above = {path.rpartition(".")[0] for path in self._code if "." in path}
        self.sections = frozenset({place for place in self._values if "=" not in place} - {"variants"} | above)

    def around(self, version: TrtllmVersion | None) -> range | None:
        """Return the sources between which a version is, by their index; None if it is older than all of them."""
        if version is None:
            return range(len(self.sources))
        for index, source in enumerate(self.sources):
            if source.first == version == source.last:
                return range(index, index + 1)
        if version < self.sources[0].first:
            return None
        below = [index for index, source in enumerate(self.sources) if source.last <= version]
        above = [index for index, source in enumerate(self.sources) if source.first >= version]
        return range(below[-1] if below else 0, (above[0] if above else len(self.sources) - 1) + 1)

    def specs(self, section: str, key: str, variant: str | None, around: range) -> tuple[ValueSpec, ...]:
        """Return what a key accepts, one alternative for each of the sources; empty if that isn't known.

        Args:
            section: dotted path of the key's section; ``""`` is the top level.
            key: its name.
            variant: value of the section's discriminator, if it has one.
            around: indexes of the sources.
        """
        found = self._code.get(f"{section}.{key}" if section else key)
        if found is None and variant is not None:
            found = self._values.get(f"{section}={variant}", {}).get(key)
        if found is None:
            found = self._values.get(section, {}).get(key)
        return () if found is None else tuple(map(parse_spec, dict.fromkeys(self._between(found, around))))

    def keys_of_variant(self, section: str, variant: str, around: range) -> frozenset[str] | None:
        """Return the keys that a section has for one value of its discriminator; None if that isn't known."""
        lists = self._values["variants"]
        own = self._between(lists.get(f"{section}={variant}", ""), around)
        return frozenset(" ".join((*own, *self._between(lists[f"{section}=*"], around))).split()) if own else None

    def _between(self, found: str | Mapping[str, str], around: Sequence[int]) -> list[str]:
        """Return the texts that hold in the sources ``around``; an empty text means that the source has nothing."""
        if isinstance(found, str):
            return [found] if found else []
        current, texts = "", []
        for index, name in enumerate(self.names):
            current = found.get(name, current)
            if index in around:
                texts.append(current)
        return [text for text in texts if text]


@cache
def engine_values() -> EngineValues:
    """Return the table."""
    import json

    with open(os.path.join(os.path.dirname(__file__), "engine_values.json"), encoding="utf-8") as table:
        return EngineValues(json.load(table))
