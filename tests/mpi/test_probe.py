# SPDX-License-Identifier: Apache-2.0
"""The probes over real ranks: figures, wrong data, and a rank that keeps the others waiting."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Mpirun
from tests.dynamo.running import eventually, failure_in
from tests.fault_traces import processes_with
from tests.gpu_nodes import gpu_node
from tests.servers import running_etcd

pytestmark = pytest.mark.mpi
PROGRAM = Path(__file__).parent / "programs" / "probed_world.py"
# as two nodes would be, so that there are pairs of all kinds
FOUR = "fabric|5.0|mpi|node=0,1;2,3|tp=0,1;2,3|pp=0,2;1,3"
Done = subprocess.CompletedProcess[str]


def fault(text: str) -> dict[str, str]:
    return {"DYN_MPI_FAULT": text, "DYN_MPI_ALLOW_FAULTS": "1"}


def results_of(done: Done) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return content


def test_ranks_measure_what_lies_between_them(mpirun: Mpirun) -> None:
    done = mpirun(4, PROGRAM, FOUR, "strict")
    assert done.returncode == 0, done.stderr
    fabric = results_of(done)["figures"]["fabric"]
    assert fabric["over"] == "mpi"
    assert fabric["library"].startswith("Open MPI")
    assert list(fabric["kinds"]) == ["exchange near", "exchange far", "all-reduce tp", "all-to-all tp"]
    for kind in fabric["kinds"].values():
        slowest, middle = kind["gbps"]
        assert 0 < slowest <= middle < 1000
        assert 0 < kind["us"][0] <= kind["us"][1]
    assert results_of(done)["text"].startswith("probe: ")


def test_ranks_receive_from_callers_and_miss_the_silent_one(mpirun: Mpirun) -> None:
    done = mpirun(3, PROGRAM.with_name("late_calls.py"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[(2,), ()], [(2,), ()], [(0, 1)]]"


@pytest.mark.landing("2")
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_sends_wrong_data_is_named_and_ends_the_world(mpirun: Mpirun, rank: int) -> None:
    done = mpirun(
        3, PROGRAM, "fabric|5.0|mpi|node=0,1,2|tp=0,1,2", "report", env=fault(f"rank{rank}:hardware_check:corrupt")
    )
    assert done.returncode == 75, done.stderr
    assert f"error N1: data are wrong when they arrive: rank {rank} on " in done.stderr
    assert done.stderr.count("error in hardware_check") == 1


def test_a_rank_in_no_pair_is_named_by_the_collectives(mpirun: Mpirun) -> None:
    plan = "fabric|5.0|mpi|node=0,1|tp=0,1,2"
    done = mpirun(3, PROGRAM, plan, "report", env=fault("rank2:hardware_check:corrupt"))
    assert done.returncode == 75, done.stderr
    assert "error N1: data are wrong when they arrive: rank 2 on " in done.stderr


def test_a_rank_that_stops_is_named_at_the_deadline(mpirun: Mpirun, tmp_path: Path) -> None:
    mark = f"PROBE_MARK={tmp_path}"
    done = mpirun(
        4,
        PROGRAM,
        FOUR.replace("5.0", "1.0"),
        "report",
        env={**fault("rank2:hardware_check:stop"), "PROBE_MARK": str(tmp_path)},
    )
    assert done.returncode == 124, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if "error in hardware_check" in line]
    assert "N2: the check hangs: rank 2 on " in said
    assert "does not answer" in said
    assert "ranks 0, 3 on " in said.partition("; ")[2], "its neighbours wait for it"
    eventually(lambda: not processes_with(f"{mark}\0"), "no process is left", 5)


def test_a_worker_that_is_not_to_go_on_leaves_in_order(mpirun: Mpirun, tmp_path: Path, model_dir: Path) -> None:
    flags = ("--model", str(model_dir), "--tp-size", "3", "--probe", "fabric", "--failure-dir", str(tmp_path))
    with running_etcd() as url:
        done = mpirun.worker(3, *flags, env={**fault("rank1:hardware_check:corrupt"), "ETCD_ENDPOINTS": url})
    assert done.returncode == 75, done.stderr
    assert done.stderr.count("error in hardware_check: 1 error, nothing was loaded\n") == 1
    assert "error N1: data are wrong when they arrive: rank 1 on " in done.stderr
    report = failure_in(tmp_path / "backend-rank-0.json")
    assert (report["phase"], report["exit_code"]) == ("hardware_check", 75)


def test_a_rank_that_is_late_is_no_finding(mpirun: Mpirun) -> None:
    done = mpirun(
        3, PROGRAM, "fabric|5.0|mpi|node=0,1,2|tp=0,1,2", "strict", env=fault("rank1:hardware_check:slow=0.5")
    )
    assert done.returncode == 0, done.stderr
    assert results_of(done)["findings"] == []


def test_nccl_that_is_not_there_is_reported_and_no_reason_to_stop(mpirun: Mpirun) -> None:
    done = mpirun(2, PROGRAM, "fabric|5.0|nccl|node=0,1|tp=0,1", "report")
    assert done.returncode == 0, done.stderr
    (finding,) = results_of(done)["findings"]
    assert (finding["rule"], finding["severity"]) == ("N7", "warning")
    assert "ranks 0-1 on " in finding["message"]
    assert "the CUDA driver can't be loaded: libcuda.so.1" in finding["found"]


def test_the_gpus_of_all_ranks_are_judged_together(mpirun: Mpirun, tmp_path: Path) -> None:
    node = tmp_path / "node.json"
    clocks = {"1": 1200, "2": 2619}
    node.write_text(gpu_node({}, {"recovery_action": 1, "remapped": [0, 3, 1, 0]}, {"clocks": clocks}))
    path = f"{ROOT}:{ROOT / 'tests' / 'standins'}"
    environment = {"PYNVML_STANDIN": str(node), "PYTHONPATH": path}
    done = mpirun(3, PROGRAM, "gpu|2.0|nccl|node=0,1,2", "strict", env=environment)
    assert done.returncode == 75, done.stderr
    assert [(one["rule"], one["message"].partition(": ")[2]) for one in results_of(done)["findings"]] == [
        ("V9", f"rank 1 on {host(done)}"),
        ("V10", f"rank 1 on {host(done)}"),
        ("V14", f"rank 2 on {host(done)}"),
    ]


@pytest.mark.serial
@pytest.mark.landing("0-75")
@pytest.mark.parametrize(("weights", "code"), [(0, 75), (70, 64)])
def test_memory_that_is_not_given_back_has_the_code_of_who_must_act(
    weights: int, code: int, mpirun: Mpirun, tmp_path: Path
) -> None:
    """Somebody else's process is gone on other nodes; weights that don't fit, with what is free on these, are the preflight's to refuse."""
    node = tmp_path / "node.json"
    held = {"free": 60 << 30, "used": 19 << 30, "processes": [[42, 19 << 30]]}
    node.write_text(gpu_node({}, held, total=81559 << 20))
    environment = {
        "PYNVML_STANDIN": str(node),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'standins'}",
        "WEIGHTS": f"{weights << 30}",
    }
    done = mpirun(2, PROGRAM, "gpu|1.0|nccl|node=0,1", "strict", env=environment)
    assert done.returncode == code, done.stderr
    assert "error V2: " in done.stderr
    assert "pid 42 holds 19.0 GiB" in done.stderr
    assert results_of(done)["figures"]["gpu"]["waited"] >= 0.4


def host(done: Done) -> str:
    return done.stderr.partition("dynamo_mpi: rank 0 on ")[2].partition(":")[0]
