# SPDX-License-Identifier: Apache-2.0
"""What is read from launchers' own words, as they were recorded; see ``tests/data/launchers``."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_mpi.deploy.first_death import Death, ended_task, first_death

RECORDED = Path(__file__).resolve().parent.parent / "data" / "launchers"
UNSURE = ", according to its launcher, which was already ending the ranks"
SAID = {
    "openmpi5_sigkill": "rank 1 on vm was killed by signal 9 (SIGKILL)",
    "openmpi5_sigterm": "rank 1 on vm was killed by signal 15 (SIGTERM)",
    "openmpi5_sigsegv": "rank 1 on vm was killed by signal 11 (SIGSEGV)",
    "openmpi5_exit3": "rank 1 left with exit code 3",
    "openmpi5_exit0": "rank 1 on vm left without MPI's end",
    "openmpi5_abort14": None,
    "openmpi5_sigkill_over_tcp": "rank 1 on vm was killed by signal 9 (SIGKILL)",
    "openmpi5_daemon_killed": "a rank on n2 ended with its host's daemon, or that did not start",
    "openmpi4_sigkill": "rank 1 on vm was killed by signal 9 (SIGKILL)",
    "openmpi4_sigsegv": "rank 1 on vm was killed by signal 11 (SIGSEGV)",
    "openmpi4_exit3": "rank 1 left with exit code 3",
    "openmpi4_exit0": "rank 1 on vm left without MPI's end",
    "openmpi4_sigkill_over_tcp": "rank 1 on vm was killed by signal 9 (SIGKILL)",
    "openmpi4_daemon_killed": "a rank on n2 was lost with its host, whose daemon mpirun can no longer reach",
    # where another leaves with a code it may say the same of one that it has killed itself
    "mpich_sigkill": f"a rank on vm (process 4999) was killed by signal 9 (SIGKILL){UNSURE}",
    # its "EXIT CODE" is another rank's as well
    "mpich_sigterm": "a rank on vm (process 5047) was killed by signal 15 (SIGTERM)",
    "mpich_sigsegv": "a rank on vm (process 5097) was killed by signal 11 (SIGSEGV)",
    "mpich_exit3": None,
    "srun_label_sigkill": "rank 2 on n2 was killed by signal 9 (SIGKILL)",
    "srun_sigkill": "rank 2 on n2 was killed by signal 9 (SIGKILL)",
    "srun_sigkill_without_kill_on_bad_exit": "rank 2 on n2 was killed by signal 9 (SIGKILL)",
    "srun_label_sigsegv": "rank 2 on n2 was killed by signal 11 (SIGSEGV)",
    "srun_label_exit3": "rank 2 on n2 left with exit code 3",
    "srun_label_exit0": "rank 2 on n2 exited without MPI_Finalize",
    "srun_label_abort14": f"rank 2 on n2 left with exit code 14{UNSURE}",
    "srun_label_openmpi5_sigkill": "rank 1 on n2 was killed by signal 9 (SIGKILL)",
    "srun_label_openmpi5_sigkill_aborted_first": f"rank 1 on n2 was killed by signal 9 (SIGKILL){UNSURE}",
    "srun_label_openmpi5_sigsegv_aborted_first": f"rank 0 on n1 was killed by signal 11 (SIGSEGV){UNSURE}",
    "srun_label_openmpi5_sigkill_two_a_node": f"one of ranks 2, 3 on n2 was killed by signal 9 (SIGKILL){UNSURE}",
    "srun_openmpi5_sigkill_two_a_node": f"one of ranks 2, 3 on n2 was killed by signal 9 (SIGKILL){UNSURE}",
    "srun_label_mpich_sigkill": "rank 2 on n2 was killed by signal 9 (SIGKILL)",
    "srun_label_node_lost": "a rank on n2 was lost with its node, according to Slurm",
    "srun_label_node_off_at_start": "a rank on n3 could not be started by its node's slurmd: Communication connection failure",
    "srun_label_slurmd_stopped": "a rank on n4 could not be started by its node's slurmd: Socket timed out on send/recv operation",
    "srun_label_scancelled": f"one of ranks 2, 3 on n2 was killed by signal 9 (SIGKILL){UNSURE}",
    "srun_label_no_program": "a rank on n2 could not be started: /nonexistent: No such file or directory",
}


def recorded(name: str) -> str:
    return (RECORDED / f"{name}.txt").read_text(encoding="utf-8")


def test_each_recording_has_a_case() -> None:
    assert sorted(path.stem for path in RECORDED.glob("*.txt")) == sorted(SAID)


@pytest.mark.parametrize(("name", "said"), SAID.items())
def test_what_the_launcher_says_of_the_first_death(name: str, said: str | None) -> None:
    death = first_death(recorded(name))
    assert (None if death is None else str(death)) == said


def test_the_ranks_words_around_it_change_nothing() -> None:
    text = recorded("srun_label_sigkill").replace("srun: error", "1: engine: step 7\nsrun: error", 1)
    assert first_death(f"0: warning: a task was Killed\n{text}3: bye\n") == Death((2,), "n2", signal=9)


@pytest.mark.parametrize(
    ("line", "death"),
    [
        ("srun: error: n2: task 3: Out Of Memory", Death((3,), "n2", how="ran out of memory")),
        ("srun: error: n2: task 3: Segmentation fault (core dumped)", Death((3,), "n2", signal=11)),
        ("srun: error: n[1-2]: tasks 0-1,3: Exited with exit code 137", Death((0, 1, 3), "", code=137)),
        (
            "slurmstepd: error: *** STEP 7.1 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***",
            Death(how="was ended with its step by Slurm, due to time limit"),
        ),
        ("An MPI communication peer process has unexpectedly disconnected.\nLocal host: n1\nPeer host:  n2", None),
    ],
)
def test_other_words_of_the_same_kinds(line: str, death: Death | None) -> None:
    found = first_death(f"srun: x\n{line}\n")
    if death is None:
        assert found is not None
        assert str(found) == "a rank on n2 closed its connections, which ended its peers"
    else:
        assert found == death


@pytest.mark.parametrize(
    ("text", "death"),
    [
        ("0: up\nsrun: error: n5: task 1: Exited with exit code 127\n", Death((1,), "n5", code=127)),
        # a rank that serves may print anything; --label marks it
        ("0: srun: error: n5: task 1: Exited with exit code 127\n1: MPI_ABORT was invoked\n", None),
        ("srun: error: Unable to create step for job 7\n", None),
    ],
)
def test_only_sruns_own_line_ends_a_step_that_still_runs(text: str, death: Death | None) -> None:
    assert ended_task(text) == death


def test_no_word_of_a_death_is_none() -> None:
    assert first_death("") is None
    assert (
        first_death("srun: error: Unable to create step for job 7: Job/step already completing or completed\n") is None
    )


def test_open_mpi_4_may_name_no_rank() -> None:
    text = recorded("openmpi4_sigkill").partition("mpirun noticed")[0]
    assert str(first_death(text)) == "a rank ended with a code other than 0; mpirun reports nothing else"


def test_what_the_launcher_leaves_out_follows_from_the_placement() -> None:
    assert Death((2,), code=3).placed(("n1", "n2"), 2).host == "n2"
    assert Death(host="n2", signal=9).placed(("n1", "n2"), 1).ranks == (1,)
    # several ranks on that host: which of them isn't known
    assert Death(host="n2", signal=9).placed(("n1", "n2"), 2).ranks == ()
    assert Death((9,), code=3).placed(("n1", "n2"), 2).host == ""


def test_a_code_as_a_shell_says_a_signal() -> None:
    assert str(Death((0,), "n1", code=137)) == "rank 0 on n1 left with exit code 137, as after signal 9 (SIGKILL)"
    assert str(Death()) == "a rank died"
