#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Software:  ninja 1.13.0 (PyPI), Python's tarfile, gcc, Linux. FlashInfer and torch's C++ extensions build their kernels by such files.
# Seen:      of files that ninja has built, packed by tarfile (its default format) and unpacked over themselves, about half count as changed, and are
#            built again. Ninja keeps each object's time in nanoseconds in .ninja_deps, and an object that is newer is out of date; tarfile keeps
#            times as floating point numbers, some tens of nanoseconds off. With the times set back exactly, there is no work to do.
# Expected:  a build folder that was archived is as up to date after it was unpacked as before.
# Output on 2026-12-01:
#   untouched: ninja: no work to do.
#   through tarfile: [1/12] gcc
#   through tarfile, times set back to the nanosecond: ninja: no work to do.
# Ends with 0 where that is still so, with 1 where it has changed, with 2 where it could not be tried.

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{
    command -v gcc
    "${PYTHON:-python3}" -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -qq --no-cache-dir --disable-pip-version-check ninja==1.13.0
} >/dev/null || exit 2

mkdir "$folder/build"
cd "$folder/build"
cat >build.ninja <<'EOF'
rule compile
  command = gcc -MMD -MF $out.d -c $in -o $out
  description = gcc
  depfile = $out.d
  deps = gcc
EOF
for number in {1..24}; do
    echo "int number$number(void) { return $number; }" >"$number.c"
    echo "build $number.o: compile $number.c" >>build.ninja
done
# what ninja would do first
next_step() { "$folder/venv/bin/ninja" -n | sed -n 1p; }

# MODE: packs the folder, and unpacks it over itself
through_tarfile() {
    "$folder/venv/bin/python" -W ignore - "$folder/all.tar" "$1" <<'EOF'
import os
import sys
import tarfile

times = {name: os.stat(name).st_mtime_ns for name in os.listdir(".")}
with tarfile.open(sys.argv[1], "w") as archive:
    archive.add(".")
with tarfile.open(sys.argv[1]) as archive:
    archive.extractall(".")
if sys.argv[2] == "exact":
    for name, mtime_ns in times.items():
        os.utime(name, ns=(mtime_ns, mtime_ns))
EOF
}

"$folder/venv/bin/ninja" >/dev/null
untouched=$(next_step)
echo "untouched: $untouched"
through_tarfile rounded
rounded=$(next_step)
echo "through tarfile: $rounded"
"$folder/venv/bin/ninja" >/dev/null
through_tarfile exact
exact=$(next_step)
echo "through tarfile, times set back to the nanosecond: $exact"
[[ $untouched == "ninja: no work to do." && $exact == "$untouched" && $rounded == "[1/"* ]]
