# SPDX-License-Identifier: Apache-2.0
"""A worker whose engine costs nothing, so that what remains is the serving path itself. For `serving_rate.py` alone."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable

from dynamo_mpi.common.errors import of_signal
from dynamo_mpi.common.log import RankLogger
from dynamo_mpi.common.phases import PhaseTracker
from dynamo_mpi.discovery.registration_monitor import RegistrationMonitor
from dynamo_mpi.engines.protocol import EngineLimits, GenerationRequest, TokenCallback, TokenChunk
from dynamo_mpi.runtime.serving import Registration, run, serve
from dynamo_mpi.supervisor.signals import ShutdownSignals


class EchoEngine:
    """Steps through all requests in flight in one thread, as a real engine does; each step gives each of them one token.

    A step begins when the event loop has turned since the last one: an engine that ran ahead would have all its tokens
    taken as one chunk, which is fast and says nothing about streaming.
    """

    limits = EngineLimits(
        context_length=2048, max_batch_size=64, max_num_tokens=2048, kv_block_size=16, total_kv_blocks=1000
    )

    def __init__(self) -> None:
        self._running: dict[str, tuple[GenerationRequest, TokenCallback, int]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turned = threading.Event()

    pending_kv_transfers = 0

    def load(self) -> None:
        """There is nothing to load."""

    def follow(self) -> None:
        """There is no rank to follow."""

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, request: GenerationRequest, callback: TokenCallback) -> None:
        """Queue a request."""
        self._loop = asyncio.get_running_loop()
        with self._changed:
            self._running[request.request_id] = (request, callback, 0)
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """Drop a request."""
        with self._changed:
            self._running.pop(request_id, None)

    def on_failure(self, callback: Callable[[BaseException], None]) -> None:
        """Nothing can fail here."""

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._running or self._closed)
                if self._closed:
                    return
                step = list(self._running.items())
            for request_id, (request, callback, made) in step:
                last = made + 1 == (request.max_tokens or 16)
                with self._changed:
                    if request_id not in self._running:
                        continue
                    if last:
                        del self._running[request_id]
                    else:
                        self._running[request_id] = (request, callback, made + 1)
                callback(TokenChunk(((made + 1) % 32000,), "length" if last else None))
            self._wait_for_a_turn()

    def _wait_for_a_turn(self) -> None:
        if self._loop is not None:
            self._turned.clear()
            self._loop.call_soon_threadsafe(self._turned.set)
            self._turned.wait()


def main() -> None:
    """Serve: MODEL_DIR NAME ENDPOINT."""
    model_dir, name, endpoint = sys.argv[1:4]
    engine = EchoEngine()
    engine.start()
    registration = Registration(model_dir, name, endpoint, "tcp", "etcd", 1, 5.0)
    log = RankLogger(0, "here")
    watch = RegistrationMonitor(endpoint, os.environ, 3.0, log)
    signals = ShutdownSignals(lambda number: os._exit(of_signal(number)))
    with signals.in_event_loop():
        run(
            serve(
                registration, engine, PhaseTracker(), watch, lambda _: None, lambda: None, log, signals.on_drain_request
            )
        )


if __name__ == "__main__":
    main()
