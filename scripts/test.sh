#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the tests from a fresh clone: makes .venv, installs what is missing, hands its arguments on to pytest.

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"

usage() {
    cat <<'EOF'
usage: scripts/test.sh [--slurm] [ARGUMENTS OF pytest]

  scripts/test.sh                  all tests but those on a real Slurm or on several hosts
  scripts/test.sh --slurm          those too: root on Debian, installs packages
  scripts/test.sh tests/unit -x    what pytest takes

Environment:
  PYTHON    interpreter to make .venv with (default: python3, else the newest that fits)
EOF
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

prepare_environment dev
cd "$root"
exec "$venv/bin/python" -m pytest "${selection[@]}" "$@"
