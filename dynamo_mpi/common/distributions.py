# SPDX-License-Identifier: Apache-2.0
"""Versions of installed distributions, from their metadata.

``importlib.metadata`` imports ``email``, ``zipfile`` and ``tempfile``, 60 modules in all: a fifth of what rank 0 would execute before the
preflight's result. It also lists each folder of ``sys.path`` again for each name.
"""

from __future__ import annotations

import os
import sys

from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

# the file of each kind that begins with the headers; a single file in the old form is this file itself
_KINDS = {".dist-info": "METADATA", ".egg-info": "PKG-INFO"}


def installed_versions(names: Collection[str], path: Sequence[str] | None = None) -> dict[str, str]:
    """Return the versions of those ``names`` that are installed; "" if the metadata has no version.

    Like the import system, the first folder wins. Packages inside zip files are not found.

    Args:
        names: names of distributions, in any spelling: ``tensorrt_llm`` and ``tensorrt-llm`` are one.
        path: the folders; None takes ``sys.path``.
    """
    wanted = {_normalised(name): name for name in names}
    found: dict[str, str] = {}
    for folder in sys.path if path is None else path:
        for entry, kind in _metadata_in(folder or os.curdir):
            name = wanted.get(_normalised(entry.removesuffix(kind).split("-")[0]))
            if name is not None and name not in found:
                found[name] = _version(os.path.join(folder or os.curdir, entry), _KINDS[kind])
    return found


def _normalised(name: str) -> str:
    """Return the one spelling of a name. Source: packaging.python.org, "Names and normalization"."""
    return "-".join(part for part in name.lower().replace("_", "-").replace(".", "-").split("-") if part)


def _metadata_in(folder: str) -> Iterable[tuple[str, str]]:
    try:
        entries = sorted(os.listdir(folder))
    except OSError:  # a zip file, or a folder that isn't there
        return
    for entry in entries:
        kind = os.path.splitext(entry)[1]
        if kind in _KINDS:
            yield entry, kind


def _version(path: str, file: str) -> str:
    headers = os.path.join(path, file) if os.path.isdir(path) else path
    try:
        with open(headers, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.lower() == "version":
                    return value.strip()
                if not line.strip():
                    break  # the description begins
    except OSError:
        pass
    return ""
