# SPDX-License-Identifier: Apache-2.0
"""Completions without end, for the soaks: ``soak_load.py [HOST:]PORT MODEL THREADS``, of a frontend, by default on this host's loopback.

Asks for each answer once while nothing else is asked, prints "references", and then asks for them at random, streamed or not, until its stdin
closes. Prints each request's end as a line of JSON; an answer that came whole, and isn't its reference, is "wrong". Standard library only.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import threading
import time
from typing import Any, NamedTuple

PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "Water boils at",
    "def fibonacci(n):",
    "The three laws of motion are",
    "A list of fruits:",
)
LENGTHS = (4, 12, 32)
TIMEOUT_SECONDS = 60.0
# the frontend answers at once while there is no worker
PAUSE_SECONDS = 0.2


class End(NamedTuple):
    """How a request ended.

    Args:
        is_whole: whether the client received that this is all.
        text: what came of the answer.
        how: in words.
    """

    is_whole: bool
    text: str
    how: str


def ask(address: str, model: str, prompt: str, tokens: int, stream: bool) -> End:
    """Ask for one completion."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_SECONDS)
    try:
        words = json.dumps({**body, "stream": stream})
        connection.request("POST", "/v1/completions", words, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            return End(False, "", f"status {reply.status}")
        return read_stream(reply) if stream else of_choice(json.loads(reply.read())["choices"][0])
    except (OSError, http.client.HTTPException, ValueError) as error:
        return End(False, "", type(error).__name__)
    finally:
        connection.close()


def of_choice(choice: dict[str, Any]) -> End:
    """Return the end of an answer that came at once."""
    return End(choice.get("finish_reason") is not None, choice["text"], f"finish_reason {choice.get('finish_reason')}")


def read_stream(reply: http.client.HTTPResponse) -> End:
    """Read a stream to its end: whole is one with a reason for its end, and no error before ``[DONE]``."""
    text, reason = "", None
    for raw in reply:
        line = raw.decode(errors="replace").strip()
        if line.startswith("event: error") or (line.startswith("data: {") and '"error":' in line):
            return End(False, text, "error event")
        if line == "data: [DONE]":
            return End(reason is not None, text, f"[DONE], finish_reason {reason}")
        if line.startswith("data: "):
            for choice in json.loads(line[6:]).get("choices", ()):
                text += choice.get("text") or ""
                reason = choice.get("finish_reason") or reason
    return End(False, text, "closed")


class Load:
    """The requests.

    Args:
        address: the frontend's, ``HOST:PORT``.
        model: its name.
    """

    def __init__(self, address: str, model: str) -> None:
        self.address, self.model = address, model
        self.references: dict[tuple[str, int], str] = {}
        self.lock, self.over = threading.Lock(), threading.Event()

    def say(self, line: str) -> None:
        with self.lock:
            print(line, flush=True)

    def take_references(self) -> None:
        """Ask for each answer while no other is computed."""
        for prompt in PROMPTS:
            for tokens in LENGTHS:
                while not (end := ask(self.address, self.model, prompt, tokens, False)).is_whole:
                    time.sleep(PAUSE_SECONDS)
                self.references[prompt, tokens] = end.text
        self.say("references")

    def run(self, seed: int) -> None:
        """Ask until the end."""
        dice = random.Random(seed)  # noqa: S311 - no secret
        while not self.over.is_set():
            prompt, tokens, stream = dice.choice(PROMPTS), dice.choice(LENGTHS), dice.random() < 0.7
            began = time.time()
            end = ask(self.address, self.model, prompt, tokens, stream)
            reference = self.references[prompt, tokens]
            kind = "failed"
            if end.is_whole:
                kind = "right" if end.text == reference else "wrong"
            elif not reference.startswith(end.text):
                kind = "wrong"
            row = {"kind": kind, "began": began, "ended": time.time(), "how": end.how}
            if kind == "wrong":
                row |= {"prompt": prompt, "tokens": tokens, "text": end.text, "reference": reference}
            self.say(json.dumps(row))
            if kind == "failed":
                time.sleep(PAUSE_SECONDS)


def main() -> int:
    address = sys.argv[1] if ":" in sys.argv[1] else f"127.0.0.1:{sys.argv[1]}"
    load = Load(address, sys.argv[2])
    load.take_references()
    threads = [threading.Thread(target=load.run, args=(number,)) for number in range(int(sys.argv[3]))]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    load.over.set()
    for thread in threads:
        thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
