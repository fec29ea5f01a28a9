# SPDX-License-Identifier: Apache-2.0
"""`common.light_typing`: the classes of its `NamedTuple` behave as those of ``typing``."""

from __future__ import annotations

import copy
import pickle
import typing
from typing import Any

import pytest

from dynamo_mpi.common import light_typing


class Light(light_typing.NamedTuple):
    """A pair."""

    size: int
    name: str = "none"

    @property
    def double(self) -> int:
        """Twice the size."""
        return 2 * self.size

    @classmethod
    def of(cls, text: str) -> Light:
        """Return the pair of a text's length and the text."""
        return cls(len(text), text)


class Standard(typing.NamedTuple):
    """A pair."""

    size: int
    name: str = "none"

    @property
    def double(self) -> int:
        """Twice the size."""
        return 2 * self.size

    @classmethod
    def of(cls, text: str) -> Standard:
        """Return the pair of a text's length and the text."""
        return cls(len(text), text)


BOTH = pytest.mark.parametrize("pair", [Light, Standard])


@BOTH
@pytest.mark.parametrize(
    ("args", "named", "expected"),
    [
        ((1, "a"), {}, (1, "a")),
        ((1,), {}, (1, "none")),
        ((1,), {"name": "b"}, (1, "b")),
        ((), {"size": 2}, (2, "none")),
    ],
)
def test_values_by_position_and_name(pair: Any, args: Any, named: Any, expected: tuple[int, str]) -> None:
    made = pair(*args, **named)
    assert (made, made.size, made.name, made.double) == (expected, *expected, 2 * expected[0])


@BOTH
@pytest.mark.parametrize(
    ("args", "named"), [((), {}), ((1, "a", 2), {}), ((1,), {"size": 2}), ((1,), {"other": 2}), ((), {"name": "a"})]
)
def test_wrong_arguments_are_a_type_error(pair: Any, args: Any, named: Any) -> None:
    with pytest.raises(TypeError):
        pair(*args, **named)


@BOTH
def test_what_a_tuple_and_its_copies_do(pair: Any) -> None:
    made = pair(1, "a")
    assert repr(made) == f"{pair.__name__}(size=1, name='a')"
    assert (made._fields, made._field_defaults, made._asdict()) == (
        ("size", "name"),
        {"name": "none"},
        {"size": 1, "name": "a"},
    )
    for other in (made._replace(name="b"), pair._make((1, "b"))):
        assert (type(other), other) == (pair, (1, "b"))
    # a TypeError in Python's own from 3.13 on
    with pytest.raises((ValueError, TypeError), match="other"):
        made._replace(other=1)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):  # noqa: S301 - our own bytes
        assert (type(other), other) == (pair, made)
    match made:
        case pair(size, name):
            assert (size, name) == made
    assert (hash(made), pair.of("abc"), pair.__doc__) == (hash((1, "a")), (3, "abc"), "A pair.")
    with pytest.raises(AttributeError):
        made.size = 2
    with pytest.raises(AttributeError):
        made.other = 2
