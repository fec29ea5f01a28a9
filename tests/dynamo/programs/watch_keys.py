# SPDX-License-Identifier: Apache-2.0
"""Print the keys of a namespace in an etcd, whenever they change: ``watch_keys.py URL NAMESPACE``; a line of JSON is the time and the keys.

Those are what Dynamo has of workers, and our own records, but not what a failure leaves on purpose. Standard library only.
"""

from __future__ import annotations

import base64
import http.client
import json
import sys
import time
from urllib.parse import urlsplit

PREFIXES = ("v1/", "dynamo_mpi/v1/worlds/")


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def find(connection: http.client.HTTPConnection, namespace: str) -> list[str]:
    """Ask for the keys, and return those of the namespace."""
    keys: list[str] = []
    for prefix in PREFIXES:
        # the byte after "/" is "0", so this is everything that begins with the prefix
        end = prefix[:-1].encode() + b"0"
        body = {"key": encode(prefix.encode()), "range_end": encode(end), "keys_only": True}
        connection.request("POST", "/v3/kv/range", json.dumps(body), {"Content-Type": "application/json"})
        entries = json.load(connection.getresponse()).get("kvs", [])
        keys += [base64.b64decode(entry["key"]).decode() for entry in entries]
    return [key for key in keys if f"/{namespace}/" in key]


def main() -> None:
    parts = urlsplit(sys.argv[1])
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
    last: list[str] | None = None
    while True:
        now = find(connection, sys.argv[2])
        if now != last:
            print(json.dumps([time.time(), now]), flush=True)
            last = now
        time.sleep(0.02)


if __name__ == "__main__":
    main()
