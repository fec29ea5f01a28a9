# SPDX-License-Identifier: Apache-2.0
"""Where failure files go."""

from __future__ import annotations

import json
from pathlib import Path

from dynamo_mpi.common.failure import DetectedBy, Failure
from dynamo_mpi.supervisor.failure_reports import remove_stale_failure_files, write_failure
from dynamo_mpi.supervisor.rendezvous import Rendezvous


def test_what_an_earlier_start_has_left_goes_and_nothing_else(tmp_path: Path) -> None:
    for name in ("decode-rank-0.json", "decode-rank-12.json", "prefill-rank-0.json"):
        (tmp_path / name).touch()
    assert remove_stale_failure_files(tmp_path, "decode") == ""
    assert [path.name for path in tmp_path.iterdir()] == ["prefill-rank-0.json"]


def test_a_folder_that_is_none_is_reported_before_it_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        assert (
            remove_stale_failure_files(folder, "decode")
            == f"no failure files: {file} is no folder that can be written; correct --failure-dir"
        )
    assert remove_stale_failure_files(None, "decode") == ""
    assert remove_stale_failure_files(tmp_path / "new" / "deep", "decode") == ""
    assert not (tmp_path / "new").exists()


def test_a_host_that_is_cut_off_leaves_rank_0s_report_and_rank_0_replaces_its(tmp_path: Path) -> None:
    rendezvous = Rendezvous("n1", failure_dir=str(tmp_path), label="decode")
    of_rank_2 = Failure(2, 75, "is lost", DetectedBy.HOST_UNREACHABLE, "serve", 0.0)
    of_rank_0 = Failure(0, 75, "is lost", DetectedBy.HOST_UNREACHABLE, "serve", 0.0)

    def read_report() -> tuple[int, str]:
        content = json.loads((tmp_path / "decode-rank-0.json").read_text(encoding="utf-8"))
        return content["rank"], content["host"]

    write_failure(rendezvous, of_rank_0, "n1", keep=True)
    assert read_report() == (0, "n1")
    write_failure(rendezvous, of_rank_2, "n3", by=0)
    write_failure(rendezvous, of_rank_0, "n1", keep=True)
    assert read_report() == (2, "n3")
