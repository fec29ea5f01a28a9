# SPDX-License-Identifier: Apache-2.0
"""Reads the arguments out of an ``llm_args.py`` by its syntax: the file is never imported, and TensorRT-LLM needn't be installed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

ROOT = "TorchLlmArgs"
_PLAIN = {
    **{name: name for name in ("int", "float", "bool", "str")},
    "StrictInt": "int!",
    "Path": "str",
    "dict": "map",
    "Dict": "map",
    "Mapping": "map",
    "PositiveInt": "int >0",
    "NonNegativeInt": "int >=0",
    "PositiveFloat": "float >0",
    "NonNegativeFloat": "float >=0",
    "list": "[any]",
    "List": "[any]",
}
_LISTS = ("List", "list", "Set", "set", "Sequence", "FrozenSet", "frozenset")
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Arguments:
    """What one file declares.

    Args:
        values: the spec of each key, by section and name; keys that differ between a section's variants are under ``SECTION=VARIANT``.
        discriminators: the key that selects a section's variant.
        variants: the names of the keys of each ``SECTION=VARIANT``; under ``SECTION=*`` those that all have.
        validators: functions that can refuse a value, as ``Class.function``.
    """

    values: dict[str, dict[str, str]]
    discriminators: dict[str, str]
    variants: dict[str, list[str]]
    validators: list[str]


@dataclass
class _Field:
    annotation: ast.expr
    settings: dict[str, ast.expr] = field(default_factory=dict)


def read_source(text: str, root: str = ROOT) -> Arguments:
    """Read a file's text.

    Args:
        text: of ``llm_args.py``.
        root: the class of the top level.

    Raises:
        SyntaxError: it isn't Python.
        ValueError: it has no such class.
    """
    reader = _Reader(text, root)
    reader.walk("", [root])
    return Arguments(reader.values, reader.discriminators, reader.variants, reader.validators())


class _Reader:
    def __init__(self, text: str, root: str) -> None:
        self._classes: dict[str, ast.ClassDef] = {}
        self._aliases: dict[str, ast.expr] = {}
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                self._classes[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self._aliases[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                self._aliases[node.target.id] = node.value
        if root not in self._classes:
            raise ValueError(f"no class {root}")
        self.values: dict[str, dict[str, str]] = {}
        self.discriminators: dict[str, str] = {}
        self.variants: dict[str, list[str]] = {}
        self._read: set[str] = set()

    def validators(self) -> list[str]:
        """Return the validators of the classes that were read, as far as they can refuse something."""
        return sorted(
            f"{name}.{node.name}"
            for name in self._read
            for node in self._classes[name].body
            if isinstance(node, ast.FunctionDef)
            and any("validator" in ast.unparse(decorator) for decorator in node.decorator_list)
            and any(isinstance(inner, ast.Raise | ast.Assert) for inner in ast.walk(node))
        )

    def walk(self, path: str, names: list[str], discriminator: str | None = None) -> None:
        """Read a section, of one class or of one of several variants, and the sections below it."""
        by_variant: dict[str, dict[str, _Field]] = {}
        for name in names:
            fields = self._fields(name)
            variant = self._literals(fields[discriminator].annotation)[0] if discriminator else ""
            by_variant[variant] = fields
        keys = dict.fromkeys(key for fields in by_variant.values() for key in fields)
        own = self.values.setdefault(path, {})
        for key in keys:
            specs = {variant: self._spec(fields[key]) for variant, fields in by_variant.items() if key in fields}
            if key == discriminator:
                own[key] = "=" + "|".join(by_variant)
            elif len(set(specs.values())) == 1:
                own[key] = next(iter(specs.values()))
            else:
                for variant, spec in specs.items():
                    self.values.setdefault(f"{path}={variant}", {})[key] = spec
            inner = next(fields[key] for fields in by_variant.values() if key in fields)
            models, selector = self._models(inner.annotation)
            if models:
                self.walk(f"{path}.{key}" if path else key, models, selector)
        if discriminator:
            common = [key for key in keys if all(key in fields for fields in by_variant.values())]
            self.discriminators[path] = discriminator
            self.variants[f"{path}=*"] = common
            for variant, fields in by_variant.items():
                self.variants[f"{path}={variant}"] = [discriminator, *(key for key in fields if key not in common)]

    def _fields(self, name: str) -> dict[str, _Field]:
        node = self._classes.get(name)
        if node is None:
            return {}
        self._read.add(name)
        fields: dict[str, _Field] = {}
        for base in node.bases:
            fields |= self._fields(_last_name(base))
        for statement in node.body:
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            key, value = statement.target.id, statement.value
            call = value if isinstance(value, ast.Call) else None
            if key.startswith("_") or _last_name(statement.annotation) == "ClassVar":
                continue
            if call is not None and _last_name(call.func) == "PrivateAttr":
                continue
            settings = {word.arg: word.value for word in call.keywords if word.arg} if call is not None else {}
            for spelling in _spellings(key, settings):
                fields[spelling] = _Field(statement.annotation, settings)
        return fields

    def _spec(self, declared: _Field) -> str:
        choices = [_limited(choice, declared.settings) for choice in dict.fromkeys(self._choices(declared.annotation))]
        null = "null" in choices
        choices = [choice for choice in choices if choice != "null"]
        text = "any" if "any" in choices else " / ".join(choices)
        return f"{text} ?" if null and text != "any" else text

    def _choices(self, node: ast.expr) -> Iterator[str]:
        if isinstance(node, ast.Constant):
            if node.value is None:
                yield "null"
            elif isinstance(node.value, str):
                yield from self._choices(ast.parse(node.value, mode="eval").body)
        elif isinstance(node, ast.BinOp):
            yield from self._choices(node.left)
            yield from self._choices(node.right)
        elif isinstance(node, ast.Subscript):
            yield from self._subscript(_last_name(node.value), node)
        else:
            yield self._named(_last_name(node))

    def _subscript(self, name: str, node: ast.Subscript) -> Iterator[str]:
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name in ("Optional", "Union"):
            for item in items:
                yield from self._choices(item)
            if name == "Optional":
                yield "null"
        elif name == "Annotated":
            settings = {
                word.arg: word.value
                for item in items[1:]
                if isinstance(item, ast.Call)
                for word in item.keywords
                if word.arg
            }
            for choice in self._choices(items[0]):
                yield _limited(choice, settings)
        elif name == "Literal":
            yield "=" + "|".join(self._literals(node))
        elif name in _LISTS:
            inner = list(dict.fromkeys(self._choices(items[0])))
            yield f"[{inner[0]}]" if len(inner) == 1 else "[any]"
        else:
            yield (
                "map"
                if name in ("dict", "Dict", "Mapping", "defaultdict")
                else "[any]"
                if name in ("tuple", "Tuple")
                else "any"
            )

    def _named(self, name: str) -> str:
        if name in _PLAIN:
            return _PLAIN[name]
        if name in self._aliases:
            return "section" if self._models(self._aliases[name])[0] else " / ".join(self._choices(self._aliases[name]))
        node = self._classes.get(name)
        if node is None:
            return "any"
        if self._is_enum(node):
            return "=" + "|".join(_members(node))
        return "section"

    def _is_enum(self, node: ast.ClassDef) -> bool:
        return any("Enum" in _last_name(base) for base in node.bases)

    def _literals(self, node: ast.expr) -> list[str]:
        return [str(item.value) for item in ast.walk(node) if isinstance(item, ast.Constant) and item.value is not None]

    def _models(self, node: ast.expr) -> tuple[list[str], str | None]:
        """Return the classes of a section, and the key that selects one of them."""
        if isinstance(node, ast.Name | ast.Attribute):
            name = _last_name(node)
            if name in self._aliases:
                return self._models(self._aliases[name])
            known = self._classes.get(name)
            return ([name], None) if known is not None and not self._is_enum(known) else ([], None)
        if not isinstance(node, ast.Subscript) or _last_name(node.value) not in ("Optional", "Union", "Annotated"):
            return [], None
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if _last_name(node.value) == "Annotated":
            words = [word for item in items[1:] if isinstance(item, ast.Call) for word in item.keywords]
            selector = next((str(ast.literal_eval(word.value)) for word in words if word.arg == "discriminator"), None)
            models, below = self._models(items[0])
            return models, selector or below
        found, selectors = [], []
        for item in items:
            models, below = self._models(item)
            found += models
            selectors.append(below)
        return found, next((selector for selector in selectors if selector), None)


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript | ast.Call):
        return _last_name(node.value if isinstance(node, ast.Subscript) else node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _spellings(key: str, settings: dict[str, ast.expr]) -> list[str]:
    """Return the names under which a field is given: its aliases, or its own name."""
    aliases = settings.get("validation_alias", settings.get("alias"))
    if aliases is None:
        return [key]
    names = [str(node.value) for node in ast.walk(aliases) if isinstance(node, ast.Constant)]
    return names or [key]


def _members(node: ast.ClassDef) -> list[str]:
    """Return what selects an enum's members in YAML: their values, or, where these are no texts, their names."""
    found = []
    for statement in node.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            value = statement.value.value if isinstance(statement.value, ast.Constant) else None
            found.append(value if isinstance(value, str) else statement.targets[0].id)
    return found


def _limited(choice: str, settings: dict[str, ast.expr]) -> str:
    """Add a field's bounds to one alternative."""
    kind = choice.split()[0] if choice else ""
    if kind in ("int", "int!", "float"):
        for name, sign in _SIGNS.items():
            if name in settings:
                choice += f" {sign}{float(ast.literal_eval(settings[name])):g}"
    elif choice != "null" and "min_length" in settings and (choice == "str" or choice.startswith("[")):
        choice += "+"
    return choice
