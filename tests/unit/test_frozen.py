# SPDX-License-Identifier: Apache-2.0
"""`common.frozen`: its classes behave as the standard library's frozen dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest

from dynamo_mpi.common import frozen


def make(module: Any) -> Any:
    """Make one class with `dataclasses` or with `frozen`."""

    @module.dataclass(frozen=True, order=True)
    class Sample:
        """A sample."""

        size: int
        name: str = "none"
        keys: dict[str, int] = module.field(default_factory=dict, compare=False, repr=False)
        double: int = module.field(init=False)

        def __post_init__(self) -> None:
            object.__setattr__(self, "double", 2 * self.size)

    return Sample


OURS, STANDARD = make(frozen), make(dataclasses)


@pytest.mark.parametrize("use", [
    lambda c: repr(c(1, keys={"a": 1})),
    lambda c: c(1) == c(1, "none", {"a": 1}),
    lambda c: c(1) == c(2),
    lambda c: c(1) == 1,
    lambda c: hash(c(3, "x")) == hash(c(size=3, name="x")),
    lambda c: sorted([c(2), c(1, "z"), c(1, "a")]),
    lambda c: (c(1) > c(2), c(2) >= c(2), c(1) <= c(1)),
    lambda c: c(1).keys is c(1).keys,
    lambda c: vars(c(5)),
    lambda c: c.name,
    lambda c: hasattr(c, "keys"),
    lambda c: c.__match_args__,
    lambda c: [(f.name, f.type, f.init, f.compare) for f in dataclasses.fields(c)],
    lambda c: dataclasses.asdict(c(1, keys={"a": 1})),
    lambda c: vars(dataclasses.replace(c(1, "x"), size=4)),
    lambda c: vars(copy.deepcopy(c(1, keys={"a": 1}))),
])  # fmt: skip
def test_a_frozen_class_answers_as_the_standard_one(use: Any) -> None:
    assert repr(use(OURS)) == repr(use(STANDARD))


@pytest.mark.parametrize("wrong", [
    lambda c: c(),
    lambda c: c(1, "a", {}, 4),
    lambda c: c(1, size=2),
    lambda c: c(1, nmae="x"),
    lambda c: c(name="x"),
    lambda c: c(1, double=4),
    lambda c: frozen.replace(c(1), nmae="x"),
    lambda c: c(1) < 1,
])  # fmt: skip
def test_wrong_arguments_are_refused(wrong: Any) -> None:
    for cls in (OURS, STANDARD):
        with pytest.raises(TypeError):
            wrong(cls)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(
        TypeError, match=r"Sample takes size, name, keys; .*missing: \['size'\], unexpected: \['nmae'\]"
    ):
        OURS(nmae="x")


def test_a_frozen_instance_refuses_changes() -> None:
    for cls in (OURS, STANDARD):
        with pytest.raises(dataclasses.FrozenInstanceError):
            cls(1).size = 2
        with pytest.raises(dataclasses.FrozenInstanceError):
            del cls(1).size


def test_replace_takes_both_kinds() -> None:
    assert repr(frozen.replace(OURS(1, "x"), size=4)) == repr(frozen.replace(STANDARD(1, "x"), size=4))
