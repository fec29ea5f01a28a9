#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# One worker by hand under mpirun, on this machine or on a list of hosts. By default the reference engine, tp 3 on three ranks.
# etcd and a frontend must run (`dynamo-mpi local --keep` starts them); without them add --preflight-only.
#
#   export MODEL_PATH=smollm2 ETCD_ENDPOINTS=http://127.0.0.1:2379
#   examples/worker_under_mpirun.sh --dry-run                 prints the command
#   examples/worker_under_mpirun.sh [FLAGS OF THE WORKER]     e.g. --preflight-only
#
# Environment: RANKS (3) on each host, HOSTS (this machine; "n1 n2" for two, with tp3_pp2.yaml), ENGINE (reference),
# ENGINE_CONFIG (engine_configs/smollm2/tp3.yaml), PYTHON (python3), MPIRUN (mpirun; that of Open MPI).

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

ranks=${RANKS:-3}
launcher=("${MPIRUN:-mpirun}" -n "$ranks")
if [[ -n ${HOSTS:-} ]]; then
    read -ra hosts <<<"$HOSTS"
    # started by ssh; variables travel by name, so that no secret is in a command line
    launcher=(
        "${MPIRUN:-mpirun}"
        --host "$(IFS=, && echo "${hosts[*]/%/:$ranks}")"
        --map-by "ppr:$ranks:node"
        -n $((${#hosts[@]} * ranks))
        -x ETCD_ENDPOINTS
    )
fi
worker=(
    "${PYTHON:-python3}" -m dynamo_mpi.worker
    --engine "${ENGINE:-reference}"
    --model "${MODEL_PATH:?set MODEL_PATH to a model folder that all hosts see}"
    --engine-config "${ENGINE_CONFIG:-$root/engine_configs/smollm2/tp3.yaml}"
)

if [[ ${1:-} == --dry-run ]]; then
    shift
    printf '%q ' "${launcher[@]}" "${worker[@]}" "$@"
    echo
    exit 0
fi

# The exit code is mpirun's: that of the ranks (docs/reference/exit-codes.md). How to drain the worker first: docs/guides/mpirun.md, "Ending".
exec "${launcher[@]}" "${worker[@]}" "$@"
