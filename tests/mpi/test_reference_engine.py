# SPDX-License-Identifier: Apache-2.0
"""The reference engine over real MPI ranks makes the tokens that transformers makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Mpirun

pytestmark = pytest.mark.mpi

PROGRAMS = Path(__file__).with_name("programs")
GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden_tokens.json").read_text(encoding="utf-8"))["prompts"]
# in a landing run; --full has each alone
ALONE = GOLDEN[:2]

# ranks on fewer cores: as a worker sets it
UNBOUND = {"PRTE_MCA_hwloc_default_binding_policy": "none", "OMPI_MCA_mpi_yield_when_idle": "1"}
"""Open MPI binds one or two ranks to a core each, which leaves the others unused."""

Generate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def generate(mpirun: Mpirun, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Generate:
    """Run rounds of requests on a number of ranks; returns what the program printed."""

    def run(ranks: int, rounds: list[list[dict[str, Any]]], **settings: Any) -> dict[str, Any]:
        task = tmp_path_factory.mktemp("task") / "rounds.json"
        task.write_text(json.dumps({"rounds": rounds, "idle_seconds": 0, **settings}))
        # 80 s on two cores that nothing else uses
        done = mpirun(ranks, PROGRAMS / "reference_generate.py", str(model_dir), str(task), env=UNBOUND, timeout=300)
        assert done.returncode == 0, done.stderr
        printed: dict[str, Any] = json.loads(done.stdout)
        return printed

    return run


def greedy(golden: dict[str, Any], max_tokens: int = 64) -> dict[str, Any]:
    return {"prompt": golden["prompt_token_ids"], "max_tokens": max_tokens}


def tokens_of(results: list[dict[str, Any]]) -> list[list[int]]:
    return [result["tokens"] for result in results]


@pytest.fixture(scope="session")
def three_ranks(generate: Generate) -> dict[str, Any]:
    """One world of three: all prompts at once, some alone, then idle."""
    return generate(3, [[greedy(golden) for golden in GOLDEN], *([greedy(each)] for each in ALONE)], idle_seconds=2.5)


def test_one_rank_makes_the_golden_tokens(generate: Generate) -> None:
    """All at once, more than there are slots; and some alone, which takes other paths through the arithmetic."""
    together, *alone = generate(1, [[greedy(golden) for golden in GOLDEN], *([greedy(each)] for each in ALONE)])[
        "rounds"
    ]

    assert tokens_of(together) == [golden["token_ids"] for golden in GOLDEN]
    assert [tokens_of(results)[0] for results in alone] == [golden["token_ids"] for golden in ALONE]


def test_three_ranks_make_the_golden_tokens(three_ranks: dict[str, Any]) -> None:
    together, *alone = three_ranks["rounds"]

    assert tokens_of(together) == [golden["token_ids"] for golden in GOLDEN]
    assert [tokens_of(results)[0] for results in alone] == [golden["token_ids"] for golden in ALONE]
    assert {result["finish_reason"] for result in (*together, alone[0][0])} == {"length"}


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 3])
def test_each_prompt_alone_makes_its_golden_tokens(generate: Generate, ranks: int) -> None:
    output = generate(ranks, [[greedy(golden)] for golden in GOLDEN])

    assert [tokens_of(results)[0] for results in output["rounds"]] == [golden["token_ids"] for golden in GOLDEN]


@pytest.mark.full
def test_a_seed_gives_the_same_tokens_alone_and_in_company(generate: Generate) -> None:
    sampled = {**greedy(GOLDEN[0], 24), "temperature": 0.9, "seed": 7}
    other = {**sampled, "seed": 8}
    [alone], [_, in_company, other_seed] = generate(3, [[sampled], [greedy(GOLDEN[1], 24), sampled, other]])["rounds"]

    assert in_company["tokens"] == alone["tokens"]
    assert other_seed["tokens"] != alone["tokens"]
    assert alone["tokens"] != GOLDEN[0]["token_ids"][:24]


def test_idle_ranks_leave_the_cores_alone(three_ranks: dict[str, Any]) -> None:
    leader, *followers = three_ranks["idle_cpu_shares"]

    assert max(followers) < 0.05
    assert leader < 0.05


@pytest.mark.full
def test_nine_ranks_share_the_three_key_value_heads(generate: Generate) -> None:
    output = generate(9, [[greedy(golden, 12) for golden in GOLDEN[:3]]])

    assert tokens_of(output["rounds"][0]) == [golden["token_ids"][:12] for golden in GOLDEN[:3]]


def test_a_step_longer_than_a_message_reaches_all_ranks(generate: Generate) -> None:
    long_prompt = (GOLDEN[0]["prompt_token_ids"] * 10)[:300]

    output = generate(3, [[{"prompt": long_prompt, "max_tokens": 2}], [{"prompt": long_prompt, "max_tokens": 2}]])

    first, second = output["rounds"]
    assert len(first[0]["tokens"]) == 2
    assert first[0]["tokens"] == second[0]["tokens"]


def test_closing_an_engine_that_never_started_releases_the_other_ranks(generate: Generate) -> None:
    assert generate(3, [])["rounds"] == []


def test_two_ranks_are_refused(mpirun: Mpirun, model_dir: Path, tmp_path: Path) -> None:
    task = tmp_path / "rounds.json"
    task.write_text('{"rounds": [], "idle_seconds": 0}')

    done = mpirun(2, PROGRAMS / "reference_generate.py", str(model_dir), str(task))

    assert done.returncode == 78
    assert "expected: tensor_parallel_size one of 1, 3, 9" in done.stderr


def test_an_error_on_another_rank_comes_out_of_follow(mpirun: Mpirun, model_dir: Path) -> None:
    done = mpirun(3, PROGRAMS / "reference_follower_failure.py", str(model_dir), timeout=60)

    assert done.returncode == 70
    assert "follow raised: rank 1 lost its weights" in done.stderr


@pytest.mark.landing("6-2")
@pytest.mark.parametrize(("ranks", "pp_size"), [(2, 2), (3, 3), (6, 2)])
def test_stages_make_the_golden_tokens(generate: Generate, ranks: int, pp_size: int) -> None:
    """Alone and in company; 30 layers over 3 stages, and 2 stages of 3 ranks each as on two nodes."""
    chosen = GOLDEN[:3]
    output = generate(ranks, [[greedy(chosen[0], 16)], [greedy(golden, 16) for golden in chosen]], pp_size=pp_size)

    assert tokens_of(output["rounds"][0])[0] == chosen[0]["token_ids"][:16]
    assert tokens_of(output["rounds"][1]) == [golden["token_ids"][:16] for golden in chosen]
