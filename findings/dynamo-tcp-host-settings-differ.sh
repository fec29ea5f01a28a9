#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Software:  ai-dynamo-runtime 1.4.2 (PyPI), Linux; file discovery, tcp request plane.
# Seen:      of two settings of one name and one purpose, DYN_TCP_RPC_HOST (where an endpoint is served) takes an address and no interface,
#            DYN_TCP_RESPONSE_STREAM_HOST (where a client takes answers) an interface and no address. Where there is nothing but loopback, the
#            second has to be set, to "lo": otherwise an endpoint serves and is discovered, but no client can be made, which hence only turns up
#            with the first who wants to send a request.
# Expected:  both take both, as later versions say of themselves, and loopback is found where there is nothing else.
# Output on 2026-11-30:
#   this network; RPC 127.0.0.1, RESPONSE_STREAM lo: answered: ['a request']
#   this network; RPC 127.0.0.1, RESPONSE_STREAM 127.0.0.1: refused: Generic error: Interface not found: 127.0.0.1
#   this network; RPC lo, RESPONSE_STREAM lo: refused: Invalid TCP bind address: invalid socket address syntax
#   loopback alone; RPC 127.0.0.1, RESPONSE_STREAM unset: refused: Generic error: Failed to resolve local IP address: An erro
#   loopback alone; RPC 127.0.0.1, RESPONSE_STREAM lo: answered: ['a request']
# Ends with 0 where that is still so, with 1 where it has changed, with 2 where it could not be tried. Without the right to make a network namespace
# (root, or user namespaces), what there is on loopback alone is left out.

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{
    "${PYTHON:-python3}" -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -qq --no-cache-dir --disable-pip-version-check ai-dynamo-runtime==1.4.2
} || exit 2

cat >"$folder/both.py" <<'EOF'
import asyncio
import os
import sys

from dynamo.runtime import DistributedRuntime


async def answer(request, context=None):
    yield request


async def use():
    endpoint = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp").endpoint("findings.echo.generate")
    if sys.argv[1] == "serve":
        await endpoint.serve_endpoint(answer)
        return
    client = await endpoint.client()
    await client.wait_for_instances()
    stream = await client.generate("a request", annotated=False)
    print("answered:", [part async for part in stream])


async def main():
    try:
        await asyncio.wait_for(use(), 20)
    except Exception as error:
        print("refused:", " ".join(str(error).split())[:58] or type(error).__name__)
    # without the interpreter's own end, which the runtime's threads don't bear
    sys.stdout.flush()
    os._exit(0)


asyncio.run(main())
EOF
cat >"$folder/pair.sh" <<'EOF'
# RPC_HOST RESPONSE_STREAM_HOST, each empty for none: what the client says, or the server where that was refused
cd "$(dirname -- "$0")"
exec 2>words # where bash tells of its kills
discovery=$(mktemp -d -p "$PWD")
clean=(env -i HOME="$PWD" TMPDIR="$PWD" DYN_LOG=error DYN_FILE_KV="$discovery")
"${clean[@]}" ${1:+DYN_TCP_RPC_HOST="$1"} venv/bin/python both.py serve >served &
server=$!
"${clean[@]}" ${2:+DYN_TCP_RESPONSE_STREAM_HOST="$2"} venv/bin/python both.py ask >asked &
client=$!
# who is refused ends by itself, and the other has nobody to wait for then
wait -n
grep --quiet refused served || wait "$client"
kill -KILL "$server" "$client" || true
wait
grep refused served || cat asked
EOF

# NETWORK RPC_HOST RESPONSE_STREAM_HOST EXPECTED
try() {
    local said words=(bash "$folder/pair.sh" "$2" "$3")
    [[ $1 == "this network" ]] || words=(unshare "${namespace[@]}" bash -c 'ip link set lo up && exec "$@"' bash "${words[@]}")
    said=$(timeout 60 "${words[@]}") || exit 2
    echo "$1; RPC ${2:-unset}, RESPONSE_STREAM ${3:-unset}: $said"
    [[ $said == *"$4"* ]] || changed=1
}

changed=0
try "this network" 127.0.0.1 lo "answered:"
try "this network" 127.0.0.1 127.0.0.1 "Interface not found"
try "this network" lo lo "Invalid TCP bind address"
namespace=(--net)
((EUID == 0)) || namespace=(--user --map-root-user --net)
if unshare "${namespace[@]}" ip link set lo up 2>"$folder/words"; then
    try "loopback alone" 127.0.0.1 "" "Failed to resolve local IP address"
    try "loopback alone" 127.0.0.1 lo "answered:"
fi
exit "$changed"
