# SPDX-License-Identifier: Apache-2.0
"""``dynamo-mpi local --role disagg`` with all its real parts: it answers as one worker does, and nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dynamo_mpi.common.errors import ExitCode, of_signal
from tests.dynamo.local_command import LocalCommand
from tests.dynamo.running import eventually

pytestmark = pytest.mark.dynamo

QUESTION = "Name three colours of the rainbow."
DISAGG = ("--role", "disagg")
SMALLEST = (*DISAGG, "--tp", "1")
# Moments of a start, each by the line that precedes it.
MOMENTS = {"worlds": "frontend at", "serving": "serving until"}


@pytest.fixture(scope="module")
def aggregated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one worker of one rank answers."""
    with LocalCommand(tmp_path_factory.mktemp("agg"), "--tp", "1", "--ask", QUESTION) as command:
        assert command.wait() == 0, command.err
        return command.out


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "sizes"), [((), (3, 1)), (("--tp", "3", "--prefill-tp", "1"), (1, 3))], ids=["default", "1 to 3"]
)
def test_a_pair_answers_as_one_worker_does(
    tmp_path: Path, aggregated: str, flags: tuple[str, ...], sizes: tuple[int, int]
) -> None:
    with LocalCommand(tmp_path, *DISAGG, *flags, "--ask", QUESTION) as command:
        assert command.wait() == 0, command.err
        command.assert_nothing_left()
        assert command.out == aggregated
        for name, size in zip(("prefill", "decode"), sizes, strict=True):
            assert f"{name} registered, tp {size}\n" in command.err


def test_the_report_has_both_workers_and_ctrl_c_ends_them(tmp_path: Path) -> None:
    with LocalCommand(tmp_path, *DISAGG, "--keep", "--output", "json") as command:
        report = command.report()
        command.wait_for_text("serving until")
        assert report["role"] == "disagg"
        assert {role: block["tp_size"] for role, block in report["workers"].items()} == {"prefill": 3, "decode": 1}
        for block in report["workers"].values():
            assert block["worker"]["ranks"] == block["tp_size"]
        assert all(report["seconds"][name] > 0 for name in ("verdict", "load", "ready", "first_token", "answer"))
        assert set(report["processes"]) == {"etcd", "nats", "frontend", "prefill", "decode"}
        logs = {str(log.relative_to(log.parents[1])) for log in command.folder.glob("*/ranks/*/rank-*.log")}
        assert logs == {*(f"prefill/rank-{rank}.log" for rank in range(3)), "decode/rank-0.log"}
        command.process.send_signal(signal.SIGINT)
        assert command.wait(30) == of_signal(signal.SIGINT), command.err
        command.assert_nothing_left()


@pytest.mark.landing("worlds")
@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_ends_everything(tmp_path: Path, moment: str) -> None:
    with LocalCommand(tmp_path, *DISAGG, "--keep") as command:
        command.wait_for_text(MOMENTS[moment])
        command.process.send_signal(signal.SIGTERM)
        assert command.wait(30) == of_signal(signal.SIGTERM), command.err
        command.assert_nothing_left()
        assert "Traceback" not in command.err


@pytest.mark.full
def test_even_sigkill_leaves_no_process(tmp_path: Path) -> None:
    with LocalCommand(tmp_path, *SMALLEST, "--keep") as command:
        command.wait_for_text("serving until")
        command.process.kill()
        command.wait()
        eventually(lambda: not command.survivors(), "all processes are gone", 5)


@pytest.mark.serial
def test_what_is_in_flight_anywhere_is_finished(tmp_path: Path) -> None:
    """One slot in each world: of four requests most wait, at prefill or for decode, when the signal comes."""
    tokens = 100

    def complete(url: str, model: str, number: int) -> bytes:
        prompt = f"{number}. Once upon a time"
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(  # noqa: S310 - the run's own loopback address
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=90) as stream:  # noqa: S310 - the run's own loopback address
            first = stream.readline()
            started.append(number)
            return first + stream.read()  # type: ignore[no-any-return]  # urllib's is unnamed

    started: list[int] = []
    with (
        LocalCommand(tmp_path, *SMALLEST, "--max-batch-size", "1", "--keep", "--output", "json") as command,
        ThreadPoolExecutor(4) as pool,
    ):
        report = command.report()
        command.wait_for_text("serving until")
        answers = [pool.submit(complete, report["url"], report["model"], number) for number in range(4)]
        eventually(lambda: started, "a first token")
        command.process.send_signal(signal.SIGTERM)
        for answer in answers:
            text = answer.result()
            assert b"[DONE]" in text, text
            assert b'"finish_reason":"length"' in text, text
        assert command.wait(30) == of_signal(signal.SIGTERM), command.err
        command.assert_nothing_left()


@pytest.mark.landing("prefill")
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_world_that_loses_a_rank_ends_the_run_with_its_code(tmp_path: Path, role: str) -> None:
    with LocalCommand(tmp_path, *DISAGG, "--tp", "3", "--keep", "--output", "json") as command:
        report = command.report()
        command.wait_for_text("serving until")
        os.kill(report["workers"][role]["worker"]["pid"], signal.SIGKILL)
        assert command.wait(60) == of_signal(signal.SIGKILL), command.err
        command.assert_nothing_left()
        assert f"{role} ended with exit code 137" in command.err


@pytest.mark.full
def test_an_impossible_layout_is_refused_in_its_worlds_words(tmp_path: Path) -> None:
    with LocalCommand(tmp_path, *DISAGG, "--decode-tp", "2", "--output", "json") as command:
        assert command.wait() == ExitCode.ILLEGAL_LAYOUT, command.err
        command.assert_nothing_left()
        assert "error B1: 9 attention heads can't be divided over tp_size = 2" in command.err.splitlines()
        assert json.loads(command.out)["part"] == "decode"


@pytest.mark.full
def test_verbose_distinguishes_the_worlds(tmp_path: Path) -> None:
    with LocalCommand(tmp_path, *DISAGG, "--decode-tp", "2", "--verbose") as command:
        assert command.wait() == ExitCode.ILLEGAL_LAYOUT, command.err
        assert "[decode/rank-0] error B1:" in command.err
        assert command.err.count("error B1:") == 1, "not once more at the end"
