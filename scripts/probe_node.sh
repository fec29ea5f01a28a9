#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Whether a node can run a worker (again), as one process on the node: probe_node.sh --help. PYTHON names the interpreter.

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# before what the image has there, not instead of it
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

exec "${PYTHON:-python3}" -m dynamo_mpi.checks.node_probe "$@"
