#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs `dynamo-mpi local` from a fresh clone: makes .venv, installs what is missing, hands its arguments on.

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"

usage() {
    cat <<'EOF'
usage: scripts/local.sh [FLAGS OF dynamo-mpi local]

  scripts/local.sh --ask "What is the capital of France?"
  scripts/local.sh --keep            serve until Ctrl-C
  scripts/local.sh --help            this, and all flags once it is installed

Environment:
  PYTHON    interpreter to make .venv with (default: python3, else the newest that fits)
EOF
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    [[ ! -x $venv/bin/dynamo-mpi ]] || "$venv/bin/dynamo-mpi" local --help
    exit 0
fi

# what it would refuse after minutes of installing
is_prepared local || refuse_words '
import sys
from dynamo_mpi.cli.local import add_arguments
from dynamo_mpi.cli.main import PROGRAM, Parser
from dynamo_mpi.common.errors import UsageError
parser = Parser(prog=f"{PROGRAM} local")
add_arguments(parser)
try:
    parser.parse_args(sys.argv[1:])
except UsageError as error:
    print(f"{PROGRAM}: {error}", file=sys.stderr)
    sys.exit(64)
' "$@"
prepare_environment local
exec "$venv/bin/dynamo-mpi" local "$@"
