# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses that are made in microseconds, for what `dynamo-mpi check` imports.

The standard library's `dataclasses` imports `inspect`, `ast` and `tokenize`, and compiles six methods for each class: for 40 classes that
took a third of a cold `check`. For a type checker these names are the standard library's. At run time they have its meaning, as far as it is
used here: no inheritance of fields, no class that can change. The standard library's `fields`, `asdict` and `replace` work with them too.
"""

from __future__ import annotations

from operator import attrgetter

from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import dataclass, field, replace
else:

    def dataclass(*, frozen: bool, order: bool = False) -> Callable[[type], type]:
        """Return a class decorator.

        Args:
            frozen: True; the standard library makes classes that can change.
            order: whether instances can be compared by ``<``.
        """
        if not frozen:
            raise TypeError("a class that can change needs the standard library's dataclasses")

        def decorate(cls: type) -> type:
            _add_methods(cls, _Fields(cls), order)
            return cls

        return decorate

    def field(**settings: Any) -> _Field:
        """Return a field's settings: ``default`` or ``default_factory``, ``init``, ``compare``, ``repr``."""
        return _Field(settings)

    def replace(instance: Any, /, **changes: Any) -> Any:
        """Return a copy with other values."""
        fields = vars(type(instance)).get("__dataclass_fields__")
        if not isinstance(fields, _Fields):
            import dataclasses

            return dataclasses.replace(instance, **changes)
        values = vars(instance)
        return type(instance)(**{name: values[name] for name in fields.init} | changes)


__all__ = ["dataclass", "field", "replace"]


_MISSING = object()


class _Field:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings


class _Fields:
    """The fields of a class. As its attribute ``__dataclass_fields__`` it gives the standard library's description of them."""

    def __init__(self, cls: type) -> None:
        self._cls = cls
        self._standard: dict[str, Any] = {}
        self._settings: dict[str, dict[str, Any]] = {}
        for name in cls.__annotations__:
            given = cls.__dict__.get(name, _Field({}))
            settings = self._settings[name] = given.settings if isinstance(given, _Field) else {"default": given}
            if "default" in settings:
                setattr(cls, name, settings["default"])
            elif name in cls.__dict__:
                delattr(cls, name)
        self.init, self.shown, self.compared = map(self._with, ("init", "repr", "compare"))
        self.defaults = {name: given["default"] for name, given in self._settings.items() if "default" in given}
        self.factories = {
            name: given["default_factory"] for name, given in self._settings.items() if "default_factory" in given
        }

    def __get__(self, instance: object, cls: type) -> dict[str, Any]:
        if not self._standard:
            import dataclasses

            members = {name: dataclasses.field(**settings) for name, settings in self._settings.items()}
            annotations = self._cls.__annotations__
            twin = type(self._cls.__name__, (), {**members, "__annotations__": annotations, "__doc__": ""})
            self._standard = vars(dataclasses.dataclass(frozen=True)(twin))["__dataclass_fields__"]
        return self._standard

    def _with(self, setting: str) -> tuple[str, ...]:
        return tuple(name for name, settings in self._settings.items() if settings.get(setting, True))

    def wrong_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return what is wrong with a constructor's arguments."""
        placed = self.init[: len(args)]
        optional = (*self.defaults, *self.factories)
        missing = [name for name in self.init if name not in (*placed, *kwargs) and name not in optional]
        extra = [name for name in kwargs if name not in self.init or name in placed]
        return f"{self._cls.__name__} takes {', '.join(self.init)}; got {len(args)} by position; missing: {missing}, unexpected: {extra}"


def _add_methods(cls: Any, fields: _Fields, order: bool) -> None:
    init, compared, finish = fields.init, fields.compared, vars(cls).get("__post_init__")
    template = {name: fields.defaults.get(name, _MISSING) for name in init}
    required = [name for name in init if name not in fields.defaults]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        values = self.__dict__
        values.update(template)
        values.update(zip(init, args, strict=False))
        values.update(kwargs)
        for name in required:
            if values[name] is _MISSING:
                if name not in fields.factories:
                    raise TypeError(fields.wrong_arguments(args, kwargs))
                values[name] = fields.factories[name]()
        if len(values) != len(init) or (
            args and not (len(args) <= len(init) and kwargs.keys().isdisjoint(init[: len(args)]))
        ):
            raise TypeError(fields.wrong_arguments(args, kwargs))
        if finish is not None:
            finish(self)

    # with one name, attrgetter returns no tuple; what is added counts for nothing
    key = attrgetter(*compared, "__class__", "__class__")

    def __repr__(self: Any) -> str:
        return f"{cls.__qualname__}({', '.join(f'{name}={self.__dict__[name]!r}' for name in fields.shown)})"

    def __eq__(self: Any, other: object) -> Any:
        return key(self) == key(other) if other.__class__ is cls else NotImplemented

    def __hash__(self: Any) -> int:
        return hash(key(self))

    def __lt__(self: Any, other: object) -> Any:
        return key(self) < key(other) if other.__class__ is cls else NotImplemented

    def __le__(self: Any, other: object) -> Any:
        return key(self) <= key(other) if other.__class__ is cls else NotImplemented

    def __setattr__(self: Any, name: str, value: object) -> None:
        _refuse(f"cannot assign to field {name!r}")

    def __delattr__(self: Any, name: str) -> None:
        _refuse(f"cannot delete field {name!r}")

    members: dict[str, object] = {"__dataclass_fields__": fields, "__match_args__": init}
    methods = [__init__, __eq__, __hash__, __setattr__, __delattr__, *([__lt__, __le__] if order else [])]
    for method in (*methods, *(() if "__repr__" in vars(cls) else (__repr__,))):
        method.__qualname__ = f"{cls.__qualname__}.{method.__name__}"
        members[method.__name__] = method
    for name, member in members.items():
        setattr(cls, name, member)


def _refuse(problem: str) -> None:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(problem)
