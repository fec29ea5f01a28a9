# SPDX-License-Identifier: Apache-2.0
"""Reads JSON and YAML configuration strictly: errors that a lenient reader ignores would surface minutes later in the engine.

Both refuse duplicate keys (other readers silently keep the last one), a top level that is not a mapping, and files larger than any real
config. Each error is a `ConfigFileError` that contains the path.
"""

from __future__ import annotations

import os
import stat

from dynamo_mpi.common.errors import ConfigFileError
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_SIZE = 2**31 - 1
"""The largest size: the engine stores sizes in 32 bits."""
LARGEST = 1e300
"""Numbers from here on are refused."""
_MAX_NODES = 100_000
_MAX_DEPTH = 100
_MAX_DIGITS = 1000
_YAML_INT = "tag:yaml.org,2002:int"
MAX_BYTES = 8 * 2**20
"""The size limit; the largest known config, GLM-5's with its 716 exclusions, has 36 kB."""
_PIPE_SECONDS = 5.0


def read_small_text(path: str | os.PathLike[str]) -> str:
    """Read a small text file.

    Raises:
        OSError: it can't be read.
        ConfigFileError: the file is too large, not text, or a pipe without a writer.
    """
    # non-blocking: opening a pipe would block until a writer opens it
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        if stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode):
            _await_writer(stream.fileno(), path)
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigFileError(
            f"{path} is larger than {MAX_BYTES // 2**20} MiB",
            expected="a config, not weights or a log",
            fix="correct the path",
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigFileError(
            f"{path} is not text: {error.reason} at byte {error.start}",
            expected="a file in UTF-8",
            fix="correct the path, or convert the file: iconv -t UTF-8",
        ) from None


def _await_writer(pipe: int, path: str | os.PathLike[str]) -> None:
    import select

    if not select.select([pipe], [], [], _PIPE_SECONDS)[0]:
        raise ConfigFileError(
            f"nothing was written to the pipe {path} within {_PIPE_SECONDS:g} s",
            expected="a file with the config",
            fix="name a file, or check what writes to the pipe",
        )
    os.set_blocking(pipe, True)


def parse_json(text: str, path: str, expected: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        text: its text.
        path: the file's path, for messages.
        expected: what is expected, for messages.

    Raises:
        ConfigFileError: the text isn't JSON, isn't an object, or has a duplicate key.
    """
    import json
    from collections import Counter

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ConfigFileError(
                f"{path} has the key {_short(twice)} twice in one object",
                expected="each key once",
                fix="remove one of them",
            )
        return mapping

    try:
        loaded = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ConfigFileError(f"{path} is not JSON: {error}", expected=expected, fix="correct it there") from None
    if not isinstance(loaded, dict):
        raise ConfigFileError(
            f"{path} holds a {type(loaded).__name__}, not an object", expected=expected, fix="correct it, or the path"
        )
    return loaded


class BadValueError(ConfigFileError):
    """A value has the wrong type or is out of every range."""

    key = ""
    """Its dotted path."""
    found = ""
    """The problem without the file's path."""


def line_of_key(text: str, path: Sequence[str]) -> int:
    """Return the line of a key in a YAML mapping, counted from 1; 0 if it isn't there.

    Args:
        text: the YAML.
        path: the names of the sections, and of the key.
    """
    import yaml

    try:
        node, line = yaml.compose(text, Loader=yaml.SafeLoader), 0
    except yaml.YAMLError:
        return 0
    for name in path:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        key, node = next(((key, value) for key, value in pairs if key.value == name), (None, None))
        if key is None:
            return 0
        line = key.start_mark.line + 1
    return line


def parse_yaml(text: str, path: str, expected: str, *, may_be_empty: bool = False) -> dict[str, Any]:
    """Read a YAML mapping.

    Args:
        text: its text.
        path: the file's path, for messages.
        expected: what is expected, for messages.
        may_be_empty: an empty text is an empty mapping; otherwise it is refused, as by TensorRT-LLM.

    Raises:
        ConfigFileError: the text isn't one YAML document, isn't a mapping, has a duplicate key or a recursive alias, or is too large.
    """
    # imported here: ranks other than 0 must not import a YAML reader
    import yaml

    loader = None
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
        node = loader.get_single_node()
        if node is not None:
            _check_node(node, path)
        loaded = None if node is None else loader.construct_document(node)
    # PyYAML doesn't catch the errors of int() and date() for invalid numbers and dates
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split()).replace('in "<unicode string>", line', "at line")
        raise ConfigFileError(f"{path} is not YAML: {reason}", expected=expected, fix="correct it there") from None
    # nor those of "!!bool 7"
    except (LookupError, AttributeError):
        raise ConfigFileError(
            f"{path} is not YAML: a value doesn't fit its tag (!!name)",
            expected=expected,
            fix="correct the value or remove the tag",
        ) from None
    finally:
        if loader is not None:
            loader.dispose()
    if loaded is None and may_be_empty:
        return {}
    if loaded is None:
        raise ConfigFileError(f"{path} is empty", expected=expected, fix="write the config, or omit the flag")
    if not isinstance(loaded, dict):
        raise ConfigFileError(
            f"{path} holds a {type(loaded).__name__}, not a mapping",
            expected="`key: value` lines",
            fix="correct it, or the path",
        )
    return loaded


def _check_node(root: Any, path: str) -> None:
    """Check the node graph before it is constructed: through aliases it may contain itself or grow without bounds."""
    import yaml

    seen = 0
    above: set[int] = set()

    def walk(node: Any, depth: int) -> None:
        nonlocal seen
        seen += 1
        if id(node) in above:
            raise ConfigFileError(
                f"{path}, line {node.start_mark.line + 1}: a value contains itself through an alias (*name)",
                expected="a finite config",
                fix="write the value out",
            )
        if seen > _MAX_NODES or depth > _MAX_DEPTH:
            raise ConfigFileError(
                f"{path} is too large or too deeply nested after its aliases are expanded",
                expected=f"at most {_MAX_NODES} values, {_MAX_DEPTH} levels deep",
                fix="write it without aliases of aliases",
            )
        above.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys: set[tuple[str, str]] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if (key.tag, key.value) in keys:
                        raise ConfigFileError(
                            f"{path}, line {key.start_mark.line + 1}: the key {_short(key.value)} is a duplicate",
                            expected="each key once",
                            fix="remove one of them",
                        )
                    keys.add((key.tag, key.value))
                walk(key, depth + 1)
                walk(value, depth + 1)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                walk(item, depth + 1)
        elif node.tag == _YAML_INT and len(node.value) > _MAX_DIGITS:
            # Python's `str` and `repr` refuse such numbers
            raise ConfigFileError(
                f"{path}, line {node.start_mark.line + 1}: a number of {len(node.value)} characters",
                expected=f"at most {_MAX_DIGITS}",
                fix="write it in quotes if it is text",
            )
        above.discard(id(node))

    walk(root, 0)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class ConfigReader:
    """Reads typed values from one mapping; errors contain the path and the key.

    Args:
        values: the mapping.
        path: the file's path, for messages.
        prefix: the keys above this mapping, with a dot after each.
    """

    def __init__(self, values: Mapping[str, Any], path: str, prefix: str = "") -> None:
        self.values = values
        self.path = path
        self.prefix = prefix

    def has(self, key: str) -> bool:
        """Return whether there is a value other than null."""
        return self.values.get(key) is not None

    def size(self, *keys: str, minimum: int = 1, maximum: int = MAX_SIZE) -> int | None:
        """Return the value of the first of ``keys`` that has one, a whole number; None if none has."""
        # all are asked for: a mapping may remember which keys were
        for key, value in [(key, self.values.get(key)) for key in keys]:
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
                raise self.bad_size(key, minimum, maximum)
            return value
        return None

    def number(self, key: str) -> float | None:
        """Return a number; rules check its range."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
            raise self.bad(key, "a number")
        return float(value)

    def switch(self, key: str) -> bool | None:
        """Return true, false, or None if it isn't set."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def text(self, key: str) -> str | None:
        """Return a string."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.bad(key, "a text")
        return value

    def sizes(self, key: str, minimum: int = 1) -> tuple[int, ...] | None:
        """Return a list of whole numbers."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(
            isinstance(item, int) and not isinstance(item, bool) and minimum <= item <= MAX_SIZE for item in value
        ):
            raise self.bad(key, f"a list of whole numbers of at least {minimum}")
        return tuple(value)

    def section(self, key: str) -> ConfigReader:
        """Return a nested mapping; an empty one if it is missing."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.bad(key, "a mapping")
        return ConfigReader(value, self.path, f"{self.prefix}{key}.")

    def bad_size(self, key: str, minimum: int, maximum: int) -> BadValueError:
        """Return the error for a size outside its limits."""
        expected = "a positive whole number" if minimum == 1 else f"a whole number of at least {minimum}"
        return self.bad(key, expected if maximum == MAX_SIZE else f"{expected}, at most {maximum}")

    def bad(self, key: str, expected: str) -> BadValueError:
        """Return the error for the value of ``key``."""
        found = f"{self.prefix}{key} is {_short(self.values.get(key))}"
        error = BadValueError(f"{self.path}: {found}", expected=expected, fix="correct it there")
        error.key, error.found = f"{self.prefix}{key}", found
        return error
