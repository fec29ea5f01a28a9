# SPDX-License-Identifier: Apache-2.0
"""Finds variables of this project that nothing reads, as their names are misspelt."""

from __future__ import annotations

from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_PREFIX = "DYN_MPI_"
_MOST_SHOWN = 60
# of all programs, verbs and tests, and what they set for what they start: a test compares it with their options. Rank 0 can't import those
_NAMES = """
ADDRESS ALLOW_FAULTS ALLOW_NO_GPU ALLOW_UNLIKE_CARD ATTEMPT CACHE CHECKOUT CLUSTER_NAME CPU_BIND CREDENTIALS DRAIN_TIMEOUT ENGINE ETCD
ETCD_PORT FAILURE_DIR FAULT FRONTEND GPU HEARTBEAT_TIMEOUT HTTP_HOST HTTP_PORT JOB_ID JOB_NAME KV_CHECK KV_CHECK_SECONDS KV_CHECK_TRANSPORT
KV_KEEP_SECONDS KV_MIN_RATE KV_NETWORK KV_PULL_TIMEOUT KV_TRANSPORT LAUNCH LAUNCHER LIVENESS_NETWORK LOAD_TIMEOUT LOG_DIR MAX_REQUEUES
MAX_RESTARTS METRICS_FILE MIN_REQUESTS MPICH_PREFIX MPIRUN NATS_PORT NO_FRONTEND NO_KILL NO_PEER_CHECK ONLY_STAGE PODS PODS_ADDRESS
PODS_INDEX PODS_LEADER PODS_PORT PODS_SECRET_FILE PODS_SOCKET PODS_TIMEOUT PREFLIGHT_ONLY PROBE PROBE_KV_SECONDS PROBE_SECONDS PROBE_STRICT
PROBE_TIMEOUT PROGRESS PROGRESS_INTERVAL PROVE_TIMEOUT PYTHON RANK_MARK READY_FILE REQUIRE_SLURM ROLE RUNTIME_SYSTEM_PORT RUN_DIR
SERVICES_FILE SETTINGS SKIP_CHECK SPARE_NODES SRUN_MPI STAGE STAGE_READERS STAGE_TIMEOUT STAGE_VERIFY START_TIMEOUT STEP_ID STOP_TIMEOUT
TIMELINE TRTLLM_VERSION WARMUP_TIMEOUT WORLD_TIMEOUT
"""
KNOWN = frozenset(_NAMES.split())


def unknown_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return a warning for each variable that begins like ours and is none of them, by its name.

    Args:
        environ: the environment of this process.
    """
    warnings = {}
    for name in sorted(environ):
        if _is_unknown(name):
            from difflib import get_close_matches

            near = get_close_matches(name.removeprefix(_PREFIX)[:_MOST_SHOWN], sorted(KNOWN), n=1, cutoff=0.5)
            fix = f"is {_PREFIX}{near[0]} meant?" if near else "docs/reference/settings.md has the names"
            warnings[name] = f"unknown variable {sanitize(name, _MOST_SHOWN)}, which is ignored: {fix}"
    return warnings


def known_only(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without those variables, for programs that would warn of them once more."""
    return {name: value for name, value in environ.items() if not _is_unknown(name)}


def _is_unknown(name: str) -> bool:
    return name.startswith(_PREFIX) and name.removeprefix(_PREFIX) not in KNOWN
