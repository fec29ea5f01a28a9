# SPDX-License-Identifier: Apache-2.0
"""Where failure files go."""

from __future__ import annotations

from pathlib import Path

from dynamo_mpi.supervision.failure_files import forget_failures


def test_what_an_earlier_start_has_left_goes_and_nothing_else(tmp_path: Path) -> None:
    for name in ("decode-rank-0.json", "decode-rank-12.json", "prefill-rank-0.json"):
        (tmp_path / name).touch()
    assert forget_failures(tmp_path, "decode") == ""
    assert [path.name for path in tmp_path.iterdir()] == ["prefill-rank-0.json"]


def test_a_folder_that_is_none_is_told_before_it_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        assert (
            forget_failures(folder, "decode")
            == f"no failure files: {file} is no folder that can be written; correct --failure-dir"
        )
    assert forget_failures(None, "decode") == ""
    assert forget_failures(tmp_path / "new" / "deep", "decode") == ""
    assert not (tmp_path / "new").exists()
