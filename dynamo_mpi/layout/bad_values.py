# SPDX-License-Identifier: Apache-2.0
"""All that keeps an engine config from being read at all, with line numbers: one wrong type must not hide the other mistakes."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.config_reader import line_of_key
from dynamo_mpi.common.errors import ConfigFileError
from dynamo_mpi.layout.engine_config import type_engine_config
from dynamo_mpi.layout.finding import Severity
from dynamo_mpi.layout.key_rules import check_keys

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.common.config_reader import BadValueError

_MOST = 20


def all_bad_values(first: BadValueError, keys: Mapping[str, Any], where: str, yaml_text: str | None) -> ConfigFileError:
    """Return the error for a config with values of a wrong type: it lists them all, and the keys that no version of the engine knows.

    Args:
        first: the first value's error.
        keys: the config, with all layers merged.
        where: where it was found, for messages.
        yaml_text: the engine config's text; None for none.
    """
    bad, rest = [first], deepcopy(dict(keys))
    while _remove(rest, bad[-1].key.split(".")) and len(bad) < _MOST:
        try:
            type_engine_config(rest, where)
        except type(first) as error:
            bad.append(error)
        except ConfigFileError:
            break
        else:
            break
    unknown = [finding for finding in check_keys(keys, None) if finding.severity is Severity.ERROR]
    if len(bad) == 1 and not unknown:
        line = _line(yaml_text, first.key)
        place = f"{where}, {line}" if line else f"{where}: "
        return type(first)(f"{place}{first.found}", expected=first.expected, fix=first.fix)
    lines = [f"{_line(yaml_text, error.key)}{error.found}, expected {error.expected}" for error in bad]
    lines += [finding.message + (f" ({finding.fix})" if finding.fix else "") for finding in unknown]
    return ConfigFileError(
        f"{where} has {len(lines)} values and keys that can't be used:\n    " + "\n    ".join(lines),
        expected="keys and values of TensorRT-LLM's engine config",
        fix="correct them there",
    )


def _line(text: str | None, key: str) -> str:
    number = 0 if text is None else line_of_key(text, key.split("."))
    return f"line {number}: " if number else ""


def _remove(keys: dict[str, Any], path: list[str]) -> bool:
    """Remove a key; return whether it was there."""
    for name in path[:-1]:
        inner = keys.get(name)
        if not isinstance(inner, dict):
            return False
        keys = inner
    return keys.pop(path[-1], None) is not None
