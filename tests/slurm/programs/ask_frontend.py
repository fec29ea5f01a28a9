# SPDX-License-Identifier: Apache-2.0
"""Ask a frontend on this host's loopback: ``ask_frontend.py PORT MODEL MAX_TOKENS TEXT``.

Waits until the model is listed. Prints one line of JSON per piece of the answer as it comes, then one with the whole answer.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import asdict

from dynamo_mpi.deploy.local.ask import NotServedYet, ask
from dynamo_mpi.deploy.services import Frontend

LISTED_SECONDS = 30.0


def main() -> int:
    port, model, max_tokens, text = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    frontend = Frontend(port, {})
    end = time.monotonic() + LISTED_SECONDS
    while time.monotonic() < end:
        if model in frontend.models():
            # listed a moment before it is routed to
            with contextlib.suppress(NotServedYet):
                answer = ask(
                    port,
                    model,
                    text,
                    max_tokens=max_tokens,
                    timeout_seconds=60,
                    interruptible=lambda _: contextlib.nullcontext(),
                    on_text=lambda piece: print(json.dumps(piece), flush=True),
                )
                print(json.dumps(asdict(answer)))
                return 0
        time.sleep(0.05)
    print(f"{model} is not served: {frontend.models()}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
