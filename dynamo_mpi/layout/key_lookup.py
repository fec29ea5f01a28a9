# SPDX-License-Identifier: Apache-2.0
"""Looks up keys of the engine YAML for one version of TensorRT-LLM: known keys, renamed keys, and the key that was probably meant."""

from __future__ import annotations

from functools import cache
from itertools import chain

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.engine_keys import engine_keys
from dynamo_mpi.layout.trtllm_version import parse_trtllm_version

if TYPE_CHECKING:
    from dynamo_mpi.layout.engine_keys import EngineKeys, Renamed
    from dynamo_mpi.layout.trtllm_version import TrtllmVersion

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
