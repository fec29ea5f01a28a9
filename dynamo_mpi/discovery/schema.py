# SPDX-License-Identifier: Apache-2.0
"""A JSON Schema (draft 2020-12) of the records in etcd and the events over NATS, made from their dataclasses. Pure."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

from dynamo_mpi.discovery.failure_records import FailureRecord
from dynamo_mpi.discovery.lifecycle_events import EVENTS, LifecycleEvent
from dynamo_mpi.discovery.records import SCHEMA, Progress, RecordedLayout, WorkerRecord
from dynamo_mpi.layout.contract import Contract

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_OBJECTS = {kind.__name__: kind for kind in (RecordedLayout, Contract, Progress, FailureRecord)}
_ENTRIES = {"record": WorkerRecord, "failure": FailureRecord, "event": LifecycleEvent}


def json_schema() -> dict[str, Any]:
    """Return one schema for all: ``#/$defs/record``, ``failure`` and ``event``. Other members are allowed: a newer version may write them."""
    definitions = {name: _entry(kind) for name, kind in _ENTRIES.items()}
    parts = {name: _object(kind) for name, kind in _OBJECTS.items() if kind is not FailureRecord}
    definitions["event"]["properties"]["event"] = {"enum": list(EVENTS)}
    return {
        "$schema": _DIALECT,
        "title": f"dynamo_mpi, schema {SCHEMA}: worker records, failure records and lifecycle events",
        "anyOf": [{"$ref": f"#/$defs/{name}"} for name in _ENTRIES],
        "$defs": {**definitions, **parts},
    }


def _entry(kind: type[Any]) -> dict[str, Any]:
    found = _object(kind)
    return {
        **found,
        "required": ["schema", *found["required"]],
        "properties": {"schema": {"const": SCHEMA}, **found["properties"]},
    }


def _object(kind: type[Any]) -> dict[str, Any]:
    members = fields(kind)
    return {
        "type": "object",
        "required": [field.name for field in members if field.default is MISSING],
        "properties": {field.name: _value(field) for field in members},
    }


def _value(field: Field[Any]) -> dict[str, Any]:
    if field.type == "tuple[str, ...]":
        return {"type": "array", "items": {"type": "string"}}
    if str(field.type).startswith("dict["):
        return {"type": ["object", "null"] if str(field.type).endswith("| None") else "object"}
    first, *rest = str(field.type).split(" | ")
    found = _TYPES.get(first)
    if found is not None:
        return {"type": [found, "null"] if rest else found}
    name = "failure" if first == FailureRecord.__name__ else first
    reference = {"$ref": f"#/$defs/{name}"}
    return {"anyOf": [reference, {"type": "null"}]} if rest else reference
