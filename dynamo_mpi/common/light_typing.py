# SPDX-License-Identifier: Apache-2.0
"""`TYPE_CHECKING` and `NamedTuple` without the module ``typing``, for the modules that every rank imports before the preflight's result.

Importing ``typing``, and its compilation of each annotation, would add a tenth to the CPU time of a rank that only starts MPI. For a type
checker these names are those of ``typing``; at run time `NamedTuple` makes the same classes, without a check of the annotations.
"""

from __future__ import annotations

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import NamedTuple
else:
    from collections import namedtuple

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

__all__ = ["TYPE_CHECKING", "NamedTuple"]
