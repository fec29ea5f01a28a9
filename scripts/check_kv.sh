#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# One rank of the KV check, on each node of prefill and decode workers: check_kv.sh --help. PYTHON names the interpreter.

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# before what the image has there, not instead of it
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

exec "${PYTHON:-python3}" -m dynamo_mpi.checks.kv "$@"
