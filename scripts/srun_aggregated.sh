#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# An aggregated deployment inside a Slurm allocation: etcd, NATS and the frontend on the head node, one worker over several nodes.
# Run it in the shell of `salloc`, or in a batch script. It stays until Ctrl-C, and ends what it started.

set -euo pipefail

# shellcheck source=scripts/deployment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/deployment.sh"

usage() {
    cat <<'END'
usage: srun_aggregated.sh [--dry-run] [FLAGS OF dynamo-mpi launch] [-- FLAGS OF EVERY WORKER]

  salloc --nodes=2 --exclusive --gpus-per-node=4
  export IMAGE=/images/dynamo.sqsh MOUNTS=$PWD:/mnt,/models:/models MODEL_PATH=/models/Llama-4-Maverick-17B-128E-Instruct
  scripts/srun_aggregated.sh --dry-run                      the exact srun lines, and nothing is run
  scripts/srun_aggregated.sh

  scripts/srun_aggregated.sh --dry-run --nodes 'n[1-2]'    the same on a machine without Slurm

Environment (defaults in parentheses):
  NUM_NODES               of one worker (2)
  NUM_WORKERS             (1)
  ENGINE_CONFIG           (engine_configs/multimodal/llama4/agg.yaml)
END
    common_usage
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
fi

prepare "$@"
export NUM_NODES=${NUM_NODES:-2}
export NUM_WORKERS=${NUM_WORKERS:-1}
export ENGINE_CONFIG=${ENGINE_CONFIG:-$configs/multimodal/llama4/agg.yaml}

# One srun for each of: dynamo-mpi check, start_frontend_services.sh, and start_worker.sh of each worker.
exec "$root/scripts/dynamo-mpi.sh" launch --role agg "$@"
