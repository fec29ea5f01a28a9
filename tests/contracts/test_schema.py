# SPDX-License-Identifier: Apache-2.0
"""The JSON Schema of what stands in etcd and comes over NATS, against what is really written."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from tests.contracts.documents import WRITTEN
from tests.contracts.sources import FailureRecord, LifecycleEvent, WorkerRecord, json_schema


@pytest.mark.parametrize(
    ("kind", "fields_of"), [("record", WorkerRecord), ("failure", FailureRecord), ("event", LifecycleEvent)]
)
def test_every_name_that_is_written_is_in_it(kind: str, fields_of: type[Any]) -> None:
    part = json_schema()["$defs"][kind]
    assert set(part["properties"]) == {"schema", *(field.name for field in fields(fields_of))}
    for name, data in WRITTEN:
        if name == kind:
            assert set(json.loads(data)) <= set(part["properties"])
            assert set(part["required"]) <= set(json.loads(data))


def test_what_is_optional_may_be_missing() -> None:
    required = set(json_schema()["$defs"]["record"]["required"])
    assert {"schema", "role", "layout", "pid"} <= required
    assert not {"phase_since", "in_flight", "progress", "system", "trace", "instance", "attempt"} & required


def validator(kind: str) -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="it is among the dev extra")
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator({**schema, "anyOf": [{"$ref": f"#/$defs/{kind}"}]})


@pytest.mark.parametrize(("kind", "data"), WRITTEN)
def test_what_is_written_conforms_to_it(kind: str, data: bytes) -> None:
    assert [error.message for error in validator(kind).iter_errors(json.loads(data))] == []


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("record", {"schema": 2}),
        ("record", {"in_flight": "3"}),
        ("record", {"progress": {"done": 1}}),
        ("record", {"layout": None}),
        ("failure", {"exit_code": None}),
        ("event", {"event": "other"}),
    ],
)
def test_what_is_wrong_does_not(kind: str, changes: dict[str, Any]) -> None:
    content = json.loads(next(data for name, data in WRITTEN if name == kind))
    assert not validator(kind).is_valid({**content, **changes})
