# SPDX-License-Identifier: Apache-2.0
"""What dynamo.trtllm is started with: its own parser reads back what we mean."""

from __future__ import annotations

import json
import os
import sys

from dynamo_mpi.config.sources import WorkerSources
from dynamo_mpi.config.worker import load_settings
from dynamo_mpi.engines.trtllm.child_command import SessionAddress, child_command, child_environment, drain_seconds
from tests.conftest import ROOT, run_command

MODEL = ("--engine", "trtllm", "--model", "/models/a")
SESSION = SessionAddress("ipc:///tmp/x/session", "ab" * 32, 16)
SLURM = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "3",
    "SLURM_PROCID": "0",
    "SLURMD_NODENAME": "n1",
    "SRUN_DEBUG": "3",
    "PMIX_RANK": "0",
    "PMI_FD": "3",
    "OMPI_MCA_btl": "tcp,self",
    "OMPI_COMM_WORLD_RANK": "0",
    "PRTE_LAUNCHED": "1",
    "MPI_LOCALRANKID": "0",
    "I_MPI_RANK": "0",
    "HYDRA_X": "1",
    "MPICH_X": "1",
    "MV2_X": "1",
    "CRAY_X": "1",
}


def command(*words: str, **environ: str) -> list[str]:
    return list(child_command(load_settings(WorkerSources([*MODEL, *words], environ)), gpus_per_node=8))


def environment_for(environ: dict[str, str], *words: str) -> dict[str, str]:
    return child_environment(environ, SESSION, load_settings(WorkerSources([*MODEL, *words], {})))


def after(flag: str, words: list[str]) -> str:
    assert words.count(flag) == 1, words
    return words[words.index(flag) + 1]


def test_only_what_was_said_is_said() -> None:
    assert command() == [
        *(sys.executable, "-m", "dynamo_mpi.common.run_with_services", "dynamo.trtllm"),
        *("--model", "/models/a", "--served-model-name", "a"),
        *("--endpoint", "dyn://dynamo.backend.generate", "--disaggregation-mode", "agg"),
        *("--discovery-backend", "etcd", "--request-plane", "tcp", "--gpus-per-node", "8"),
    ]


def test_every_engine_option_has_dynamos_flag() -> None:
    words = command(
        *("--tp-size", "8", "--pp-size", "2", "--ep-size", "4", "--enable-attention-dp", "--max-batch-size", "3"),
        *("--max-num-tokens", "9", "--max-seq-len", "7", "--max-beam-width", "1", "--free-gpu-memory-fraction", "0.5"),
        *("--engine-config", "/e.yaml", "--override-engine-args", '{"a": 1}', "--trtllm-version", "1.2.1"),
    )
    assert after("--tensor-parallel-size", words) == "8"
    assert after("--pipeline-parallel-size", words) == "2"
    assert after("--expert-parallel-size", words) == "4"
    assert "--enable-attention-dp" in words
    assert after("--free-gpu-memory-fraction", words) == "0.5"
    assert after("--extra-engine-args", words) == "/e.yaml"
    assert json.loads(after("--override-engine-args", words)) == {"a": 1}
    assert "--trtllm-version" not in words


def test_dynamos_own_parser_reads_back_what_was_meant() -> None:
    """Of the version that is installed; it imports TensorRT-LLM, for which there is a stand-in."""
    words = command(
        *("--role", "prefill", "--no-enable-attention-dp", "--tp-size", "16", "--kv-block-size", "64"),
        *("--publish-kv-events", "--trtllm.kv_cache_config.dtype", "fp8", "--namespace", "ns"),
    )
    config = parsed_by_dynamo(words[4:])
    assert (config["model"], config["served_model_name"]) == ("/models/a", "a")
    assert (config["namespace"], config["component"], config["endpoint"]) == ("ns", "prefill", "generate")
    assert config["disaggregation_mode"] == "DisaggregationMode.PREFILL"
    assert (config["tensor_parallel_size"], config["gpus_per_node"], config["kv_block_size"]) == ("16", "8", "64")
    assert config["enable_attention_dp"] == "False"
    assert json.loads(config["override_engine_args"]) == {"kv_cache_config": {"dtype": "fp8"}}


def parsed_by_dynamo(words: list[str]) -> dict[str, str]:
    """Return what `dynamo.trtllm` understands, each value as text."""
    program = (
        "import json, sys; from dynamo.trtllm.args import parse_args; "
        "print(json.dumps({name: str(value) for name, value in vars(parse_args(sys.argv[1:])).items()}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests/standins"), "TRT_LLM_NO_LIB_INIT": "1"}
    done = run_command([sys.executable, "-c", program, *words], env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    config: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return config


def test_the_child_knows_nothing_of_the_launch_and_everything_else() -> None:
    kept = {"UCX_TLS": "rc", "NCCL_DEBUG": "INFO", "DYN_LOG": "info", "MPI4PY_LIBMPI": "/l", "PATH": "/bin"}
    # where HPC-X's Open MPI is, which is not where it was built for
    kept |= {"OPAL_PREFIX": "/opt/hpcx/ompi", "PMIX_INSTALL_PREFIX": "/opt/hpcx/pmix"}
    environment = environment_for({**SLURM, **kept})
    assert kept.items() <= environment.items()
    assert not [name for name, value in SLURM.items() if environment.get(name) == value]
    assert environment["DYN_MPI_JOB_ID"] == "12"
    assert environment["DYN_MPI_STEP_ID"] == "3"


def test_the_examples_modality_is_dynamos() -> None:
    ours, dynamos = {"MODALITY": "multimodal"}, "DYN_TRTLLM_MODALITY"
    assert environment_for(ours)[dynamos] == "multimodal"
    assert environment_for({**ours, dynamos: ""})[dynamos] == "multimodal"
    assert environment_for({**ours, dynamos: "text"})[dynamos] == "text"
    assert dynamos not in environment_for({"MODALITY": ""})


def test_the_way_to_the_session() -> None:
    left = {"TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR": "tcp://other", "tllm_mpi_size": "1"}
    environment = environment_for(left)
    assert environment["TLLM_SPAWN_PROXY_PROCESS"] == "1"
    assert environment["TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR"] == SESSION.address
    assert environment["TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY"] == SESSION.key
    assert environment["tllm_mpi_size"] == "16"


def test_the_key_is_in_no_text() -> None:
    assert SESSION.key not in repr(SESSION)
    assert SESSION.key not in " ".join(command())


def test_requests_in_flight_get_an_end_where_the_user_gave_none() -> None:
    drain, grace = "DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS"
    usual = environment_for({})
    assert (usual[drain], grace in usual, drain_seconds(usual)) == ("30", False, 35)
    said = environment_for({}, "--drain-timeout", "12")
    assert (said[drain], said[grace], drain_seconds(said)) == ("12", "12", 24)
    stronger = environment_for({drain: "99", grace: "0"}, "--drain-timeout", "12")
    assert (stronger[drain], drain_seconds(stronger)) == ("99", 99)
    assert drain_seconds({grace: "soon"}) == 5
