#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# One worker by hand, as a Slurm job step: what scripts/start_worker.sh does, without its choices. By default the reference engine, tp 3 x pp 2 on
# two nodes of three ranks each. etcd and a frontend must run (scripts/start_frontend_services.sh); without them add --preflight-only.
#
#   salloc --nodes=2 --exclusive
#   export MODEL_PATH=/shared/smollm2 ETCD_ENDPOINTS=http://HEAD:2379
#   examples/worker_under_srun.sh --dry-run                 prints the command
#   examples/worker_under_srun.sh [FLAGS OF THE WORKER]     e.g. --preflight-only
#
# Environment: NODES (2), RANKS_PER_NODE (3), ENGINE (reference), ENGINE_CONFIG (engine_configs/smollm2/tp3_pp2.yaml), PYTHON (python3).

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

launcher=(
    srun
    # without a plugin each rank would be a world of its own: refused before MPI starts
    --mpi=pmix
    --nodes="${NODES:-2}"
    --ntasks-per-node="${RANKS_PER_NODE:-3}"
    # rank order is node order; anything else is refused (A11)
    --distribution=block
    # before MPI runs, srun alone can end the other ranks
    --kill-on-bad-exit=1
    --label
    --unbuffered
)
worker=(
    "${PYTHON:-python3}" -m dynamo_mpi.worker
    --engine "${ENGINE:-reference}"
    --model "${MODEL_PATH:?set MODEL_PATH to a model folder that all nodes see}"
    --engine-config "${ENGINE_CONFIG:-$root/engine_configs/smollm2/tp3_pp2.yaml}"
)

if [[ ${1:-} == --dry-run ]]; then
    shift
    printf '%q ' "${launcher[@]}" "${worker[@]}" "$@"
    echo
    exit 0
fi

# The exit code is srun's: the same for all ranks (docs/reference/exit-codes.md). SIGTERM to the step drains the worker: scancel --signal=TERM JOB.STEP.
exec "${launcher[@]}" "${worker[@]}" "$@"
