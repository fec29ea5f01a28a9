# SPDX-License-Identifier: Apache-2.0
"""A worker's settings: flags over environment over a settings file over defaults, each value with its origin.

Names that exist already keep their name (``MODEL_PATH``, ``ENGINE_CONFIG``, ``DYN_*`` …); ours are ``DYN_MPI_*``. Only rank 0 reads settings:
it tells the others what they need to know.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dynamo_mpi import __version__
from dynamo_mpi.engine_options import ENGINE_OPTIONS, GPU, GPUS_PER_NODE, MIN_REQUESTS, engine_flags
from dynamo_mpi.errors import DataError, UsageError
from dynamo_mpi.observe.options import OBSERVE_OPTIONS
from dynamo_mpi.options import (
    Option,
    add_options,
    resolve,
    to_endpoint,
    to_name,
    to_path,
    to_probes,
    to_role,
    to_seconds,
    to_switch,
    to_text,
)
from dynamo_mpi.parallelism.documents import parse_yaml
from dynamo_mpi.parallelism.engine_layers import split_dynamic_flags
from dynamo_mpi.text_files import read_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


ROLE = Option(
    "role",
    ("--role", "--disaggregation-mode"),
    ("DYN_MPI_ROLE", "DYN_TRTLLM_DISAGGREGATION_MODE"),
    "agg",
    to_role,
    "what this worker does; encode is TensorRT-LLM's alone, and prefill and decode take PREFILL_ENGINE_CONFIG or "
    "DECODE_ENGINE_CONFIG where neither --engine-config nor ENGINE_CONFIG is given",
    ("agg", "prefill", "decode", "encode"),
)
OPTIONS: tuple[Option, ...] = (
    ROLE,
    Option(
        "engine",
        ("--engine",),
        ("DYN_MPI_ENGINE",),
        "auto",
        str,
        "what runs the model: auto is trtllm for every role but agg, and where TensorRT-LLM is installed; all further flags of "
        "dynamo.trtllm are handed on to it",
        ("auto", "reference", "trtllm"),
    ),
    Option(
        "model",
        ("--model", "--model-path"),
        ("MODEL_PATH", "DYN_TRTLLM_MODEL"),
        None,
        to_path,
        "model folder, its config.json, or a hub id that is in the cache",
    ),
    Option(
        "served_model_name",
        ("--served-model-name",),
        ("SERVED_MODEL_NAME", "DYN_TRTLLM_SERVED_MODEL_NAME"),
        None,
        to_text,
        "name that clients ask for; the folder's name or the hub id by default",
    ),
    *ENGINE_OPTIONS,
    GPUS_PER_NODE,
    GPU,
    MIN_REQUESTS,
    Option("namespace", ("--namespace",), ("DYN_NAMESPACE",), "dynamo", to_name, "Dynamo namespace"),
    Option(
        "component",
        ("--component",),
        ("DYN_COMPONENT",),
        None,
        to_name,
        "Dynamo component; by role prefill, encode, or else backend",
    ),
    Option(
        "endpoint",
        ("--endpoint",),
        ("DYN_ENDPOINT",),
        None,
        to_endpoint,
        "dyn://namespace.component.endpoint, instead of the two above",
    ),
    Option(
        "request_plane",
        ("--request-plane",),
        ("DYN_REQUEST_PLANE",),
        "tcp",
        str,
        "how requests reach the worker",
        ("tcp", "nats"),
    ),
    Option(
        "discovery_backend",
        ("--discovery-backend",),
        ("DYN_DISCOVERY_BACKEND",),
        "etcd",
        str,
        "where it registers",
        ("etcd",),
    ),
    Option(
        "preflight_only",
        ("--preflight-only",),
        ("DYN_MPI_PREFLIGHT_ONLY",),
        False,
        to_switch,
        "stop after the verdict",
        switch=True,
    ),
    Option(
        "allow_no_gpu",
        ("--allow-no-gpu",),
        ("DYN_MPI_ALLOW_NO_GPU",),
        False,
        to_switch,
        "don't look at the GPUs: check a TensorRT-LLM worker where there are none",
        switch=True,
    ),
    Option(
        "no_peer_check",
        ("--no-peer-check",),
        ("DYN_MPI_NO_PEER_CHECK",),
        False,
        to_switch,
        "start a prefill or decode worker although the other role's workers do not fit, or can't be asked",
        switch=True,
    ),
    Option(
        "ready_file",
        ("--ready-file",),
        ("DYN_MPI_READY_FILE",),
        None,
        to_path,
        "write this file, as JSON, once it is serving",
    ),
    Option(
        "probe_timeout",
        ("--probe-timeout",),
        ("DYN_MPI_PROBE_TIMEOUT",),
        3.0,
        to_seconds,
        "seconds that etcd and NATS have to answer",
    ),
    Option(
        "probe",
        ("--probe",),
        ("DYN_MPI_PROBE",),
        "auto",
        to_probes,
        "what of the hardware is asked before anything is loaded: gpu, fabric, kv, separated by commas, or none; auto is all of them where "
        "the engine runs on GPUs, none otherwise",
    ),
    Option(
        "probe_strict",
        ("--probe-strict",),
        ("DYN_MPI_PROBE_STRICT",),
        False,
        to_switch,
        "what the probes find ends the worker (75), instead of being told",
        switch=True,
    ),
    Option(
        "probe_seconds",
        ("--probe-seconds",),
        ("DYN_MPI_PROBE_SECONDS",),
        30.0,
        to_seconds,
        "seconds for ranks to reach each other and be measured; who hangs after them ends the worker (124). Half of them more for memory "
        "of an earlier step to be given back, and for NCCL to be started",
    ),
    Option(
        "probe_kv_seconds",
        ("--probe-kv-seconds",),
        ("DYN_MPI_PROBE_KV_SECONDS",),
        300.0,
        to_seconds,
        "seconds for which a partner that starts later can ask a worker's ranks for the KV probe",
    ),
    Option(
        "load_timeout",
        ("--load-timeout",),
        ("DYN_MPI_LOAD_TIMEOUT",),
        3600.0,
        to_seconds,
        "seconds until the engine has loaded (trtllm: is registered)",
    ),
    Option(
        "prove_timeout",
        ("--prove-timeout",),
        ("DYN_MPI_PROVE_TIMEOUT",),
        300.0,
        to_seconds,
        "seconds for the first completion",
    ),
    Option(
        "drain_timeout",
        ("--drain-timeout",),
        ("DYN_MPI_DRAIN_TIMEOUT",),
        30.0,
        to_seconds,
        "seconds that requests in flight have to end after SIGTERM",
    ),
    Option(
        "liveness_network",
        ("--liveness-network",),
        ("DYN_MPI_LIVENESS_NETWORK",),
        None,
        to_text,
        "interface (ib0), network (10.1.0.0/16, fd00::/64) or address at which rank 0 hears of the other ranks' life; the address of the "
        "host's own name by default",
    ),
    Option(
        "heartbeat_timeout",
        ("--heartbeat-timeout",),
        ("DYN_MPI_HEARTBEAT_TIMEOUT",),
        None,
        to_seconds,
        "seconds without a sign of life after which a rank is taken for stopped or stuck, 0 for never; by default 300 until it has loaded, "
        "since an import may hold Python's lock for minutes, and 60 from then on",
    ),
    Option(
        "world_timeout",
        ("--world-timeout",),
        ("DYN_MPI_WORLD_TIMEOUT",),
        600.0,
        to_seconds,
        "seconds from a node's first rank to the verdict; after them each node says which of its ranks are missing and where the others are",
    ),
    Option(
        "failure_dir",
        ("--failure-dir",),
        ("DYN_MPI_FAILURE_DIR",),
        None,
        to_path,
        "folder for a JSON file from each rank that fails, COMPONENT-rank-N.json; rank 0's holds the whole report",
    ),
    *OBSERVE_OPTIONS,
    Option(
        "kv_transport",
        ("--kv-transport",),
        ("DYN_MPI_KV_TRANSPORT",),
        "tcp",
        str,
        "how KV leaves a reference prefill worker: over our TCP connections, or by NIXL, which is then needed on decode workers too; "
        "these go by the prefill worker's choice",
        ("tcp", "nixl"),
    ),
    Option(
        "kv_network",
        ("--kv-network",),
        ("DYN_MPI_KV_NETWORK",),
        None,
        to_text,
        "interface (ib0), network (10.1.0.0/16, fd00::/64) or address at which the ranks of a reference prefill worker serve KV; the "
        "address of the host's own name by default",
    ),
    Option(
        "kv_keep_seconds",
        ("--kv-keep-seconds",),
        ("DYN_MPI_KV_KEEP_SECONDS",),
        60.0,
        to_seconds,
        "seconds that a reference prefill worker keeps the KV of a request that nobody fetches",
    ),
    Option(
        "kv_pull_timeout",
        ("--kv-pull-timeout",),
        ("DYN_MPI_KV_PULL_TIMEOUT",),
        10.0,
        to_seconds,
        "seconds that a reference decode worker has to fetch the KV of one request",
    ),
)


@dataclass(frozen=True)
class Settings:
    """All settings of one worker; see `OPTIONS` for what each means.

    ``dynamic_flags`` are ``--trtllm.KEY VALUE`` words, ``passed_on`` those that only ``dynamo.trtllm`` knows.
    """

    role: str
    engine: str
    model: Path
    served_model_name: str
    engine_config: Path | None
    override_engine_args: str | None
    tensor_parallel_size: int | None
    pipeline_parallel_size: int | None
    expert_parallel_size: int | None
    enable_attention_dp: bool | None
    max_batch_size: int | None
    max_num_tokens: int | None
    max_seq_len: int | None
    max_beam_width: int | None
    free_gpu_memory_fraction: float | None
    trtllm_version: str | None
    gpus_per_node: int | None
    gpu: str | None
    min_requests: int
    namespace: str
    component: str
    endpoint: str
    request_plane: str
    discovery_backend: str
    preflight_only: bool
    allow_no_gpu: bool
    no_peer_check: bool
    ready_file: Path | None
    probe_timeout: float
    probe: str
    probe_strict: bool
    probe_seconds: float
    probe_kv_seconds: float
    load_timeout: float
    prove_timeout: float
    drain_timeout: float
    liveness_network: str | None
    heartbeat_timeout: float | None
    world_timeout: float
    failure_dir: Path | None
    log_dir: Path | None
    progress: str
    progress_interval: float
    metrics_file: Path | None
    runtime_system_port: int | None
    timeline: Path | None
    kv_transport: str
    kv_network: str | None
    kv_keep_seconds: float
    kv_pull_timeout: float
    dynamic_flags: tuple[str, ...] = ()
    passed_on: tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def engine_flags(self) -> dict[str, Any]:
        """Engine keys that flags or variables give, by dotted path; the engine config is laid over them."""
        return engine_flags(vars(self))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}", fix="python -m dynamo_mpi.worker --help")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the worker's command line."""
    parser = _Parser(
        prog="python -m dynamo_mpi.worker",
        description="One rank of a Dynamo worker. Start it once per rank: srun --mpi=pmix, or mpirun.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dynamo_mpi {__version__}")
    parser.add_argument("--settings", metavar="YAML", help="file with settings, by their long names")
    add_options(parser, OPTIONS)
    return parser


def load_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Read settings from a command line, an environment and the settings file that either names.

    Raises:
        UsageError: an unknown flag, an impossible value, no model, or a role that the engine doesn't have.
        DataError: the settings file can't be used.
    """
    words, dynamic = split_dynamic_flags(argv)
    parsed, passed_on = build_parser().parse_known_args(words)
    given = vars(parsed)
    file = _settings_file(given.pop("settings", None) or environ.get("DYN_MPI_SETTINGS"))
    role = resolve([ROLE], given, environ, file)[0]["role"]
    values, origins = resolve([_for_role(option, role) for option in OPTIONS], given, environ, file)
    if values["engine"] == "auto":
        # found, not imported: importing it is a collective (K1)
        values["engine"] = "trtllm" if role != "agg" or find_spec("tensorrt_llm") is not None else "reference"
    if passed_on and values["engine"] != "trtllm":
        raise UsageError(
            f"Unrecognized arguments: {' '.join(passed_on)}",
            fix="python -m dynamo_mpi.worker --help; flags of dynamo.trtllm alone need --engine trtllm",
        )
    if passed_on and not passed_on[0].startswith("--"):
        raise UsageError(
            f"{passed_on[0]!r} belongs to no flag",
            needed="flags, each with its value",
            fix="look at the quotes around values",
        )
    if values["model"] is None:
        raise UsageError("no model was given", needed="a model folder", fix="--model DIR, or MODEL_PATH=DIR")
    if role == "encode" and values["engine"] == "reference":
        raise UsageError(
            f"{origins['role']} is {role!r}: the reference engine doesn't encode images",
            needed="--role agg, prefill or decode, or --engine trtllm",
        )
    if values["served_model_name"] is None:
        values["served_model_name"] = values["model"].resolve().name
    if values["component"] is None:
        values["component"] = role if role in ("prefill", "encode") else "backend"
    if values["endpoint"] is None:
        values["endpoint"] = f"dyn://{values['namespace']}.{values['component']}.generate"
    return Settings(**values, dynamic_flags=tuple(dynamic), passed_on=tuple(passed_on), origins=origins)


def _for_role(option: Option, role: str) -> Option:
    """Let the engine config of a prefill or decode worker come from the variable of its role as well, as the weakest of them."""
    if option.name != "engine_config" or role == "agg":
        return option
    return replace(option, variables=(*option.variables, f"{role.upper()}_ENGINE_CONFIG"))


def _settings_file(path: str | None) -> dict[str, Any]:
    if not path:
        return {}
    try:
        loaded = parse_yaml(
            read_text(Path(path)), f"the settings file {path}", "`name: value` lines", may_be_empty=True
        )
    except OSError as error:
        raise DataError(
            f"the settings file {path} can't be read: {error.strerror}", fix="check its path and rights"
        ) from None
    known = {option.name for option in OPTIONS}
    named = {str(key).replace("-", "_"): value for key, value in loaded.items()}
    if unknown := sorted(set(named) - known):
        raise DataError(
            f"the settings file {path} has unknown settings: {', '.join(unknown)}", needed=", ".join(sorted(known))
        )
    return named
