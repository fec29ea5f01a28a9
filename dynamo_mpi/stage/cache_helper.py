# SPDX-License-Identifier: Apache-2.0
"""A process that reads or writes archives of compile caches for a rank: ``python -m dynamo_mpi.stage.cache_helper``.

It is a process of its own, so that a file system that hangs doesn't hang the rank, and so that packing takes neither the interpreter nor the
core of a rank that serves. It gets one JSON line on stdin, and answers with one on stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from typing import IO, Any

from dynamo_mpi.common.affinity import release
from dynamo_mpi.common.folder_walk import UnsafeFileError
from dynamo_mpi.common.process import set_process_title
from dynamo_mpi.layout.format import gib
from dynamo_mpi.stage.cache_archive import ArchiveError, Contents, contents_of, copy_checked, pack, unpack
from dynamo_mpi.stage.cache_call import Problem
from dynamo_mpi.stage.cache_store import (
    Part,
    discard,
    forget_start,
    look,
    may_have_failed,
    note_start,
    publish,
    read_part,
    write_part,
)
from dynamo_mpi.stage.file_system import free_bytes

TITLE = "dynamo_mpi: compile caches"
"""The process's title."""
SEEDED = ".lock-seeded.json"
"""What a rank's folder had when it was seeded; like all names that begin so, it isn't part of an archive."""
_SPARE_BYTES = 256 << 20
_NICE = 19


def seed(request: dict[str, Any]) -> dict[str, Any]:
    """Unpack a rank's part of an archive into its folder."""
    began, folder, part = time.monotonic(), str(request["folder"]), Part(*request["part"])
    free, needed = free_bytes(folder), int(request.get("ranks", 1)) * (2 * part.size + _SPARE_BYTES)
    if free < needed:
        raise ArchiveError(
            f"{folder} has too little room: {gib(free)} of {gib(needed)}",
            "room for the archives of all ranks of the node, and as much to unpack them",
            "make room on that node, or name another disk with --stage or TMPDIR",
        )
    if request.get("worker"):
        note_start(request["source"], request["worker"])
    # on this node's disk: what is checked is what is unpacked, whatever happens to the shared file meanwhile
    with tempfile.TemporaryFile(dir=folder) as copy:
        read_part(request["source"], part, lambda source: copy_checked(source, copy, part.size, part.digest))
        copy.seek(0)
        unpack(copy, folder)
    contents = contents_of(folder)
    with open(os.path.join(folder, SEEDED), "w", encoding="utf-8") as file:
        json.dump({"part": list(part), "files": contents.files}, file)
    seconds = round(time.monotonic() - began, 3)
    return {"files": len(contents.files), "bytes": contents.size, "seconds": seconds, "json": contents.json}


def save(request: dict[str, Any]) -> dict[str, Any]:
    """Write a rank's part of an archive, if something is new in its folder."""
    os.nice(_NICE)
    folder = str(request["folder"])
    before, old = Contents({}), None
    with contextlib.suppress(OSError), open(os.path.join(folder, SEEDED), encoding="utf-8") as file:
        seeded = json.load(file)
        before = Contents({path: (size, at) for path, (size, at) in seeded["files"].items()})
        old = Part(*seeded["part"])
    new = contents_of(folder).new_beside(before)
    if old is not None and not new:
        return {"part": list(old), "new": 0, "written": False, "json": before.json}
    packed: list[Contents] = []

    def write(target: IO[bytes]) -> tuple[str, int]:
        digest, contents = pack(folder, target)
        packed.append(contents)
        return digest, len(contents.files)

    part = write_part(request["target"], write)
    contents = packed[-1]
    return {"part": list(part), "new": contents.new_beside(before), "written": True, "json": contents.json}


def look_up(request: dict[str, Any]) -> dict[str, Any]:
    """Look for an archive, first for this user's own. What is wrong with one of root's is a line, as others can't correct it."""
    answer: dict[str, Any] = {"skipped": []}
    for number, path in enumerate(request["folders"]):
        try:
            found = look(path, request["key"], request["ranks"])
        except (OSError, ArchiveError) as error:
            is_refused = isinstance(error, PermissionError)
            if number == 0:
                answer |= {**Problem.of(error, path)._asdict(), "refused": is_refused}
                if isinstance(error, ArchiveError):
                    break  # it is replaced
            elif isinstance(error, UnsafeFileError) or not is_refused:
                answer["skipped"].append(Problem.of(error, path).problem)
            continue
        if found is not None:
            failed = may_have_failed(found.folder, request["worker"])
            return answer | {"folder": path, "parts": [list(part) for part in found.parts], "failed": failed}
    return answer


def handle(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request; a problem if it can't be done."""
    try:
        if request["do"] == "look":
            return look_up(request)
        if request["do"] == "seed":
            return seed(request)
        if request["do"] == "save":
            return save(request)
        if request["do"] == "forget":
            forget_start(request["source"], request["worker"])
            return {}
        if request["do"] == "discard":
            return {"removed": discard(request["target"], request["digests"])}
        return {"removed": publish(request["target"], request["key"], [Part(*part) for part in request["parts"]])}
    except (OSError, ArchiveError) as error:
        problem = Problem.of(error, request.get("source") or request.get("target") or "")
        return {**problem._asdict(), "refused": isinstance(error, UnsafeFileError)}


def main() -> None:
    """Run as a rank's helper."""
    set_process_title(TITLE)
    # so that what is written in part is removed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    release()  # a rank is often bound to one core
    answer = handle(json.loads(sys.stdin.readline()))
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
