# SPDX-License-Identifier: Apache-2.0
"""Keep streams of one worker open: ``keep_streams.py URL MODEL INSTANCE COUNT``, until stdin closes; each is followed by the next.

Prints "open" when each has brought its first piece, then for each that ends a line of JSON: when it began and ended, how ("done", or else an
error), its pieces, and the longest wait for one. ``INSTANCE`` is the worker's id in Dynamo, hexadecimal; the frontend routes to it alone.
Standard library only.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
import urllib.parse

TOKENS = 200
QUIET_SECONDS = 60.0


class Streams:
    """``count`` streams at a time, each read by a thread."""

    def __init__(self, url: str, model: str, instance: str, count: int) -> None:
        parts = urllib.parse.urlsplit(url)
        self.host, self.port = parts.hostname or "", parts.port or 80
        self.body = {
            "model": model,
            "prompt": "The capital of France is",
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "stream": True,
            "nvext": {"backend_instance_id": int(instance, 16)},
        }
        self.count, self.opened = count, 0
        self.lock, self.over = threading.Lock(), threading.Event()

    def say(self, text: str) -> None:
        with self.lock:
            print(text, flush=True)

    def run(self) -> None:
        is_first = True
        while not self.over.is_set():
            row = {"began": time.time(), "end": "", "pieces": 0, "longest_wait": 0.0}
            try:
                self.read(row, is_first)
            except (OSError, http.client.HTTPException) as error:
                row["end"] = f"{type(error).__name__}: {error}"
            is_first = False
            self.say(json.dumps({**row, "ended": time.time()}))
            if row["end"] != "done":
                time.sleep(0.2)

    def read(self, row: dict[str, object], is_first: bool) -> None:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=QUIET_SECONDS)
        last, pieces, longest, is_whole = time.monotonic(), 0, 0.0, False
        try:
            connection.request("POST", "/v1/completions", json.dumps(self.body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            if reply.status != 200:
                row["end"] = f"status {reply.status}: {reply.read(200).decode(errors='replace')}"
                return
            for raw in reply:
                line = raw.decode(errors="replace").strip()
                if line.startswith("event: error") or '"error":' in line:
                    row["end"] = line
                elif line == "data: [DONE]":
                    row["end"] = row["end"] or ("done" if is_whole else f"done after {pieces} pieces")
                    return
                elif line.startswith("data: "):
                    now = time.monotonic()
                    # all tokens that were asked for; some have no text of their own, and thus no piece
                    is_whole = is_whole or '"finish_reason":"length"' in line.replace(" ", "")
                    # what the first one waits for is the queue, too
                    longest = max(longest, now - last) if pieces else longest
                    last, pieces = now, pieces + 1
                    row["pieces"], row["longest_wait"] = pieces, longest
                    if pieces == 1 and is_first:
                        self.begun()
            row["end"] = row["end"] or f"closed after {pieces} pieces"
        finally:
            connection.close()

    def begun(self) -> None:
        with self.lock:
            self.opened += 1
            if self.opened == self.count:
                print("open", flush=True)


def main() -> int:
    streams = Streams(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
    threads = [threading.Thread(target=streams.run) for _ in range(streams.count)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    streams.over.set()
    for thread in threads:
        thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
