# SPDX-License-Identifier: Apache-2.0
"""KV goes from one engine's ranks to another's, however both are split: the tokens are those of one engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Mpirun
from tests.mpi.test_reference_engine import GOLDEN, PROGRAMS, UNBOUND

pytestmark = pytest.mark.mpi
HandOver = Callable[..., dict[str, Any]]
TOKENS = 16


@pytest.fixture
def hand_over(mpirun: Mpirun, model_dir: Path, tmp_path: Path) -> HandOver:
    """Run prompts through a pair of engines; returns what decode's rank 0 printed."""

    def run(prefill: tuple[int, int], decode: tuple[int, int], prompts: list[list[int]], **more: Any) -> dict[str, Any]:
        settings = {"prefill": prefill, "decode": decode, "max_tokens": TOKENS, "prompts": prompts}
        task = tmp_path / "task.json"
        task.write_text(json.dumps(settings | more))
        ranks = prefill[0] * prefill[1] + decode[0] * decode[1]
        done = mpirun(ranks, PROGRAMS / "reference_handoff.py", str(model_dir), str(task), env=UNBOUND)
        assert done.returncode == 0, done.stderr
        printed: dict[str, Any] = json.loads(done.stdout)
        return printed

    return run


@pytest.mark.landing("tp3pp1-tp1pp2")
@pytest.mark.parametrize(
    ("prefill", "decode"),
    [((3, 1), (1, 1)), ((1, 1), (3, 1)), ((3, 1), (3, 1)), ((1, 2), (3, 1)), ((3, 1), (1, 2)), ((1, 3), (1, 2))],
    ids=lambda sizes: "tp{}pp{}".format(*sizes),
)
def test_the_tokens_are_those_of_one_engine(
    hand_over: HandOver, prefill: tuple[int, int], decode: tuple[int, int]
) -> None:
    chosen = GOLDEN[:4]
    output = hand_over(prefill, decode, [golden["prompt_token_ids"] for golden in chosen])

    assert output["errors"] == [None] * len(chosen)
    assert output["tokens"] == [golden["token_ids"][:TOKENS] for golden in chosen]


def test_a_long_prompt_takes_its_second_message_and_several_steps(hand_over: HandOver) -> None:
    prompt = (GOLDEN[0]["prompt_token_ids"] * 20)[:512]

    output = hand_over((3, 1), (3, 1), [prompt, prompt])

    assert output["errors"] == [None, None]
    assert output["tokens"] == [output["alone"]] * 2
    assert max(output["milliseconds"]) < 3000


def test_one_rank_that_cannot_fetch_ends_the_request_alone(hand_over: HandOver) -> None:
    output = hand_over((3, 1), (3, 1), [GOLDEN[0]["prompt_token_ids"]] * 2, spoil=1)

    assert output["tokens"] == [[], []]
    assert all("rank 1: prefill rank 1 at 127.0.0.1:1" in error for error in output["errors"])
    assert output["alone"] == GOLDEN[0]["token_ids"][:TOKENS]
