# SPDX-License-Identifier: Apache-2.0
"""Which keys of a model's config were read, and which of the others matter: a new family's key that is never read must show."""

from __future__ import annotations

import os
import re
from functools import cache

from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_FILE = os.path.join(os.path.dirname(__file__), "harmless_keys.txt")
# sections whose keys are judged elsewhere, or that no size of the language model comes from
_OTHER_SECTIONS = re.compile(r"(vision|visual|audio|image|speech|code2wav|talker|generation|processor|tokenizer).*")
_WHICH_LAYERS = re.compile(r".*((layer|block)s?_(types?|pattern|ids?|indices|list|enum)|attn_idxs|hybrid).*")
_MOST_NAMED = 40
_QUANTISATION = "quantization_config."


@cache
def harmless_keys() -> frozenset[str]:
    """Return the keys that can't change a figure, from the list beside this module."""
    with open(_FILE, encoding="utf-8") as stream:
        lines = stream.read().splitlines()
    return frozenset(key for line in lines if not line.startswith("#") for key in line.split())


class TrackedKeys(dict[str, Any]):
    """A mapping that remembers which of its keys were asked for; so do the mappings in it."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, and remember its key."""
        self.asked.add(key)
        value = super().get(key, default)
        if type(value) is dict:
            value = TrackedKeys(value)
            super().__setitem__(key, value)
        return value

    def __getitem__(self, key: str) -> Any:
        """Return a value, and remember its key."""
        if key not in self:
            raise KeyError(key)
        return self.get(key)

    def items(self) -> Any:
        """Return everything, and remember that."""
        self.asked.update(self)
        return super().items()

    def unread(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Yield the keys that were never asked for, with their values, except harmless ones and those without a value.

        Args:
            prefix: the keys above this mapping, with a dot after each.
        """
        inside = prefix.endswith(_QUANTISATION)
        harmless = harmless_keys()
        for key in self:
            value = super().get(key)
            name = _printable(key)
            if _OTHER_SECTIONS.fullmatch(key):
                continue
            if isinstance(value, TrackedKeys) and not inside:
                yield from value.unread(f"{prefix}{name}.")
            elif key not in self.asked and (_QUANTISATION * inside + key) not in harmless and not _says_nothing(value):
                yield f"{prefix}{name}", value


def _printable(key: str) -> str:
    # JSON can contain a lone surrogate, which can't be printed
    return key[:80].encode("ascii", "backslashreplace").decode()


def _says_nothing(value: object) -> bool:
    return value is None or value == {} or value == [] or value == ""


def judge_unread(config: TrackedKeys) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Sort the keys of a config that weren't read.

    Returns:
        All of them; those that may change a figure; and those that say which layer is of which kind, without which there is no figure.
        A number with a fraction, zero, or a switch that is off changes no size.
    """
    found = list(config.unread())
    inexact = [name for name, value in found if not (isinstance(value, float) or value is False or value == 0)]
    kinds = [
        name
        for name, value in found
        if isinstance(value, list | str) and _WHICH_LAYERS.fullmatch(name.rpartition(".")[2].lower())
    ]
    return tuple(name for name, _ in found[:_MOST_NAMED]), tuple(inexact[:_MOST_NAMED]), tuple(kinds[:_MOST_NAMED])
