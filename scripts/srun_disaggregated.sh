#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# A disaggregated deployment inside a Slurm allocation: etcd, NATS and the frontend on the head node, prefill and decode workers over
# nodes of their own. Run it in the shell of `salloc`, or in a batch script. It stays until Ctrl-C, and ends what it started.

set -euo pipefail

# shellcheck source=scripts/deployment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/deployment.sh"

usage() {
    cat <<'END'
usage: srun_disaggregated.sh [--dry-run] [FLAGS OF dynamo-mpi launch] [-- FLAGS OF EVERY WORKER]

  salloc --nodes=4 --exclusive --gpus-per-node=4
  export IMAGE=/images/dynamo.sqsh MOUNTS=$PWD:/mnt,/models:/models MODEL_PATH=/models/Llama-4-Maverick-17B-128E-Instruct
  scripts/srun_disaggregated.sh --dry-run                      the exact srun lines, and nothing is run
  scripts/srun_disaggregated.sh

  scripts/srun_disaggregated.sh --dry-run --nodes 'n[1-4]'    the same on a machine without Slurm

Environment (defaults in parentheses):
  NUM_PREFILL_NODES       of one prefill worker (2)
  NUM_PREFILL_WORKERS     (1)
  PREFILL_ENGINE_CONFIG   (engine_configs/multimodal/llama4/prefill.yaml)
  NUM_DECODE_NODES        of one decode worker (2)
  NUM_DECODE_WORKERS      (1)
  DECODE_ENGINE_CONFIG    (engine_configs/multimodal/llama4/decode.yaml)
END
    common_usage
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
fi

prepare "$@"
export NUM_PREFILL_NODES=${NUM_PREFILL_NODES:-2}
export NUM_PREFILL_WORKERS=${NUM_PREFILL_WORKERS:-1}
export PREFILL_ENGINE_CONFIG=${PREFILL_ENGINE_CONFIG:-$configs/multimodal/llama4/prefill.yaml}

export NUM_DECODE_NODES=${NUM_DECODE_NODES:-2}
export NUM_DECODE_WORKERS=${NUM_DECODE_WORKERS:-1}
export DECODE_ENGINE_CONFIG=${DECODE_ENGINE_CONFIG:-$configs/multimodal/llama4/decode.yaml}

# One srun for each of: dynamo-mpi check, start_frontend_services.sh, and start_worker.sh of each worker.
exec "$root/scripts/dynamo-mpi.sh" launch --role disagg "$@"
