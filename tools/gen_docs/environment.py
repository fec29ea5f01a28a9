# SPDX-License-Identifier: Apache-2.0
"""Environment variables that are no options: what we read, set or hand on, for ``docs/reference/settings.md``."""

from __future__ import annotations

from typing import NamedTuple


class Variable(NamedTuple):
    """Some variables that belong together.

    Args:
        names: as they are spelt; ``*`` stands for the rest of a name.
        who: sets and reads them.
        meaning: in Markdown.
    """

    names: tuple[str, ...]
    who: str
    meaning: str


VARIABLES = (
    Variable(
        ("DYN_MPI_KV_CHECK_TRANSPORT", "DYN_MPI_KV_CHECK_SECONDS", "DYN_MPI_KV_MIN_RATE"),
        "user → KV check",
        "the transport (`auto`, `nixl`, `tcp`), the time limit, the rate in GB/s that each pair must reach; see [probes](../guides/probe.md)",
    ),
    Variable(("DYN_MPI_SETTINGS",), "user → worker", "the settings file, where `--settings` doesn't name it"),
    Variable(
        ("DYN_MPI_FAULT", "DYN_MPI_ALLOW_FAULTS"),
        "user → worker",
        "a fault on purpose in one rank, `rank3:load:kill`; refused unless the other is 1; see [faults.md](../concepts/faults.md)",
    ),
    Variable(
        ("DYN_MPI_LAUNCH",),
        "launch → worker",
        "the name by which `launch` knows a worker; it stands in the worker record as `launch`",
    ),
    Variable(
        ("DYN_MPI_ATTEMPT",),
        "launch → worker",
        "which start of the worker this is, from 1 on; worker record, ready file and failure files have it as `attempt`. Starts of a "
        "requeued job (`SLURM_RESTART_COUNT`) are added",
    ),
    Variable(
        ("DYN_MPI_RANK_MARK",),
        "rank → what it starts",
        "by it the node agent knows which processes a rank has started; they end with the rank",
    ),
    Variable(("DYN_MPI_PODS_SOCKET",), "pods lead → its launch agent", "the leader's own unix socket"),
    Variable(
        ("DYN_MPI_CHECKOUT",),
        "`sbatch_disaggregated.sh`",
        "the checkout, since Slurm runs a copy of the script; by default where it was submitted from",
    ),
    Variable(
        ("DYN_MPI_NO_KILL",),
        "`sbatch_disaggregated.sh`",
        "set by the script that submits itself with spare nodes: the job has `--no-kill`",
    ),
    Variable(
        ("DYN_MPI_MAX_REQUEUES",),
        "user → `sbatch_disaggregated.sh`",
        "how often the job goes back into the queue after 75: 10 by default",
    ),
    Variable(
        ("DYN_MPI_JOB_ID", "DYN_MPI_STEP_ID", "DYN_MPI_JOB_NAME", "DYN_MPI_CLUSTER_NAME"),
        "worker → `dynamo.trtllm`",
        "`SLURM_JOB_ID`, `SLURM_STEP_ID`, `SLURM_JOB_NAME`, `SLURM_CLUSTER_NAME`, which are taken out of the child's environment",
    ),
    Variable(
        ("DYN_MPI_REQUIRE_SLURM", "DYN_MPI_MPICH_PREFIX"),
        "tests",
        "no skipping of the tests on Slurm; a folder for PyPI's mpich",
    ),
    Variable(
        ("DYN_MPI_SERVICES_FILE",),
        "user, launch, local → worker, frontend, commands",
        "`services.json` of a run folder, or JSON like it: the variables below, addresses and credentials, which it replaces. "
        "Rank 0, the node agents and the frontend read it; no process has a secret in its environment then",
    ),
    Variable(
        ("ETCD_ENDPOINTS",),
        "user → worker",
        "etcd, `http://HOST:2379`, several with commas: those that answer are tried first; without it `HEAD_NODE_IP` or `HEAD_NODE` "
        "(port 2379), else this host",
    ),
    Variable(
        ("HEAD_NODE_IP", "HEAD_NODE"),
        "user → worker, head node",
        "the head node, for who has no `ETCD_ENDPOINTS`; where the services listen",
    ),
    Variable(
        ("ETCD_AUTH_CA", "ETCD_AUTH_CLIENT_CERT", "ETCD_AUTH_CLIENT_KEY"),
        "user → worker",
        "PEM texts, not files, shown to an `https://` endpoint",
    ),
    Variable(
        ("ETCD_AUTH_USERNAME", "ETCD_AUTH_PASSWORD"),
        "user → worker",
        "a user of etcd, who needs `readwrite` on the prefixes `v1/` and `dynamo_mpi/`",
    ),
    Variable(
        ("ETCD_LEASE_TTL",),
        "user → Dynamo's runtime, worker",
        "seconds that a worker's keys outlive it, or etcd's absence: 30 by default",
    ),
    Variable(
        ("NATS_SERVER",),
        "user → worker",
        "`nats://HOST:4222`; must answer where it is set, or with `--request-plane nats`",
    ),
    Variable(
        ("NATS_AUTH_USERNAME", "NATS_AUTH_PASSWORD", "NATS_AUTH_*", "NATS_TLS_*"),
        "user → Dynamo's runtime, worker",
        "credentials for NATS, as Dynamo has them",
    ),
    Variable(
        ("DYN_SYSTEM_PORT",),
        "user → worker",
        "port of `/health`, `/live` and `/metrics` on each node, at most 65535; 0 for any, unset or negative for none. Dynamo's "
        "runtime, which reads it as a signed 16-bit number, gets another: `--runtime-system-port`",
    ),
    Variable(
        ("DYN_SYSTEM_HOST", "DYN_SYSTEM_HEALTH_PATH", "DYN_SYSTEM_LIVE_PATH"),
        "user → worker, Dynamo's runtime",
        "where it listens, 0.0.0.0 by default, and other paths than `/health` and `/live`",
    ),
    Variable(
        ("NOTIFY_SOCKET",),
        "supervisor → worker",
        "rank 0 says there, as systemd has it, which phase it is in, when it serves, and why it ends; `NotifyAccess=all`, since a launcher "
        "is the unit's main process. What a rank starts doesn't get it",
    ),
    Variable(
        ("TRACEPARENT", "TRACESTATE"),
        "user → worker, launch, Dynamo's runtime",
        "the W3C trace that a worker is part of; one that can't be read is logged, and left out",
    ),
    Variable(
        ("DYN_LOG",),
        "user → worker, Dynamo's runtime",
        "levels, `LEVEL` and `TARGET=LEVEL` with commas. Of us a level alone can only make more be said; `dynamo_mpi=warn` makes it less, "
        "and errors are said in any case",
    ),
    Variable(("DYN_LOGGING_JSONL",), "user → worker, Dynamo's runtime", "1: a JSON object on each line"),
    Variable(("DYN_TCP_RPC_PORT",), "user → Dynamo's runtime", "port of the tcp request plane"),
    Variable(
        ("DYN_TCP_RPC_HOST",),
        "user, worker → Dynamo's runtime, `dynamo.trtllm`",
        "address at which frontends reach rank 0 on the tcp request plane. Rank 0 sets it, where it isn't set, for a worker of several hosts "
        "and on a host without a default route: the address by which it reaches etcd, or else the one at which the other ranks reach it",
    ),
    Variable(
        ("DYN_TCP_RESPONSE_STREAM_HOST",),
        "user, worker → Dynamo's runtime",
        "name of the interface at which a client of the tcp request plane takes answers; rank 0 sets `lo`, where it isn't set, on a host "
        "without any other",
    ),
    Variable(
        ("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS",),
        "worker → `dynamo.trtllm`",
        "seconds that it goes on answering after SIGTERM, all of them; set by `--drain-timeout` where that is given",
    ),
    Variable(
        ("DYN_MM_ALLOW_INTERNAL",),
        "user → `dynamo.trtllm`",
        "1: images may come from `http://` and from private addresses",
    ),
    Variable(
        ("MODALITY",),
        "user → worker, `dynamo.trtllm`",
        "`text` or `multimodal`; a TensorRT-LLM worker refuses modalities that generate images or videos",
    ),
    Variable(
        ("DYN_CUSTOM_JINJA_TEMPLATE",),
        "user → worker, `dynamo.trtllm`",
        "a chat template that replaces the model folder's, also where model cards are compared",
    ),
    Variable(
        ("TRTLLM_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE", "TRTLLM_FLASHINFER_WORKSPACE_PER_PROCESS"),
        "user → ranks",
        "a folder for the caches of TensorRT-LLM and the ranks' FlashInfer workspaces; one workspace for all ranks; 0: FlashInfer's own",
    ),
    Variable(
        (
            "TRITON_CACHE_DIR",
            "TORCHINDUCTOR_CACHE_DIR",
            "TORCH_EXTENSIONS_DIR",
            "DG_JIT_CACHE_DIR",
            "TRTLLM_DG_CACHE_DIR",
            "TRTLLM_DG_JIT_DUMP_CUBIN",
            "CUTE_DSL_CACHE_DIR",
            "TLLM_AUTOTUNER_CACHE_PATH",
            "CUDA_CACHE_PATH",
        ),
        "user, ranks → the libraries",
        "where each keeps what it has compiled; with `--cache` the ranks set them, and the two of the row above, where the user hasn't "
        "([compile caches](../guides/caches.md))",
    ),
    Variable(
        ("TRITON_HOME", "TRITON_CACHE_MANAGER", "CUDA_CACHE_DISABLE", "TRTLLM_DEEP_GEMM_CACHE_PER_PROCESS"),
        "user → the libraries",
        "other ways to say where, or that there is no cache: with `--cache` that library is left alone",
    ),
    Variable(
        ("FLASHINFER_CUBIN_DIR", "TRTLLM_FLASHINFER_WORKSPACE_MANAGED"),
        "ranks → FlashInfer, TensorRT-LLM",
        "set with a rank's workspace, as TensorRT-LLM's launcher does; the first only where the user hasn't",
    ),
    Variable(
        ("DISAGGREGATION_MODE",),
        "user → `start_worker.sh`",
        "the role, as Dynamo's former script had it; `DYN_MPI_ROLE` is stronger",
    ),
    Variable(("DYN_*",), "user → Dynamo's runtime", "every other `DYN_*` variable goes to Dynamo as it is"),
    Variable(
        ("SLURM_JOB_END_TIME",),
        "Slurm, launch → worker",
        "unix seconds at which the job's time ends: the worker drains before; set to nothing it is no limit",
    ),
    Variable(
        ("SLURM_JOB_NODELIST",),
        "Slurm, user → launch",
        "the nodes that a deployment may use; set it to give two deployments in a job nodes of their own",
    ),
    Variable(
        ("SLURM_*", "PMIX_*", "PMI_*", "OMPI_*", "PRTE_*", "MPI_*"),
        "launcher → worker",
        "a rank reads from them what launched it, and its place; `dynamo.trtllm` doesn't get them",
    ),
    Variable(
        ("LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX"),
        "LeaderWorkerSet → pods",
        "the group, as Kubernetes' LeaderWorkerSet says it",
    ),
    Variable(
        ("UCX_*", "NCCL_*", "TLLM_*", "TRTLLM_*", "HF_*"),
        "user → engine",
        "handed on to all steps, and to `dynamo.trtllm`",
    ),
    Variable(
        ("PYTHON",), "user → scripts", "the interpreter with which a script runs; `DYN_MPI_PYTHON` is that of the steps"
    ),
    Variable(("PARTITION", "ACCOUNT"), "user → `sbatch_disaggregated.sh`", "of the job"),
    Variable(
        ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE"),
        "user → `dynamo-mpi`",
        "no colours; colours also where stdout is no terminal",
    ),
)
