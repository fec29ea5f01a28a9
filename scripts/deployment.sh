# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# To be sourced by srun_disaggregated.sh and srun_aggregated.sh: what both do before they exec launch. Sets $root, and $configs in `prepare`.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# The rest of their --help.
common_usage() {
    cat <<'END'
  IMAGE                   container image for Pyxis; without one everything runs on bare metal
  MOUNTS                  HOST:CONTAINER[,…] (this checkout:/mnt)
  MODEL_PATH              model folder or hub id, as the ranks see it (meta-llama/Llama-4-Maverick-17B-128E-Instruct, with the engine
                          configs above)
  SERVED_MODEL_NAME       name that clients ask for (MODEL_PATH's last part, or the hub id)
  NUM_GPUS_PER_NODE       (4)
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

# Exports the defaults: `prepare ARGUMENTS OF THE SCRIPT`.
prepare() {
    export IMAGE=${IMAGE:-}
    configs=$root/engine_configs
    if [[ -n $IMAGE ]]; then
        # Adapt it to your cluster: paths in MODEL_PATH and in the engine configs are the container's.
        export MOUNTS=${MOUNTS:-$root:/mnt}
        # shellcheck disable=SC2034 # for the script that sources this
        configs=/mnt/engine_configs
    fi
    export NUM_GPUS_PER_NODE=${NUM_GPUS_PER_NODE:-4}
    # Llama-4-Maverick, unless an engine config of another model or a model is given; for a Llama-4's images MODALITY=multimodal
    if [[ " $* " != *" --model"* ]]; then
        if [[ -z ${ENGINE_CONFIG:-}${PREFILL_ENGINE_CONFIG:-}${DECODE_ENGINE_CONFIG:-} && " $* " != *"engine-config"* ]]; then
            export MODEL_PATH=${MODEL_PATH-meta-llama/Llama-4-Maverick-17B-128E-Instruct}
        fi
        if [[ ${MODEL_PATH:-} =~ [Ll]lama-4 ]]; then
            export MODALITY=${MODALITY:-multimodal}
        fi
    fi
}
