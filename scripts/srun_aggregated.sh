#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# An aggregated deployment inside a Slurm allocation: etcd, NATS and the frontend on the head node, one worker over several nodes.
# Run it in the shell of `salloc`, or in a batch script. It stays until Ctrl-C, and ends what it started.

set -euo pipefail

usage() {
    cat <<'END'
usage: srun_aggregated.sh [--dry-run] [FLAGS OF dynamo-mpi launch] [-- FLAGS OF EVERY WORKER]

  salloc --nodes=2 --exclusive --gpus-per-node=4
  export IMAGE=/images/dynamo.sqsh MOUNTS=$PWD:/mnt,/models:/models MODEL_PATH=/models/Llama-4-Maverick-17B-128E-Instruct
  scripts/srun_aggregated.sh --dry-run                      the exact srun lines, and nothing is run
  scripts/srun_aggregated.sh

  scripts/srun_aggregated.sh --dry-run --nodes 'n[1-2]'    the same on a machine without Slurm

Environment (defaults in parentheses):
  IMAGE                   container image for Pyxis; without one everything runs on bare metal
  MOUNTS                  HOST:CONTAINER[,…] (this checkout:/mnt)
  MODEL_PATH              model folder or hub id, as the ranks see it (meta-llama/Llama-4-Maverick-17B-128E-Instruct, with the engine
                          config below)
  SERVED_MODEL_NAME       name that clients ask for (MODEL_PATH's last part, or the hub id)
  NUM_GPUS_PER_NODE       (4)
  NUM_NODES               of one worker (2)
  NUM_WORKERS             (1)
  ENGINE_CONFIG           (engine_configs/multimodal/llama4/agg.yaml)
  MODALITY                for dynamo.trtllm: text, multimodal (multimodal for a Llama-4 in MODEL_PATH, else text)
  STAGE_DIR               folder on a disk of each node: the model is copied there first, read once for all nodes of a worker (none)
  CACHE_DIR               folder on the shared file system: compile caches are seeded from there, and written back (none)
  DYN_MM_ALLOW_INTERNAL   1: dynamo.trtllm may fetch images from http:// and from private addresses
  SRUN_ARGS               further words for srun of each worker
  DYN_MPI_RUN_DIR         logs, and the services' keys (./dynamo_mpi-JOB)
  NUM_SPARE_NODES         nodes that take the place of a lost or unhealthy one; then salloc needs --no-kill (0)
  DYN_MPI_MAX_RESTARTS    of a worker that failed, while the others live (0; with spare nodes 3)
  PYTHON                  interpreter here, 3.10 or newer (python3)
  DYN_MPI_PYTHON          interpreter of the steps (the image's python3; without an image, the one here)

dynamo-mpi launch --help has the rest.
END
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
fi

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

export IMAGE=${IMAGE:-}
if [[ -n $IMAGE ]]; then
    # Adapt it to your cluster: paths in MODEL_PATH and in the engine config are the container's.
    export MOUNTS=${MOUNTS:-$root:/mnt}
    configs=/mnt/engine_configs
else
    configs=$root/engine_configs
fi

# the example's model, unless the engine configs are another model's
# shellcheck source=scripts/example_model.sh
source "$root/scripts/example_model.sh"

export NUM_GPUS_PER_NODE=${NUM_GPUS_PER_NODE:-4}
export NUM_NODES=${NUM_NODES:-2}
export NUM_WORKERS=${NUM_WORKERS:-1}
export ENGINE_CONFIG=${ENGINE_CONFIG:-$configs/multimodal/llama4/agg.yaml}

# One srun for each of: dynamo-mpi check, start_frontend_services.sh, and start_worker.sh of each worker.
exec "$root/scripts/dynamo-mpi.sh" launch --role agg "$@"
