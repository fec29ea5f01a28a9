# SPDX-License-Identifier: Apache-2.0
"""Writes a value as YAML on one line, so that a user can paste it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    import yaml

LONGEST = 2000
"""Characters of a value that is written in full."""
_CUT = "..."


def yaml_line(value: object) -> str:
    """Return a value as YAML on one line, in ASCII; aliases are written out. Read back, it is the same value.

    Args:
        value: as a YAML or JSON reader returns it, without a reference to itself.

    Raises:
        RecursionError: it is nested too deeply.
        ValueError: it has a number that Python doesn't write.
    """
    import yaml

    # in a list, where no scalar takes the block style or an end marker of its own
    line: str = yaml.dump([value], None, _dumper(), default_flow_style=True, width=math.inf, sort_keys=False)
    return line[1:-2]


def short_line(value: object, limit: int) -> str:
    """Return a value as YAML on one line, cut to ``limit`` characters; values that can't be written in full are described."""
    if isinstance(value, str):
        value = value[:LONGEST]
    line = _line_within(value, LONGEST)
    return shortened("<a value too long to be shown>" if line is None else line, limit)


def whole(value: object) -> object:
    """Return the value itself if it can be written in full, else text that stands for it."""
    return value if _line_within(value, LONGEST) is not None else "<the value that is there>"


def shortened(text: str, limit: int) -> str:
    """Cut text that is longer than ``limit``, and show that it was."""
    return text if len(text) <= limit else text[: limit - len(_CUT)] + _CUT


def _line_within(value: object, limit: int) -> str | None:
    """Return a value's line; None if it is longer than ``limit``, even if endless."""
    rest, left = [value], limit
    while rest and left > 0:
        item = rest.pop()
        left -= len(item) if isinstance(item, str | bytes) else 1
        if isinstance(item, Mapping):
            rest += [*item, *item.values()]
        elif isinstance(item, list | tuple | set):
            rest += item
    if left <= 0:
        return None
    try:
        line = yaml_line(value)
    except RecursionError:
        return None
    except ValueError:
        return "<a very large number>"
    return line if len(line) <= limit else None


@cache
def _dumper() -> type[yaml.SafeDumper]:
    # not at the top: ranks import this module's neighbours, but only a finding needs a YAML writer
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

        def represent_scalar(self, tag: str, value: str, style: str | None = None) -> yaml.ScalarNode:
            # the other styles break the line where the text does
            return super().represent_scalar(tag, value, '"' if "\n" in value else None)

    return Dumper
