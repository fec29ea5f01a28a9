# SPDX-License-Identifier: Apache-2.0
"""Names of ``typing`` without that module, for what a rank imports before the preflight's result.

Importing ``typing``, and its compilation of each annotation, would add a tenth to the CPU time of a rank that only starts MPI. For a type
checker these names are those of ``typing``; at run time the classes of `NamedTuple` are those of ``typing`` as far as they are used here,
without a check of the annotations and without the constructor that ``collections.namedtuple`` compiles for each class; the others have no
meaning.
"""

from __future__ import annotations

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any, NamedTuple, Protocol, TypeVar, cast
else:
    from _collections import _tuplegetter  # as `collections.namedtuple`; a property would be slower

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
            fields = tuple(members["__annotations__"])
            own = {key: value for key, value in members.items() if key not in fields}
            getters = {field: _tuplegetter(at, "") for at, field in enumerate(fields)}
            defaults = {field: members[field] for field in fields if field in members}
            standard = {"__slots__": (), "_fields": fields, "__match_args__": fields, "_field_defaults": defaults}
            return type(name, (_NamedTuple,), {**standard, **getters, **own})

    class _NamedTuple(tuple):
        __slots__ = ()

        def __new__(cls, *args: object, **named: object) -> object:
            if len(args) == len(cls._fields) and not named:
                return tuple.__new__(cls, args)
            rest = cls._fields[len(args) :]
            values = {**cls._field_defaults, **named}
            missing = [field for field in rest if field not in values]
            if missing or len(args) > len(cls._fields) or not named.keys() <= set(rest):
                raise TypeError(
                    f"{cls.__name__} takes {', '.join(cls._fields)}; got {len(args)} by position, and {', '.join(named)}"
                )
            return tuple.__new__(cls, (*args, *[values[field] for field in rest]))

        @classmethod
        def _make(cls, values: object) -> object:
            return cls(*values)

        def _asdict(self) -> dict[str, object]:
            return dict(zip(self._fields, self, strict=True))

        def _replace(self, /, **changes: object) -> object:
            if not changes.keys() <= set(self._fields):
                raise ValueError(
                    f"{type(self).__name__} has {', '.join(self._fields)}, not all of {', '.join(changes)}"
                )
            return type(self)(*[changes.get(field, value) for field, value in zip(self._fields, self, strict=True)])

        def __repr__(self) -> str:
            shown = ", ".join(f"{field}={value!r}" for field, value in zip(self._fields, self, strict=True))
            return f"{type(self).__name__}({shown})"

        def __getnewargs__(self) -> tuple[object, ...]:
            return tuple(self)

    NamedTuple = type.__new__(_NamedTupleType, "NamedTuple", (), {})

__all__ = ["TYPE_CHECKING", "Any", "NamedTuple", "Protocol", "TypeVar", "cast"]
