#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Software:  MPICH 5.0.2 (PyPI's mpich) and its mpiexec (Hydra), mpi4py 4.1.2, Linux.
# Seen:      mpiexec's exit code is the bitwise OR of the exit codes of all ranks, and so may be one that no rank has left with, and that means
#            something else by the conventions of sysexits.h: 64 (usage) and 6 make 70 (an internal error). The same whether the ranks use MPI,
#            and end it, or not. -print-all-exitcodes shows the single ones.
# Expected:  the code of a rank: the first, as with Open MPI's mpirun, or the highest, as with Slurm's srun.
# Output on 2026-11-30:
#   ranks of shell.sh leave with 1 2: mpiexec with 3
#   ranks of ranks.py leave with 1 2: mpiexec with 3
#   ranks of shell.sh leave with 64 6: mpiexec with 70
#   ranks of ranks.py leave with 64 6: mpiexec with 70
#   ranks of shell.sh leave with 1 64 6: mpiexec with 71
#   ranks of ranks.py leave with 1 64 6: mpiexec with 71
# Ends with 0 where that is still so, with 1 where it has changed, with 2 where it could not be tried.

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{
    "${PYTHON:-python3}" -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -qq --no-cache-dir --disable-pip-version-check mpich==5.0.2 mpi4py==4.1.2
} || exit 2
export TMPDIR=$folder

# EXPECTED CODE... : a rank for each code
try() {
    local expected=$1 code
    shift
    cat >"$folder/shell.sh" <<'EOF'
codes=("$@")
exit "${codes[PMI_RANK]}"
EOF
    cat >"$folder/ranks.py" <<'EOF'
import sys
from mpi4py import MPI

assert MPI.COMM_WORLD.size == len(sys.argv) - 1
MPI.COMM_WORLD.barrier()
code = int(sys.argv[1 + MPI.COMM_WORLD.rank])
MPI.Finalize()
sys.exit(code)
EOF
    for program in "bash $folder/shell.sh" "$folder/venv/bin/python $folder/ranks.py"; do
        code=0
        # shellcheck disable=SC2086 # words of a command
        timeout 60 "$folder/venv/bin/mpiexec" -n "$#" $program "$@" </dev/null || code=$?
        echo "ranks of $(basename "${program##* }") leave with $*: mpiexec with $code"
        ((code == expected)) || changed=1
    done
}

changed=0
try 3 1 2
try 70 64 6
try 71 1 64 6
exit "$changed"
