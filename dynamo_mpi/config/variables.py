# SPDX-License-Identifier: Apache-2.0
"""Finds variables of this project that nothing reads, as their names are misspelt."""

from __future__ import annotations

from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

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


def unknown_variables(environ: Mapping[str, str], more: Collection[str] = ()) -> dict[str, str]:
    """Return a warning for each variable that begins like ours and is none of them, by its name.

    Args:
        environ: the environment of this process.
        more: names of variables without our prefix. Other programs' names begin like them, too, so only what resembles one is named.
    """
    warnings = {}
    for name in sorted(environ):
        if _is_unknown(name):
            near = _nearest(name, _PREFIX, [_PREFIX + known for known in KNOWN], 0.5)
        elif name in more or not (near := _resembling(name, more)):
            continue
        fix = f"is {near} meant?" if near else "docs/reference/settings.md has the names"
        warnings[name] = f"unknown variable {sanitize(name, _MOST_SHOWN)}, which is ignored: {fix}"
    return warnings


def _resembling(name: str, known: Collection[str]) -> str:
    """Return the known variable that begins with the same word, and is spelt nearly like a name or has all its words."""
    words = name.split("_")
    alike = sorted(each for each in known if len(words) > 1 and each.startswith(f"{words[0]}_"))
    near = _nearest(name, f"{words[0]}_", alike, 0.7)
    return near or next((each for each in alike if {*words} <= {*each.split("_")}), "")


def _nearest(name: str, prefix: str, known: Collection[str], cutoff: float) -> str:
    """Return the name that is spelt most like another one behind their prefix; empty if none is near."""
    from difflib import get_close_matches

    rests = sorted(each.removeprefix(prefix) for each in known)
    near = get_close_matches(name.removeprefix(prefix)[:_MOST_SHOWN], rests, n=1, cutoff=cutoff)
    return prefix + near[0] if near else ""


def known_only(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without those variables, for programs that would warn of them once more."""
    return {name: value for name, value in environ.items() if not _is_unknown(name)}


def _is_unknown(name: str) -> bool:
    return name.startswith(_PREFIX) and name.removeprefix(_PREFIX) not in KNOWN
