# SPDX-License-Identifier: Apache-2.0
"""Post a chat request: ``post_chat.py URL BODY``. Prints the HTTP status, a blank and the answer; 0 without an answer."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request


def main() -> None:
    url, body = sys.argv[1:3]
    request = urllib.request.Request(  # noqa: S310 - the address of the test's own frontend
        f"{url}/v1/chat/completions", body.encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as reply:
            print(reply.status, reply.read().decode())
    except urllib.error.HTTPError as error:
        print(error.code, error.read().decode())
    except OSError as error:
        print(0, error)


if __name__ == "__main__":
    main()
