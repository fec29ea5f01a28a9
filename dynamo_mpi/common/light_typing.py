# SPDX-License-Identifier: Apache-2.0
"""Names of ``typing`` without that module, for what a rank imports before the preflight's result.

Importing ``typing``, and its compilation of each annotation, would add a tenth to the CPU time of a rank that only starts MPI. For a type
checker these names are those of ``typing``; at run time `NamedTuple` makes the same classes, without a check of the annotations, and the
others have no meaning.
"""

from __future__ import annotations

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any, NamedTuple, Protocol, TypeVar, cast
else:
    from collections import namedtuple

    Any = object

    class Protocol:
        """A base class without meaning at run time."""

    def cast(_: object, value: object) -> object:
        """Return ``value``."""
        return value

    def TypeVar(name: str, **_: object) -> str:
        """Return a name in place of a type variable."""
        return name

    class _NamedTupleType(type):
        def __new__(cls, name: str, bases: tuple[type, ...], members: dict[str, object]) -> type:
            fields = members["__annotations__"]
            defaults = [members[field] for field in fields if field in members]
            made = namedtuple(name, fields, defaults=defaults, module=members["__module__"])
            for key, value in members.items():
                if key not in fields and key not in ("__module__", "__qualname__"):
                    setattr(made, key, value)
            return made

    NamedTuple = type.__new__(_NamedTupleType, "NamedTuple", (), {})

__all__ = ["TYPE_CHECKING", "Any", "NamedTuple", "Protocol", "TypeVar", "cast"]
