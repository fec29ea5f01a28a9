# SPDX-License-Identifier: Apache-2.0
"""Which worlds ``dynamo-mpi local`` starts, by its flags."""

from __future__ import annotations

import pytest

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.deploy.local.workers import WorkerSpec, worker_specs

ALL = [
    ((None, None, None), (3, 1)),
    ((1, None, None), (1, 1)),
    ((3, None, 1), (3, 1)),
    ((3, 1, None), (1, 3)),
    ((None, 1, 9), (1, 9)),
    ((None, None, 3), (3, 3)),
]


@pytest.mark.parametrize(("given", "size"), [(None, 3), (1, 1), (9, 9)])
def test_aggregated_is_one_world(given: int | None, size: int) -> None:
    assert worker_specs("agg", given, None, None) == (WorkerSpec("agg", size),)


@pytest.mark.parametrize(("given", "sizes"), ALL)
def test_apart_each_world_has_its_own_size_or_the_common_one(
    given: tuple[int | None, int | None, int | None], sizes: tuple[int, int]
) -> None:
    assert worker_specs("disagg", *given) == (WorkerSpec("prefill", sizes[0]), WorkerSpec("decode", sizes[1]))


@pytest.mark.parametrize(("given", "flag"), [((3, 1, None), "--prefill-tp 1"), ((None, None, 3), "--decode-tp 3")])
def test_a_size_without_its_world_is_refused(given: tuple[int | None, int | None, int | None], flag: str) -> None:
    with pytest.raises(UsageError) as caught:
        worker_specs("agg", *given)
    assert flag in caught.value.problem
    assert "--role disagg" in caught.value.fix


def test_every_part_has_a_name_of_its_own() -> None:
    names = [
        world.name for world in (*worker_specs("disagg", None, None, None), *worker_specs("agg", None, None, None))
    ]
    assert names == ["prefill", "decode", "worker"]
