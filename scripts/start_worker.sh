#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# One rank of a worker, as the entrypoint of a container (or of a bare-metal step). Takes the variables of Dynamo's former script.

set -euo pipefail

usage() {
    cat <<'END'
usage: start_worker.sh [FLAGS OF python -m dynamo_mpi.worker, and of dynamo.trtllm]

Environment:
  MODEL_PATH              model folder, or a hub id that is in the cache
  SERVED_MODEL_NAME       name that clients ask for (default: the folder's)
  ENGINE_CONFIG           TensorRT-LLM's YAML; PREFILL_ENGINE_CONFIG and DECODE_ENGINE_CONFIG by role
  DISAGGREGATION_MODE     prefill, decode, or prefill_and_decode (default)
  MODALITY                for dynamo.trtllm: text, multimodal (text)
  DYN_MM_ALLOW_INTERNAL   1: dynamo.trtllm may fetch images from http:// and from private addresses
  ETCD_ENDPOINTS, NATS_SERVER, HEAD_NODE_IP   where the services are
  PYTHON                  interpreter (default: python3)

  srun --mpi=pmix --ntasks-per-node=8 … start_worker.sh --role prefill
END
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
fi

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# before what the image has there, not instead of it
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
[[ -z ${DISAGGREGATION_MODE:-} ]] || export DYN_MPI_ROLE=${DYN_MPI_ROLE:-$DISAGGREGATION_MODE}

exec "${PYTHON:-python3}" -m dynamo_mpi.worker "$@"
