#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Software:  triton 3.6.0 (PyPI), Linux; no GPU is needed.
# Seen:      in TRITON_CACHE_DIR, the list of a kernel's files (__grp__*.json) has absolute paths. After the folder was moved, or copied to another
#            machine, Triton finds the list and none of the files, compiles the kernel again, and says nothing.
# Expected:  a cache that is found by TRITON_CACHE_DIR is good wherever that is.
# Output on 2026-12-01:
#   where it was made: ['kernel.cubin']
#   moved: []
#   moved, with the paths in the list changed: ['kernel.cubin']
# Ends with 0 where that is still so, with 1 where it has changed, with 2 where it could not be tried.

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{
    "${PYTHON:-python3}" -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -qq --no-cache-dir --disable-pip-version-check triton==3.6.0
} || exit 2

cat >"$folder/look.py" <<'EOF'
import sys

from triton.runtime.cache import FileCacheManager

cache = FileCacheManager("KERNEL")
if sys.argv[1:] == ["make"]:
    cache.put_group("kernel.json", {"kernel.cubin": cache.put(b"code", "kernel.cubin")})
print(sorted(cache.get_group("kernel.json") or ()))
EOF
look() { TRITON_CACHE_DIR="$1" "$folder/venv/bin/python" "$folder/look.py" "${@:2}"; }

made=$(look "$folder/here" make)
echo "where it was made: $made"
mv "$folder/here" "$folder/there"
moved=$(look "$folder/there")
echo "moved: $moved"
sed -i "s|$folder/here/|$folder/there/|g" "$folder"/there/KERNEL/__grp__*
changed=$(look "$folder/there")
echo "moved, with the paths in the list changed: $changed"
[[ $made == "['kernel.cubin']" && $moved == "[]" && $changed == "$made" ]]
