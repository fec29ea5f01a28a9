#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# `dynamo-mpi` from a checkout, without installing it: dynamo-mpi.sh check --help. PYTHON names the interpreter.

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m dynamo_mpi "$@"
