# SPDX-License-Identifier: Apache-2.0
"""``python -m tools.compare_engine_args LLM_ARGS.PY --version V``: prints what the tables lack, and with ``--write`` adds it.

The file is read, never run. ``--write`` adds its values to ``engine_values.json``; new and gone keys go into ``engine_keys.json`` by
hand, with the marks that are printed, because their place in a section's list is for people to read.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.layout import engine_values
from dynamo_mpi.layout.engine_keys import engine_keys
from dynamo_mpi.layout.trtllm_version import parse_trtllm_version
from tools.compare_engine_args.source import ROOT, read_source
from tools.compare_engine_args.table import add, compare

TABLE = Path(engine_values.__file__).with_name("engine_values.json")


def main(words: list[str] | None = None) -> int:
    """Run the tool; return 1 if something differs, 2 for a file or a version that can't be read."""
    parser = argparse.ArgumentParser(prog="python -m tools.compare_engine_args", description=__doc__)
    parser.add_argument("file", type=Path, help="tensorrt_llm/llmapi/llm_args.py of that version")
    parser.add_argument("--version", required=True, help="its version of TensorRT-LLM, such as 1.3.0rc29")
    parser.add_argument("--write", action="store_true", help="add the version to engine_values.json")
    parser.add_argument("--commit", default="", help="its commit, for the table")
    parser.add_argument("--date", default="", help="the commit's date, for the table")
    parser.add_argument("--root", default=ROOT, help="the class of the top level")
    parser.add_argument("--table", type=Path, default=TABLE, help="another engine_values.json")
    arguments = parser.parse_args(words)
    data = json.loads(arguments.table.read_text(encoding="utf-8"))
    try:
        version = parse_trtllm_version(arguments.version)
        found = read_source(arguments.file.read_text(encoding="utf-8"), arguments.root)
    except (OSError, SyntaxError, ValueError, UsageError) as error:
        print(f"{arguments.file}: {error}", file=sys.stderr)
        return 2
    lines = list(compare(found, data, engine_keys(), version))
    print("\n".join([*lines, _counted(lines)]))
    if arguments.write:
        source = {"name": str(version), "from": str(version), "to": str(version)}
        source |= {"file": "tensorrt_llm/llmapi/llm_args.py", "commit": arguments.commit, "date": arguments.date}
        arguments.table.write_text(dump(add(found, data, source)), encoding="utf-8")
        since = ".".join(map(str, version.minor))
        print(
            f"written: {arguments.table.name}; mark new keys NAME@{since} and gone keys NAME<{since} in engine_keys.json"
        )
    return 1 if lines else 0


def _counted(lines: list[str]) -> str:
    kinds: dict[str, int] = {}
    for line in lines:
        kind = " ".join(line[:12].split())
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "no difference"


def dump(data: dict[str, Any]) -> str:
    """Return the table as JSON: a line for each key."""

    def rows(name: str, group: dict[str, Any], indent: str) -> str:
        lines = [f"{indent}  {json.dumps(key)}: {json.dumps(value)}" for key, value in group.items()]
        return f"{indent}{json.dumps(name)}: {{\n" + ",\n".join(lines) + f"\n{indent}}}"

    def listed(name: str, items: list[Any]) -> str:
        return f'"{name}": [\n' + ",\n".join(f"  {json.dumps(item)}" for item in items) + "\n]"

    values = ",\n".join(rows(place, group, "  ") for place, group in data["values"].items())
    parts = [listed(name, data[name]) for name in ("about", "sources")]
    parts.append(f'"variants": {json.dumps(data["variants"])}')
    parts.append(listed("validators", data["validators"]))
    parts.append(rows("code", data["code"], ""))
    parts.append(listed("key_conflicts", data["key_conflicts"]))
    parts.append(f'"values": {{\n{values}\n}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
