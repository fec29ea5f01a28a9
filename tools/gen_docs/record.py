# SPDX-License-Identifier: Apache-2.0
"""``docs/reference/record.md``: what a worker says of itself in etcd and over NATS, from the classes that write it."""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from dynamo_mpi.discovery.records import SCHEMA, WorkerRecord
from tools.gen_docs.markdown import WRITTEN, argument_notes, code, plain, table


class _Kind(NamedTuple):
    title: str
    module: str
    name: str
    intro: str


# the first stands at a key or subject, the others are part of it
_KINDS = (
    _Kind(
        "Worker record",
        "dynamo_mpi.discovery.records",
        "WorkerRecord",
        "One for each worker, from its preflight to its end, under a lease of its own.",
    ),
    _Kind("… its layout", "dynamo_mpi.discovery.records", "RecordedLayout", ""),
    _Kind("… its contract", "dynamo_mpi.layout.contract", "Contract", ""),
    _Kind("… its progress", "dynamo_mpi.discovery.records", "Progress", ""),
    _Kind(
        "Failure record",
        "dynamo_mpi.discovery.failure_records",
        "FailureRecord",
        "Under a lease of 3600 s: what ended a worker that did not end in order.",
    ),
    _Kind(
        "Lifecycle event",
        "dynamo_mpi.discovery.lifecycle_events",
        "LifecycleEvent",
        "Over NATS, where `NATS_SERVER` is set or the request plane is `nats`.",
    ),
)
_CONSTANT = re.compile(r"`([A-Z][A-Z_]+)`")
_HEAD = f"""# Records

{WRITTEN}
JSON of schema {SCHEMA}, which every entry says as `"schema"`. What is only added is no new schema: a reader leaves alone what it
doesn't know, and takes a member that is missing for its default.

| where | what | how long |
|---|---|---|
| etcd `dynamo_mpi/v1/worlds/NAMESPACE/COMPONENT/LEASE` | worker record | as its lease: at most `ETCD_LEASE_TTL` longer than the worker |
| etcd `dynamo_mpi/v1/failures/NAMESPACE/COMPONENT/LEASE` | failure record | an hour |
| NATS `dynamo_mpi.v1.NAMESPACE.COMPONENT.EVENT` | lifecycle event | not kept |
| etcd `v1/…` | Dynamo's own registration | Dynamo's |

`LEASE` is the worker's lease in hexadecimal, as Dynamo writes instances. To look:

    etcdctl --endpoints "$ETCD_ENDPOINTS" get --prefix dynamo_mpi/v1/
    etcdctl --endpoints "$ETCD_ENDPOINTS" watch --prefix dynamo_mpi/v1/worlds/

An etcd of `launch` wants the job's certificate (`--cacert`, `--cert`, `--key`): the run folder's `services.json` has the three
as texts. A user of etcd needs `readwrite` on `dynamo_mpi/`.
"""


def render() -> str:
    """Return the page."""
    return _HEAD + "".join(filter(None, map(_section, _KINDS))) + _schema()


def _section(kind: _Kind) -> str:
    found = _find(kind.module, kind.name)
    if found is None:
        return ""
    notes = argument_notes(found)
    # what several have alike is described once, in the record
    common = argument_notes(WorkerRecord)
    meanings = {
        name: common.get(name, "") if note == "" or note.startswith("as in `") else note
        for name, note in ((field.name, notes.get(field.name, "")) for field in fields(found))
    }
    rows = [
        (
            code(field.name),
            code(str(field.type)),
            _default(field.default),
            _spelt_out(meanings[field.name], kind.module),
        )
        for field in fields(found)
    ]
    intro = f"{kind.intro} " if kind.intro else ""
    said = plain((found.__doc__ or "").partition("Args:")[0])
    return f"\n## {kind.title}\n\n{intro}{said}\n\n{table(('member', 'type', 'default', 'meaning'), rows)}"


def _spelt_out(note: str, module: str) -> str:
    """Put a module's constants in place of their names."""
    values = vars(importlib.import_module(module))
    return _CONSTANT.sub(
        lambda match: code(*values[match[1]]) if isinstance(values.get(match[1]), tuple) else match[0], note
    )


def _schema() -> str:
    if importlib.util.find_spec("dynamo_mpi.discovery.schema") is None:
        return ""
    return (
        "\n## As a JSON Schema\n\n"
        "    python -c 'import json; from dynamo_mpi.discovery.schema import json_schema; print(json.dumps(json_schema(), indent=1))'\n"
    )


def _find(module: str, name: str) -> type[Any] | None:
    if importlib.util.find_spec(module) is None:
        return None
    return getattr(importlib.import_module(module), name, None)


def _default(default: Any) -> str:
    if default is MISSING:
        return "required"
    return "null" if default is None else code(str(default))
