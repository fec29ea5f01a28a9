# SPDX-License-Identifier: Apache-2.0
"""Numbers in words."""

from __future__ import annotations

from dynamo_mpi.layout.format import counted, gib, listed


def test_numbers_are_written_the_same_way_everywhere() -> None:
    assert listed([1, 2, 40]) == "1, 2, 40"
    assert listed([]) == ""
    assert [counted(number, "GPU") for number in (0, 1, 2)] == ["0 GPUs", "1 GPU", "2 GPUs"]
    assert gib(3 * 2**29) == "1.5 GiB"
