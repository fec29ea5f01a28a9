#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the tests from a fresh clone: makes .venv, installs what is missing, runs pytest once for each stage.

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"

usage() {
    cat <<'EOF'
usage: scripts/test.sh [--slurm] [--full] [OPTIONS OF pytest]
       scripts/test.sh [--slurm] PATHS AND OPTIONS OF pytest

  scripts/test.sh                  one real test of each mechanism and all pure ones, in three stages; without a real Slurm or several hosts
  scripts/test.sh --slurm          those on a real Slurm and on several hosts too: root on Debian, installs packages
  scripts/test.sh --full           every variant of each mechanism too
  scripts/test.sh --stage fast     one stage: fast, parallel or alone (docs/reference/testing.md)
  scripts/test.sh tests/unit -x    one run of pytest with these arguments

Environment:
  PYTHON    interpreter to make .venv with (default: python3, else the newest that fits)
EOF
}

# run_stage NAME ARGUMENTS OF pytest...: ends the script if a test fails.
run_stage() {
    local name=$1 started=$SECONDS
    shift
    "$venv/bin/python" -m pytest --stage "$name" "$@" || exit
    printf 'stage %s: %d s\n' "$name" $((SECONDS - started))
}

# Whether the arguments choose tests themselves: a path, or the value of -k or -m.
choose_tests() {
    local argument
    for argument; do
        [[ $argument == -* ]] || return 0
    done
    return 1
}

selection=(-m "not slurm and not hosts")
case ${1:-} in
    -h | --help)
        usage
        exit 0
        ;;
    --slurm)
        shift
        selection=()
        export DYN_MPI_REQUIRE_SLURM=1
        ;;
esac

# pytest knows its own flags, and only once it is installed
refuse_words '
import sys
from difflib import get_close_matches
own = ["--help", "--slurm", "--full", "--stage"]
for word in sys.argv[1:]:
    flag = word.partition("=")[0]
    near = get_close_matches(flag, own, n=1, cutoff=0.8)
    if flag.startswith("--") and flag not in own and near:
        fix = f"is {near[0]} meant? scripts/test.sh --help"
        print(f"unknown flag {flag}\n  expected: {own}, or options of pytest\n  fix:      {fix}", file=sys.stderr)
        sys.exit(64)
' "$@"
prepare_environment dev
cd "$root"
if choose_tests "$@"; then
    exec "$venv/bin/python" -m pytest "${selection[@]}" "$@"
fi
cores=$(nproc)
run_stage fast -n "$cores" --dist worksteal "${selection[@]}" "$@"
# these wait more than they compute
run_stage parallel -n $((cores + 2)) --dist loadfile --no-loadscope-reorder "${selection[@]}" "$@"
run_stage alone "${selection[@]}" "$@"
