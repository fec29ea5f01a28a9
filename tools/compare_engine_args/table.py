# SPDX-License-Identifier: Apache-2.0
"""Compares what a file declares with the tables, and adds it to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dynamo_mpi.layout.engine_keys import EngineKeys, KeyLookup
from dynamo_mpi.layout.engine_values import EngineValues, describe, parse_spec

if TYPE_CHECKING:
    from dynamo_mpi.layout.trtllm_version import TrtllmVersion
    from tools.compare_engine_args.source import Arguments


def compare(found: Arguments, data: dict[str, Any], keys: EngineKeys, version: TrtllmVersion) -> Iterator[str]:
    """Yield a line for each difference between a file and the tables.

    Args:
        found: what the file declares.
        data: ``engine_values.json``.
        keys: ``engine_keys.json``.
        version: the file's version of TensorRT-LLM.
    """
    table, known = EngineValues(data), KeyLookup(version, keys=keys)
    around = table.around(version) or range(1)
    sections: dict[str, dict[str, None]] = {}
    for place, specs in found.values.items():
        sections.setdefault(place.partition("=")[0], {}).update(dict.fromkeys(specs))
    for section, names in sections.items():
        prefix = f"{section}." if section else ""
        taken = {name for name in keys.keys_of(section) if known.takes(prefix + name)}
        yield from (f"new key     {prefix}{name}" for name in names if name not in taken)
        yield from (f"gone key    {prefix}{name}" for name in sorted(taken - {*names}))
    for place, specs in found.values.items():
        section, _, variant = place.partition("=")
        for name, text in specs.items():
            ours = table.specs(section, name, variant or None, around)
            path = f"{place}.{name}" if place else name
            if not ours:
                yield f"new value   {path}: {text}"
            elif parse_spec(text) not in ours and path not in data["code"]:
                yield f"differs     {path}: {describe((parse_spec(text),))}; the table has {describe(ours)}"
    for place, own in found.variants.items():
        section, _, variant = place.partition("=")
        if variant != "*" and not table.keys_of_variant(section, variant, around):
            yield f"new variant {place}: {' '.join(own)}"
    yield from (f"new check   {name}: read it, and see whether a rule must know it" for name in _new(found, data))
    yield from (f"gone check  {name}" for name in data["validators"] if name not in found.validators)


def _new(found: Arguments, data: dict[str, Any]) -> list[str]:
    return [name for name in found.validators if name not in data["validators"]]


def add(found: Arguments, data: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """Return the table of values with one more version, after the others.

    Args:
        found: what the file declares.
        data: ``engine_values.json``.
        source: the row of ``sources`` for it.
    """
    earlier = [row["name"] for row in data["sources"]]
    groups: dict[str, dict[str, str]] = {**found.values}
    old = {place: rows for place, rows in data["values"].items() if place != "variants"}
    values = {
        place: _merged(old.get(place, {}), groups.get(place, {}), earlier, source)
        for place in dict.fromkeys((*old, *groups))
    }
    lists = {place: " ".join(names) for place, names in found.variants.items()}
    values["variants"] = _merged(data["values"].get("variants", {}), lists, earlier, source)
    return data | {
        "sources": [*data["sources"], source],
        "variants": data["variants"] | found.discriminators,
        "validators": found.validators,
        "values": values,
    }


def _merged(old: dict[str, Any], new: dict[str, str], earlier: list[str], source: dict[str, Any]) -> dict[str, Any]:
    """Add a version's texts to those of earlier ones; a key with the same text throughout has it alone."""
    name, partial = source["name"], source.get("partial", False)
    merged: dict[str, Any] = {}
    for key in dict.fromkeys((*old, *new)):
        before = old.get(key)
        rows = before if isinstance(before, dict) else {} if before is None else {earlier[0]: before}
        last = next(reversed(rows.values()), "")
        text = new.get(key, last if partial else "")
        rows = rows if text == last else {**rows, name: text}
        texts = {row for row in rows.values() if row}
        merged[key] = next(iter(texts)) if len(texts) == 1 else rows
    return merged
