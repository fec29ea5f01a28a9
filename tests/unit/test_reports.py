# SPDX-License-Identifier: Apache-2.0
"""What `launch` knows of a worker that it starts, for a report in its ranks' place; whole lives are in ``test_conductor.py``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynamo_mpi.deploy.nodes import Worker
from dynamo_mpi.deploy.reports import Beginning, is_reported
from dynamo_mpi.deploy.settings import read_settings
from dynamo_mpi.deploy.step_commands import CodeLocation, Command, worker_words
from dynamo_mpi.discovery.failure_records import WorkerIdentity

DECODE = Worker("decode-0", "decode", "e.yaml", ("n1", "n2"), 2)


def begun(folder: Path, *words: str, **environment: str) -> Beginning:
    own = ("--failure-dir", "/run/failures/decode-0", *words)
    return Beginning.of(DECODE, Command("decode-0", "s", (own,)), environment, folder)


def test_whose_failure_it_is_follows_from_the_command_line(tmp_path: Path) -> None:
    environment = {
        "MODEL_PATH": "/models/m",
        "DYN_MPI_LAUNCH": "x-decode-0",
        "DYN_MPI_ATTEMPT": "2",
        "SLURM_JOB_ID": "7",
    }
    endpoint = "dyn://dynamo.backend.generate"
    usual = WorkerIdentity("decode", "backend", "dynamo", endpoint, "m", "x-decode-0", "7", None, 2)
    assert begun(tmp_path, **environment).origin == usual
    named = begun(tmp_path, "--component=c", "--namespace", "n", SERVED_MODEL_NAME="s", DYN_NAMESPACE="other").origin
    assert named == WorkerIdentity("decode", "c", "n", "dyn://n.c.generate", "s", None, None, None, 1)
    named = begun(tmp_path, "--endpoint", "dyn://a.b.c", DYN_COMPONENT="other").origin
    assert (named.namespace, named.component, named.endpoint, named.model) == ("a", "b", "dyn://a.b.c", "-")


def test_failure_files_are_looked_for_where_the_ranks_write_them(tmp_path: Path) -> None:
    assert begun(tmp_path).failures == tmp_path
    own = tmp_path / "own"
    own.mkdir()
    (own / "backend-rank-1.json").write_text("{}")
    beginning = begun(tmp_path, "--failure-dir", str(own))
    assert (beginning.failures, beginning.has_files) == (own, False)
    (own / ".backend-rank-0.json.x").write_text("half of it")
    assert not beginning.has_files
    # in the place of the earlier one
    (own / "new").write_text("{}")
    (own / "new").replace(own / "backend-rank-1.json")
    assert beginning.has_files


def test_each_worker_has_its_part_of_the_users_folder_for_failure_files(tmp_path: Path) -> None:
    engines = {"prefill_engine_config": "e", "decode_engine_config": "e"}
    source = CodeLocation(None, "", "python3")
    for given in (("--failure-dir", "/f/failures"), ("--failure-dir=/f/failures",)):
        settings = read_settings({"model": "m", "launcher": "slurm", **engines}, given, {})
        words = worker_words(settings, source, DECODE, "/run")
        assert words[-2:] == ("--failure-dir", "/f/failures/decode-0")
        beginning = Beginning.of(DECODE, Command("decode-0", "s", (words,)), {}, tmp_path)
        assert beginning.failures == Path("/f/failures/decode-0")
    settings = read_settings({"model": "m", "launcher": "slurm", **engines}, (), {})
    words = worker_words(settings, source, DECODE, "/run")
    assert words.count("--failure-dir") == 1
    assert Beginning.of(DECODE, Command("decode-0", "s", (words,)), {}, tmp_path).failures == tmp_path


@pytest.mark.parametrize(
    ("code", "words", "reported"),
    [
        (70, "0: dynamo_mpi: rank 0 on n1: error in load: it broke", True),
        (70, "dynamo_mpi: n1: error in mpi_init: rank 1 has ended", True),
        (78, "", True),
        (69, "dynamo_mpi: rank 0 on n1: error: etcd does not answer", True),
        (75, "dynamo_mpi: rank 0 on n1: exit: code 75 after 3.0 s", True),
        (14, '{"time":"t","level":"ERROR","target":"dynamo_mpi","message":"error in serve"}', True),
        (14, '{"time":"t","level":"ERROR","target":"dynamo_runtime","message":"error in serve"}', False),
        (
            14,
            "dynamo_mpi: rank 0 on n1: phase serve\ndynamo_mpi: rank 0 on n1: warning: error in what others say",
            False,
        ),
        (3, "dynamo_mpi: rank 0 on n1: fault: exit 3 in load", False),
        (70, "", False),
        (124, "", False),
    ],
)
def test_what_counts_as_a_report(code: int, words: str, *, reported: bool) -> None:
    assert is_reported(code, words) is reported


def test_what_ranks_have_written_is_read_where_their_output_lacks_it(tmp_path: Path) -> None:
    beginning = begun(tmp_path)
    folder = beginning.failures
    assert folder is not None
    assert beginning.written() == ""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, when in ((1, 10.5), (0, 11.0)):
        content = {
            "rank": rank,
            "host": f"n{rank}",
            "phase": "serve",
            "cause": "disconnect",
            "exit_code": 70,
            "time": when,
            "error": "died",
            "report": "error in serve: died\n  fix:      look",
        }
        (folder / f"backend-rank-{rank}.json").write_text(json.dumps(content))
    (folder / "backend-rank-2.json").write_text("{")
    assert beginning.written() == "rank 1 on n1: error in serve: died\n  fix:      look"
