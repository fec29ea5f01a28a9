# SPDX-License-Identifier: Apache-2.0
"""Hold streamed completions open: ``hold_streams.py PORT MODEL COUNT MAX_TOKENS``, of a frontend on this host's loopback.

Waits until the model is listed, and prints "open" once every stream has brought its first piece. Then one line of JSON for each as it ends:
when, and how ("done", or else an error). Standard library only, so that it starts at once.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time

LISTED_SECONDS = 30.0
QUIET_SECONDS = 60.0
ROUTED_SECONDS = 10.0


class Streams:
    """``count`` streams, each read by a thread."""

    def __init__(self, port: int, model: str, count: int, max_tokens: int) -> None:
        self.port, self.model, self.count, self.max_tokens = port, model, count, max_tokens
        self.lock = threading.Lock()
        self.open = 0

    def say(self, text: str) -> None:
        with self.lock:
            print(text, flush=True)

    def begun(self) -> None:
        with self.lock:
            self.open += 1
            if self.open == self.count:
                print("open", flush=True)

    def run(self, number: int) -> None:
        try:
            end = self.read()
        except (OSError, http.client.HTTPException) as error:
            end = f"{type(error).__name__}: {error}"
        self.say(json.dumps({"stream": number, "time": time.time(), "end": end}))

    def read(self) -> str:
        body = {
            "model": self.model,
            "prompt": "The capital of France is",
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        end = time.monotonic() + ROUTED_SECONDS
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=QUIET_SECONDS)
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            if reply.status == 200:
                break
            # a model is listed a moment before it is routed to
            if reply.status not in (404, 503) or time.monotonic() > end:
                return f"status {reply.status}: {reply.read().decode(errors='replace')}"
            time.sleep(0.05)
        pieces, event = 0, ""
        for raw in reply:
            line = raw.decode(errors="replace").strip()
            if line.startswith("event: error") or '"error":' in line:
                event = line
            elif line == "data: [DONE]":
                return event or "done"
            elif line.startswith("data: "):
                pieces += 1
                if pieces == 1:
                    self.begun()
        return event or f"closed after {pieces} pieces"


def listed(port: int, model: str) -> bool:
    """Return whether the frontend has the model."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/v1/models")
        return model in connection.getresponse().read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def main() -> int:
    port, model, count, max_tokens = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    end = time.monotonic() + LISTED_SECONDS
    while not listed(port, model):
        if time.monotonic() > end:
            print(f"{model} is not listed", file=sys.stderr)
            return 1
        time.sleep(0.05)
    streams = Streams(port, model, count, max_tokens)
    threads = [threading.Thread(target=streams.run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
