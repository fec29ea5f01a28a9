# SPDX-License-Identifier: Apache-2.0
"""Around TensorRT-LLM's session: workspaces of ranks, what the engine logs, what the child sends and prints. No MPI, no engine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import pytest

from dynamo_mpi.common.errors import DynamoMpiError, EngineError, ExitCode
from dynamo_mpi.engines.trtllm.endings import ChildExitError, innermost_error, ranks_left, why_left
from dynamo_mpi.engines.trtllm.flashinfer import claim_workspace
from dynamo_mpi.engines.trtllm.session import _receive
from dynamo_mpi.engines.trtllm.task import EngineErrors, TaskEnd
from tests.unit.neighbour import NOBODY, needs_root

# workspaces

CLAIM = """
import os, sys
from dynamo_mpi.engines.trtllm.flashinfer import claim_workspace
print(claim_workspace(int(sys.argv[1]), int(sys.argv[2]), os.environ), end="")
print(os.environ["FLASHINFER_WORKSPACE_BASE"], flush=True)
sys.stdin.read()
"""


class Rank:
    """A process that holds a workspace until the block ends."""

    def __init__(self, rank: int, size: int, **environ: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLASHINFER_", "TRTLLM_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(rank), str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**kept, **environ},
        )
        assert self.process.stdout is not None
        self.workspace = Path(self.process.stdout.readline().strip())

    def __enter__(self) -> Path:
        return self.workspace

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def test_two_worlds_with_one_home_directory_dont_meet(tmp_path: Path) -> None:
    home, root = {"HOME": str(tmp_path)}, tmp_path / ".cache/tensorrt_llm/flashinfer"
    with Rank(0, 2, **home) as first, Rank(1, 2, **home) as second:
        assert (first, second) == (root / "rank-0", root / "rank-1")
        with Rank(0, 2, **home) as third, Rank(1, 2, **home) as fourth, Rank(0, 3, **home) as fifth:
            assert (third, fourth, fifth) == (root / "rank-2", root / "rank-3", root / "rank-6")
    # a slot stays with what was compiled there, and is free again
    with Rank(0, 2, **home) as again:
        assert again == first


def test_the_folder_for_caches_that_the_user_names_is_used(tmp_path: Path) -> None:
    with Rank(1, 2, HOME=str(tmp_path / "home"), TRTLLM_CACHE_DIR=str(tmp_path / "caches")) as workspace:
        assert workspace == tmp_path / "caches/flashinfer/rank-1"
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "environ", [{"FLASHINFER_WORKSPACE_BASE": "/mine"}, {"TRTLLM_FLASHINFER_WORKSPACE_PER_PROCESS": "0"}]
)
def test_what_the_user_decides_stays(environ: dict[str, str]) -> None:
    before = dict(environ)
    assert claim_workspace(0, 2, environ) == ""
    assert environ == before


def test_the_variables_are_those_of_the_engines_launcher(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "TRTLLM_CACHE_DIR": str(tmp_path / "c")}
    assert claim_workspace(2, 4, environ) == ""
    assert environ["FLASHINFER_WORKSPACE_BASE"] == str(tmp_path / "c/flashinfer/rank-2")
    assert environ["TRTLLM_FLASHINFER_WORKSPACE_MANAGED"] == "1"
    assert environ["FLASHINFER_CUBIN_DIR"] == str(tmp_path / ".cache/flashinfer/cubins")


def test_where_nothing_can_be_written_it_is_a_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "caches").write_text("a file")
    environ = {"HOME": "/", "TRTLLM_CACHE_DIR": str(tmp_path / "caches")}
    warning = claim_workspace(0, 1, environ)
    assert Path(environ["FLASHINFER_WORKSPACE_BASE"]).name.startswith("dynamo-mpi-flashinfer-")
    assert "no FlashInfer workspace in " in warning
    assert "set TRTLLM_CACHE_DIR" in warning


def test_a_user_without_a_home_gets_a_temporary_one(no_home: None) -> None:
    environ = dict[str, str]()
    warning = claim_workspace(0, 1, environ)
    assert Path(environ["FLASHINFER_WORKSPACE_BASE"]).name.startswith("dynamo-mpi-flashinfer-")
    assert "FLASHINFER_CUBIN_DIR" not in environ
    assert "HOME isn't set" in warning


def test_a_named_folder_needs_no_home(no_home: None, tmp_path: Path) -> None:
    environ = {"TRTLLM_CACHE_DIR": str(tmp_path)}
    assert claim_workspace(0, 1, environ) == ""
    assert environ["FLASHINFER_WORKSPACE_BASE"] == str(tmp_path / "flashinfer/rank-0")


def test_a_folder_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    slot = tmp_path / "flashinfer/rank-0"
    slot.mkdir(parents=True)
    slot.chmod(0o777)
    environ = {"HOME": "/", "TRTLLM_CACHE_DIR": str(tmp_path)}
    warning = claim_workspace(0, 1, environ)
    assert Path(environ["FLASHINFER_WORKSPACE_BASE"]).name.startswith("dynamo-mpi-flashinfer-")
    assert f"{slot} is a folder that others can write" in warning
    assert list(slot.iterdir()) == []


@needs_root
def test_another_users_folder_is_not_used(tmp_path: Path) -> None:
    slot = tmp_path / "flashinfer/rank-0"
    slot.mkdir(parents=True)
    os.chown(slot, NOBODY, NOBODY)
    environ = {"HOME": "/", "TRTLLM_CACHE_DIR": str(tmp_path)}
    warning = claim_workspace(0, 1, environ)
    assert Path(environ["FLASHINFER_WORKSPACE_BASE"]).name.startswith("dynamo-mpi-flashinfer-")
    assert f"{slot} belongs to user {NOBODY}" in warning


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    slot, target = tmp_path / "flashinfer/rank-0", tmp_path / "target"
    slot.mkdir(parents=True, mode=0o700)
    (slot / ".lock").symlink_to(target)
    environ = {"HOME": "/", "TRTLLM_CACHE_DIR": str(tmp_path)}
    warning = claim_workspace(0, 1, environ)
    assert ".lock is a link" in warning
    assert not target.exists()


# the engine's log


@pytest.fixture
def killed() -> list[DynamoMpiError]:
    return []


@pytest.fixture
def errors(killed: list[DynamoMpiError]) -> EngineErrors:
    return EngineErrors(killed.append)


def log(handler: EngineErrors, *texts: str, level: int = logging.ERROR) -> None:
    for text in texts:
        handler.handle(logging.LogRecord("TRT-LLM", level, __file__, 1, text, None, None))


def test_the_reason_is_the_failed_start_and_not_what_follows(errors: EngineErrors) -> None:
    assert errors.reason() == ""
    log(errors, "[TRT-LLM] [RANK 1] [E] Failed to initialize executor on rank 1: CUDA out of memory\nmore")
    log(errors, '[TRT-LLM] [E] [executor] Traceback (most recent call last):\n  File "x"\nValueError: 100% wrong')
    assert errors.reason() == "Failed to initialize executor on rank 1: CUDA out of memory"


def test_otherwise_the_reason_is_the_last_error(errors: EngineErrors) -> None:
    log(errors, "[TRT-LLM] [E] one", '[TRT-LLM] [E] Traceback (most recent call last):\n  File "x"\nOSError: two')
    assert errors.reason() == "OSError: two"
    log(errors, "x" * 5000)
    assert len(errors.reason()) < 600


def test_a_message_that_cant_be_formatted_does_no_harm(errors: EngineErrors) -> None:
    errors.handle(logging.LogRecord("TRT-LLM", logging.ERROR, __file__, 1, "%d of %d", ("a",), None))
    assert errors.reason() == "%d of %d"


@pytest.mark.parametrize(
    "words",
    ["HangDetector: propagating hard-kill to all ranks via MPI_Abort.", "HangDetector: self-SIGKILL; relying on"],
)
def test_the_engines_own_hard_kill_is_heard_before_it_happens(
    words: str, errors: EngineErrors, killed: list[DynamoMpiError]
) -> None:
    log(errors, "[TRT-LLM] [E] Executor loop crashed on this rank; hard-killing all 4 ranks in 10s")
    assert killed == []
    log(errors, f"[TRT-LLM] [E] {words}")
    assert killed[0].exit_code is ExitCode.ENGINE
    assert "    Executor loop crashed on this rank; hard-killing all 4 ranks in 10s\n" in str(killed[0])
    log(errors, "[TRT-LLM] [E] Hang detected after 300 seconds.", f"[TRT-LLM] [E] {words}")
    assert killed[1].exit_code == 124
    assert "TLLM_HANG_DETECTION_TIMEOUT_S" in str(killed[1])


def test_a_hang_is_one_however_many_stacks_are_logged_after_it(
    errors: EngineErrors, killed: list[DynamoMpiError]
) -> None:
    log(errors, "[TRT-LLM] [E] Hang detected after 300 seconds.")
    log(errors, *(f"[TRT-LLM] [E] Thread {number} stack trace:\n  File x" for number in range(40)))
    log(
        errors, *(f"[TRT-LLM] [E] {number}" for number in range(40)), "HangDetector: propagating hard-kill to all ranks"
    )
    assert killed[0].exit_code == 124
    assert "    Hang detected after 300 seconds.\n" in str(killed[0])
    assert "stack trace" not in str(killed[0])


def test_it_listens_to_the_engines_logger_once(errors: EngineErrors) -> None:
    logger = logging.getLogger("TRT-LLM")
    try:
        errors.attach()
        errors.attach()
        assert logger.handlers.count(errors) == 1
        logger.error("[TRT-LLM] [E] here")
        logger.warning("[TRT-LLM] [W] not this")
        assert errors.reason() == "here"
    finally:
        logger.removeHandler(errors)


# what the child sends and prints


class Queue:
    """A queue whose next message can't be had."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def get(self) -> NoReturn:
        raise self._error


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'my_model'"),
        AttributeError("Can't get attribute 'Mine' on <module '__main__'>"),
    ],
)
def test_a_class_that_only_the_child_can_import_is_reported_with_what_to_do(error: Exception) -> None:
    with pytest.raises(EngineError) as caught:
        _receive(Queue(error))
    assert str(error) in str(caught.value)
    assert "PYTHONPATH" in caught.value.fix
    assert caught.value.__suppress_context__


def test_a_message_of_another_process_is_refused() -> None:
    with pytest.raises(EngineError, match="can't be used: HMAC verification failed"):
        _receive(Queue(RuntimeError("HMAC verification failed")))


def chain(*, fresh: bool = False, handled: bool = False) -> list[str]:
    """Return the output of a child whose engine could not start."""
    first = ValueError("the cause") if fresh else raised(ValueError("the cause"))
    try:
        try:
            raise RuntimeError("Executor worker returned error") from first
        except RuntimeError as error:
            if handled:
                raise KeyError("while handling") from error
            raise
    except Exception as error:
        return "".join(traceback.format_exception(error)).splitlines()


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


NOISE = ["[TRT-LLM] [I] loading", "Traceback (most recent call last):", '  File "retry.py"', "OSError: tried again"]


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("handled", [True, False])
@pytest.mark.parametrize("before", [[], NOISE, NOISE + chain(), [*chain(), *NOISE]])
def test_the_cause_is_the_innermost_error_of_the_last_chain(fresh: bool, handled: bool, before: list[str]) -> None:
    assert innermost_error([*before, *chain(fresh=fresh, handled=handled), "", "the end"]) == "ValueError: the cause"


def test_without_a_chain_there_is_no_innermost_error() -> None:
    assert innermost_error(NOISE) == ""
    assert innermost_error([]) == ""
    # cut off: only the end of it was kept
    assert innermost_error(chain()[-3:]) == ""


def name(ranks: object) -> str:
    return f"ranks {ranks}"


FAILED = TaskEnd(2, "Failed to initialize executor on rank 2: no memory")


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([], ""),
        ([TaskEnd(1, "")], ""),
        ([FAILED, TaskEnd(0, "other")], "ranks [2] logged: Failed to initialize executor on rank 2: no memory"),
        # follows from the loss of another
        ([TaskEnd(0, "NCCL error: remote process exited"), FAILED], "ranks [2] logged: Failed to init"),
        ([TaskEnd(0, "NCCL error: remote process exited")], "ranks [0] logged: NCCL error"),
    ],
)
def test_the_first_reason_counts(ends: list[TaskEnd], said: str) -> None:
    assert why_left(ends, name).startswith(said)
    assert bool(why_left(ends, name)) == bool(said)
    assert (" logged: " in str(ranks_left(ends, name))) == bool(said)


def test_the_childs_end_is_reported_with_its_cause() -> None:
    lines = chain()
    assert str(ChildExitError(1, lines)).startswith("dynamo.trtllm ended with code 1; its last lines:\n")
    assert str(ChildExitError(1, lines, reason="rank 2 logged: x")).startswith(
        "dynamo.trtllm ended with code 1: rank 2 logged: x;"
    )
    # killed: that is the cause
    assert "logged: x" not in str(ChildExitError(-9, lines, reason="rank 2 logged: x"))


def test_the_last_lines_are_few() -> None:
    assert str(ChildExitError(1, [f"line {number}" for number in range(400)])).count("\n") < 16
