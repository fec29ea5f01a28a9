#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# `dynamo-mpi` from a checkout, without installing it: dynamo-mpi.sh check --help. PYTHON names the interpreter.

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    printf '%s\n' "$python isn't there, or isn't Python 3.10 or newer" "  expected: Python 3.10 or newer" \
        "  fix:      name another interpreter: PYTHON=/path/to/python3" >&2
    exit 64
fi
exec "$python" -m dynamo_mpi "$@"
