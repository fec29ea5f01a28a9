#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# etcd, NATS and the Dynamo frontend of one job, on its head node: the entry point of that step, inside Dynamo's container or without one.

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'EOT'
usage: scripts/start_frontend_services.sh --run-dir DIR [FLAGS] [-- FLAGS OF dynamo.frontend]

  srun --overlap -N1 -n1 -w "$HEAD_NODE" --container-image="$IMAGE" --container-mounts="$MOUNTS" \
      scripts/start_frontend_services.sh --run-dir DIR
  scripts/start_frontend_services.sh --run-dir DIR -- --router-mode kv
  scripts/start_frontend_services.sh --help      this, and all flags

Runs until SIGTERM or Ctrl-C. DIR/services.json has their addresses for workers, once all answer.

Environment:
  PYTHON    interpreter that has Dynamo (default: python3, or the checkout's .venv where only that has it)
EOT
}

has_dynamo() {
    "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("dynamo.frontend") is None)' 2>/dev/null
}

python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} ]] && ! has_dynamo python3 && has_dynamo "$root/.venv/bin/python"; then
    python=$root/.venv/bin/python
fi
if ! command -v "$python" >/dev/null; then
    printf '%s\n' "no $python on PATH" "  expected: a Python that has Dynamo" \
        "  fix:      name an interpreter: PYTHON=/path/to/python3 $0" >&2
    exit 64
fi

# The container need not have this package installed: the checkout is mounted.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    printf '\n'
fi
exec "$python" -m dynamo_mpi.head_node "$@"
