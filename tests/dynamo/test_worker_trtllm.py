# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM workers end to end: the unmodified ``dynamo.trtllm`` over a stand-in for the engine, whose ranks run a real model.

Another Dynamo can be laid over the installed one by PYTHONPATH.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynamo_mpi.common.subprocess import session_members
from dynamo_mpi.telemetry.startup_trace import read_traces
from tests.conftest import ROOT
from tests.dynamo.running import EtcdServer, RunningWorker, eventually, running_frontend
from tests.dynamo.test_standin_trtllm import ask
from tests.gpu_nodes import gpu_node, write_whole
from tests.servers import running_nats

pytestmark = pytest.mark.dynamo
RANKS = 3
FLAGS = ("--engine", "trtllm", "--allow-no-gpu", "--max-seq-len", "512", "--max-batch-size", "2")
# what a user may meet in the five seconds after a fault, on two shared cores with seven processes
PROMPT_SECONDS = 5.0
Start = Callable[..., RunningWorker]


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """The worker's temporary folder. Short: a unix socket's name holds 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    (tmp_path / "temporary").symlink_to(folder)
    return folder


@pytest.fixture
def start(tmp_path: Path, etcd: EtcdServer, small_model_dir: Path, temporary: Path) -> Iterator[Start]:
    """Start TensorRT-LLM workers; what is left of them is killed, and of what they must not leave nothing is there."""
    workers: list[RunningWorker] = []
    paths = [os.environ.get("PYTHONPATH"), str(ROOT / "tests/standins"), str(ROOT)]
    usual = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0.2",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(temporary),
    }

    def begin(
        *flags: str, ranks: int = RANKS, has_gpus: bool = False, model: Path = small_model_dir, **environment: str
    ) -> RunningWorker:
        folder = tmp_path / f"worker-{len(workers)}"
        folder.mkdir()
        flags = (*(flag for flag in FLAGS if flag != "--allow-no-gpu" or not has_gpus), *flags)
        workers.append(RunningWorker(folder, etcd, model, ranks, *flags, **{**usual, **environment}))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()
    assert leftovers(temporary) == []
    shutil.rmtree(temporary)


def leftovers(folder: Path) -> list[str]:
    """Return what of ours is in the temporary folder; the launcher and the engine have things of their own there."""
    return sorted(path.name for path in folder.glob("dynamo[-_]mpi*"))


def child_of(worker: RunningWorker) -> int:
    """Return the process of ``dynamo.trtllm``."""
    found = subprocess.run(
        ["pgrep", "-P", str(worker.rank_zero()), "-f", "dynamo.trtllm --model"],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(found.stdout)


def reports(worker: RunningWorker) -> list[str]:
    """Return the failure reports, which begin with our name."""
    return re.findall(r"dynamo_mpi: rank \d+[^\n]*: error[^\n]*", worker.text())


def gone_after(pid: int, number: signal.Signals) -> bool:
    """Signal a process, and return whether it was there no longer."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    return ended(pid)


def ends_promptly(worker: RunningWorker, fault: str, seconds: float = PROMPT_SECONDS) -> int:
    """Wait until the fault is there, and return the exit code, which must follow soon."""
    eventually(lambda: fault in worker.text(), fault)
    begin = time.monotonic()
    code = worker.wait()
    assert time.monotonic() - begin < seconds
    return code


def ended(pid: int) -> bool:
    """Return whether a process is gone, or its exit code isn't fetched yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_answers_drains_and_ends_with_zero(
    start: Start, etcd: EtcdServer, tmp_path: Path, model_dir: Path, temporary: Path
) -> None:
    # flags that only dynamo.trtllm knows
    passed_on = ("--publish-kv-events", "--kv-block-size", "16")
    page = tmp_path / "start.html"
    flags = ("--timeline", str(page), "--progress-interval", "0.5", *passed_on)
    worker = start(*flags, model=model_dir, UCX_TLS="tcp", NCCL_DEBUG="WARN", SLURM_JOB_ID="4711", DYN_LOG="debug")
    ready = worker.ready()
    assert (ready["ranks"], ready["endpoint"]) == (RANKS, "dyn://dynamo.backend.generate")
    assert set(ready["phases"]) >= {"load", "warmup"}
    child = child_of(worker)
    secrets = assert_the_child_knows_what_it_should(child)
    # read while it serves: the session's socket is needed no longer
    assert leftovers(temporary) == []

    assert etcd.keys("v1/event_channels/")

    with running_frontend(tmp_path, etcd) as frontend:
        eventually(lambda: model_dir.name in frontend.models(), "the model is listed")
        choice = ask(frontend.port, model_dir.name, "What is the capital of France?")
        assert choice["message"]["content"] == "The capital of France is Paris."
        os.kill(worker.rank_zero(), signal.SIGTERM)
        eventually(lambda: not etcd.keys(), "the keys are gone", 10)
        assert worker.wait() == 0, worker.text()
    assert ended(child)
    assert reports(worker) == []
    assert not worker.ready_file.exists()
    text = worker.text()
    assert f"rank2 run mgmn worker node with mpi_world_size: {RANKS} ..." in text
    assert f"rank0 run mgmn leader node with mpi_world_size: {RANKS} ..." in text
    assert f"gpus_per_node {RANKS}" in text
    # what the engine does on a rank isn't seen, so no rank is shown as done
    assert re.search(
        rf"rank 0 on \S+: load \d+ s, {RANKS} ranks have read [\d.]+ MB, the least \S+ \(rank \d\): [\d.]+ MB\n", text
    )
    assert re.search(r"dynamo_mpi: rank 2 on \S+: phase load\n", text)
    assert not [secret for secret in secrets if secret in text]
    (drawn,) = read_traces(page)
    assert (drawn.outcome, drawn.engine, len(drawn.ranks)) == ("ended", "trtllm", RANKS)
    # the other ranks go by what rank 0 says
    for rank in drawn.ranks:
        assert {"load", "warmup", "serve", "drain"} <= {span.phase for span in rank.spans}


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_another_rank_is_one_to_all(start: Start, etcd: EtcdServer, number: signal.Signals) -> None:
    worker = start()
    worker.ready()
    os.kill(worker.ranks()[1], number)
    assert worker.wait() == 0, worker.text()
    assert worker.text().count(f"got {number.name}, which goes for all ranks") == 1
    assert reports(worker) == []
    assert etcd.keys() == []


def heap_of(pid: int) -> bytes:
    """Return a process's heap."""
    (heap,) = (line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if line.endswith("[heap]"))
    begin, end = (int(text, 16) for text in heap.split()[0].split("-"))
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(begin)
        return memory.read(end - begin)


def assert_the_child_knows_what_it_should(child: int) -> list[str]:
    """Look at its environment, and at what everybody can see of every process; return its secrets."""
    raw = Path(f"/proc/{child}/environ").read_bytes().decode(errors="replace")
    environment = dict(entry.partition("=")[::2] for entry in raw.split("\0") if entry)
    # not the ranks': for the world of one that importing TensorRT-LLM makes in the child
    assert environment.pop("OMPI_MCA_btl") == "self"
    launch = ("OMPI_", "PMIX_", "PMI_", "SLURM_", "PRTE_", "MPI_")
    assert not [name for name in environment if name.startswith(launch) and not name.endswith("_PREFIX")]
    assert {"UCX_TLS": "tcp", "NCCL_DEBUG": "WARN", "DYN_MPI_JOB_ID": "4711"}.items() <= environment.items()
    name = "TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY"
    assert name not in environment
    # set after its start, so not in what another process of its user sees
    (secret,) = {key.decode() for key in re.findall(rf"{name}=([0-9a-f]{{64}})\0".encode(), heap_of(child))}
    assert environment["tllm_mpi_size"] == str(RANKS)
    # its environment is its own user's to read; everybody can read command lines
    assert Path(f"/proc/{child}/environ").stat().st_mode & 0o077 == 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert secret.encode() not in path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [secret]


@pytest.mark.full
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_role_of_a_pair_is_proven_without_its_peer(role: str, start: Start, etcd: EtcdServer) -> None:
    worker = start("--role", role, "--trtllm.cache_transceiver_config.backend", "DEFAULT")
    assert worker.ready()["endpoint"] == f"dyn://dynamo.{'prefill' if role == 'prefill' else 'backend'}.generate"
    os.kill(worker.rank_zero(), signal.SIGTERM)
    assert worker.wait() == 0, worker.text()


def test_a_pair_answers_as_one_worker_does(start: Start, etcd: EtcdServer, tmp_path: Path, model_dir: Path) -> None:
    transceiver = ("--trtllm.cache_transceiver_config.backend", "DEFAULT")
    prefill = start("--role", "prefill", *transceiver, model=model_dir)
    prefill.ready()
    decode = start("--role", "decode", *transceiver, ranks=1, model=model_dir)
    decode.ready()
    with running_frontend(tmp_path, etcd) as frontend:
        eventually(lambda: model_dir.name in frontend.models(), "the model is listed")
        choice = ask(frontend.port, model_dir.name, "What is the capital of France?")
        assert choice["message"]["content"] == "The capital of France is Paris."
    for worker in (prefill, decode):
        os.kill(worker.rank_zero(), signal.SIGTERM)
        assert worker.wait() == 0, worker.text()


@pytest.mark.full
def test_a_world_of_one_rank(start: Start) -> None:
    worker = start(ranks=1)
    worker.ready()
    os.kill(worker.rank_zero(), signal.SIGTERM)
    assert worker.wait() == 0, worker.text()


@pytest.mark.landing("2-1.4.0rc1")
@pytest.mark.parametrize("version", ["1.3.0rc22", "1.4.0rc1"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_raises_while_loading_ends_all_with_its_traceback(rank: int, version: str, start: Start) -> None:
    worker = start(STANDIN_TRTLLM_FAULT=f"raise:{rank}", STANDIN_TRTLLM_VERSION=version)
    assert ends_promptly(worker, "stand-in fault: now") == 70, worker.text()
    assert worker.text().count(f"RuntimeError: stand-in fault: rank {rank} can't load") >= 1
    (report,) = reports(worker)
    assert "error in load: " + ("Traceback" if rank == 0 else f"rank {rank} on ") in report
    assert session_members(worker.process.pid) == []


@pytest.mark.landing("all-0")
@pytest.mark.parametrize(
    ("who", "end_seconds", "ranks"),
    [
        ("all", 0, "rank [0-2]"),  # the child is quick: it is gone before anyone has looked for ranks that left
        ("all", 4, "rank [0-2]"),
        ("0", 0, "rank 0"),
        ("0", 4, "rank 0"),
    ],
    ids=["all-0", "all-4", "0-0", "0-4"],
)
def test_a_failed_start_is_reported_by_its_cause(who: str, end_seconds: int, ranks: str, start: Start) -> None:
    """The real worker logs it and returns; the child gets it as the cause of another error, and takes its time to end."""
    worker = start(STANDIN_TRTLLM_FAULT=f"fail:{who}", STANDIN_TRTLLM_END_SECONDS=str(end_seconds))
    assert ends_promptly(worker, "stand-in fault: now", 2 * PROMPT_SECONDS + end_seconds) == 70, worker.text()
    (report,) = reports(worker)
    why = (
        rf"{ranks} on \S+ logged: Failed to initialize executor on {ranks}: stand-in fault: {ranks} has no memory left"
    )
    assert re.search(rf"error in load: dynamo\.trtllm ended with code 1: {why}; its last lines:", report), report
    assert session_members(worker.process.pid) == []


def test_a_child_that_goes_on_after_a_failed_start_isnt_waited_for_for_long(start: Start) -> None:
    worker = start(STANDIN_TRTLLM_FAULT="fail:all", STANDIN_TRTLLM_END_SECONDS="600")
    assert ends_promptly(worker, "stand-in fault: now", 30) == 70, worker.text()
    (report,) = reports(worker)
    assert re.search(
        r"ranks 0-2 on \S+ left TensorRT-LLM's worker .*: rank \d on \S+ logged: Failed to init.* memory left", report
    )


def test_a_rank_that_leaves_as_if_it_were_done_ends_all(start: Start) -> None:
    worker = start(STANDIN_TRTLLM_FAULT="fail:1")
    assert ends_promptly(worker, "[E] Failed to initialize executor on rank 1") == 70, worker.text()
    (report,) = reports(worker)
    assert "error in load: rank 1 on " in report
    assert "left TensorRT-LLM's worker" in report
    assert "logged: Failed to initialize executor on rank 1: stand-in fault: rank 1 has no memory left" in report


@pytest.mark.landing("crash-1")
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("crash", 70, "RuntimeError: stand-in fault: illegal memory access"),
        ("stick", 124, "Hang detected after 300 seconds."),
    ],
    ids=["crash", "stick"],
)
def test_tensorrt_llms_own_hard_kill_is_reported_first(
    fault: str, code: int, said: str, rank: int, start: Start
) -> None:
    worker = start(STANDIN_TRTLLM_FAULT=f"{fault}:{rank}")
    assert ends_promptly(worker, "propagating hard-kill to all ranks") == code, worker.text()
    (report,) = reports(worker)
    assert ("dynamo_mpi: rank 0 on " in report) if rank == 0 else ("rank 1 on " in report)
    assert "kills all ranks; its last errors:" in report
    block = worker.text().partition(report)[2]
    assert f"    {said}\n" in block, block
    assert session_members(worker.process.pid) == []


def test_what_the_driver_says_of_a_gpu_is_in_the_report_of_the_failure(start: Start, tmp_path: Path) -> None:
    nvml, failures = tmp_path / "node.json", tmp_path / "failures"
    nvml.write_text(gpu_node(*[{}] * RANKS))
    flags = ("--probe", "none", "--failure-dir", str(failures))
    worker = start(*flags, has_gpus=True, PYNVML_STANDIN=str(nvml))
    worker.ready()
    write_whole(nvml, gpu_node(*[{}] * RANKS, xids=[["GPU-1", 79]]))
    said = "Xid 79 (GPU has fallen off the bus) on GPU 1 (GPU-1)"
    eventually(lambda: f"warning: the NVIDIA driver reports {said}" in worker.text(), "the agent has heard of it")
    os.kill(worker.ranks()[1], signal.SIGKILL)
    assert worker.wait() != 0
    assert re.search(rf"  GPU errors by the driver:\n    {re.escape(said)} of \S+, [\d.]+ s before\n", worker.text())
    (written,) = [json.loads(path.read_text()) for path in failures.iterdir()]
    (error,) = written["gpu_errors"]
    assert (written["rank"], error["xid"], error["uuid"], error["host"]) == (1, 79, "GPU-1", written["host"])
    assert -30 < error["at"] <= 0


def test_a_model_whose_log_probabilities_are_no_numbers_isnt_ready(start: Start, etcd: EtcdServer) -> None:
    worker = start(STANDIN_TRTLLM_FAULT="nan:0")
    assert worker.wait() == 70, worker.text()
    (report,) = reports(worker)
    assert (
        "error in warmup: the first completion failed: RuntimeError: 8 of 8 log probabilities are no numbers" in report
    )
    assert not worker.ready_file.exists()
    assert etcd.keys("v1/instances/") == []


@pytest.mark.serial
def test_a_load_that_is_late_ends_with_where_every_rank_stands(start: Start) -> None:
    worker = start("--load-timeout", "9", STANDIN_TRTLLM_FAULT="hang:1")
    eventually(lambda: "run mgmn leader node" in worker.text(), "it loads")
    begin = time.monotonic()
    assert worker.wait() == 124, worker.text()
    assert time.monotonic() - begin < 9 + PROMPT_SECONDS
    (report,) = reports(worker)
    assert "was not registered after 9 s" in report
    stacks = worker.text().partition("where the ranks are:\n")[2]
    assert "suffer_while_loading" in stacks
    assert stacks.index("rank 1 on ") < stacks.index("ranks 0, 2 on ") < stacks.index("in load\n")


@pytest.mark.landing("15-75-dynamo\\\\.trtllm ended with code 0 although it was not asked to end")
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGKILL, 137, r"dynamo\.trtllm was ended by signal 9 \(SIGKILL\)"),
        (signal.SIGTERM, 75, r"dynamo\.trtllm ended with code 0 although it was not asked to end"),
    ],
)
def test_a_child_that_ends_unasked_ends_all(
    number: signal.Signals, code: int, said: str, start: Start, etcd: EtcdServer
) -> None:
    """Dynamo's runtime returns with 0, as after SIGTERM, when its lease is lost."""
    worker = start()
    worker.ready()
    child = child_of(worker)
    os.kill(child, number)
    eventually(lambda: ended(child), "the child has ended", 20)
    begin = time.monotonic()
    assert worker.wait() == code, worker.text()
    assert time.monotonic() - begin < PROMPT_SECONDS
    (report,) = reports(worker)
    assert re.search(said, report)
    assert session_members(worker.process.pid) == []
    assert not worker.ready_file.exists()


def test_the_child_dies_with_rank_zero(start: Start) -> None:
    worker = start()
    worker.ready()
    child = child_of(worker)
    os.kill(worker.rank_zero(), signal.SIGKILL)
    assert worker.wait() != 0
    eventually(lambda: ended(child), "the child has ended", PROMPT_SECONDS)


@pytest.mark.full
def test_over_nats_a_worker_is_distinguished_from_one_that_was_there(start: Start, etcd: EtcdServer) -> None:
    with running_nats() as nats:
        plane = {"NATS_SERVER": nats, "DYN_REQUEST_PLANE": "nats"}
        first = start(ranks=1, **plane)
        first.ready()
        second = start(ranks=1, STANDIN_TRTLLM_FAULT="slow:4", **plane)
        assert second.ready()["phases"]["load"] > 4
        assert len(etcd.keys("v1/instances/dynamo/backend/generate/")) == 2
        for worker in (first, second):
            os.kill(worker.rank_zero(), signal.SIGTERM)
            assert worker.wait() == 0, worker.text()


@pytest.mark.full
def test_a_lost_lease_is_no_success(start: Start, etcd: EtcdServer) -> None:
    worker = start()
    worker.ready()
    etcd.revoke_leases()
    assert worker.wait() == 75, worker.text()
    (report,) = reports(worker)
    assert "lost this worker's lease" in report or "lease was lost" in report


def test_bad_flags_of_dynamo_are_its_own_to_refuse(start: Start, tmp_path: Path) -> None:
    (tmp_path / "caches").write_text("no folder")
    worker = start("--no-such-flag", TRTLLM_CACHE_DIR=str(tmp_path / "caches"))
    assert worker.wait() in (64, 70), worker.text()
    assert worker.text().count("no FlashInfer workspace in ") == 1, worker.text()
    assert f"warning: ranks 0-{RANKS - 1}: no FlashInfer workspace in {tmp_path}/caches (" in worker.text()
    (report,) = reports(worker)
    assert "dynamo.trtllm ended with code" in report
    assert "--no-such-flag" in worker.text()


def is_rank_zero(pid: int) -> bool:
    """Return whether a process is rank 0 itself; one that has ended meanwhile isn't."""
    try:
        words, variables = (
            (Path("/proc") / str(pid) / name).read_bytes().split(b"\0") for name in ("cmdline", "environ")
        )
    except OSError:
        return False
    return b"dynamo_mpi.worker" in words and b"PMIX_RANK=0" in variables and words[0].endswith(b"python")


def test_sigterm_while_loading_does_not_wait_for_the_load(start: Start, tmp_path: Path) -> None:
    worker = start(STANDIN_TRTLLM_FAULT="slow:60")
    eventually(lambda: "run mgmn leader node" in worker.text(), "it loads")
    # the oldest: what rank 0 is just starting still looks like it
    leader = min(pid for pid in session_members(worker.process.pid) if is_rank_zero(pid))
    begin = time.monotonic()
    os.kill(leader, signal.SIGTERM)
    assert worker.wait() == 143, worker.text()
    assert time.monotonic() - begin < PROMPT_SECONDS
    assert session_members(worker.process.pid) == []


@pytest.mark.full
def test_a_second_signal_cuts_the_drain_short(start: Start, etcd: EtcdServer) -> None:
    worker = start(DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS="60")
    worker.ready()
    os.kill(worker.rank_zero(), signal.SIGTERM)
    leader = worker.rank_zero()
    eventually(lambda: "drain: " in worker.text(), "it drains")
    begin = time.monotonic()
    # what comes within a second is the same signal, forwarded by the launcher
    eventually(lambda: gone_after(leader, signal.SIGTERM), "it has ended")
    assert worker.wait() == 143, worker.text()
    assert time.monotonic() - begin < PROMPT_SECONDS
