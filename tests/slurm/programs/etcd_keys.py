# SPDX-License-Identifier: Apache-2.0
"""Print the keys that Dynamo has in an etcd, one a line: ``etcd_keys.py URL``. Standard library only, as it is run over and over."""

from __future__ import annotations

import base64
import json
import sys
import urllib.request


def encode(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def main() -> int:
    # "0" follows "/", so this is everything that begins with "v1/"
    body = {"key": encode("v1/"), "range_end": encode("v10"), "keys_only": True}
    url = f"{sys.argv[1]}/v3/kv/range"
    try:
        with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=2) as reply:  # noqa: S310 - the tests' own etcd
            found = json.load(reply).get("kvs", [])
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    for entry in found:
        print(base64.b64decode(entry["key"]).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
