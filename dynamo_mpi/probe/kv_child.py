# SPDX-License-Identifier: Apache-2.0
"""The rank's side of its station: it starts the process, and reaps it when its time is over, while the engine loads and serves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.probe.kv_way import SETTINGS
from dynamo_mpi.probe.nccl_fabric import has_words
from dynamo_mpi.supervision.tethered import tethered

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.probe.kv_terms import KvTerms

_READ_BYTES = 65536
_STDERR_BYTES = 2000
_LEAVE_SECONDS = 2.0
_MOST_LINE = 2 << 20


class Ready(NamedTuple):
    """What a rank's station says of itself.

    Args:
        trouble: why there is none; empty where there is one.
        address: that it listens on.
        port: of it.
        able: what is installed, of ``nixl`` and ``ucx``.
    """

    trouble: str
    address: str = ""
    port: int = 0
    able: tuple[str, ...] = ()

    def pack(self) -> list[str]:
        """Write it as a list of texts, for `dynamo_mpi.fields`."""
        return [self.trouble, self.address, str(self.port), ",".join(self.able)]

    @classmethod
    def unpack(cls, values: list[str]) -> Ready:
        """Read what `pack` wrote."""
        trouble, address, port, able = values
        return cls(trouble, address, int(port), tuple(filter(None, able.split(","))))


class StationChild:
    """The process. Start it from the main thread, at whose end it is killed.

    Args:
        terms: of the probe.
        rank: this rank.
        environ: this rank's environment, of which it keeps what UCX goes by.
        spoilt: it sends wrong bytes: a fault on demand.
    """

    def __init__(self, terms: KvTerms, rank: int, environ: Mapping[str, str], *, spoilt: bool = False) -> None:
        self._stderr = os.memfd_create("kv-probe-stderr")
        # without a GPU it can't hold any of its memory
        own = {**SETTINGS, "CUDA_VISIBLE_DEVICES": "", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            tethered([sys.executable, "-m", "dynamo_mpi.probe.kv_station"], parent=os.getpid()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**environ, **own},
            start_new_session=True,
        )
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        self._output = self._process.stdout
        self._text = b""
        words = json.dumps({"terms": terms.pack(), "rank": rank, "spoilt": spoilt})
        with contextlib.suppress(OSError), self._process.stdin as pipe:  # it has gone, as its answer says
            pipe.write(words.encode() + b"\n")

    def ready(self, seconds: float) -> Ready:
        """Wait until it can be asked, or can't."""
        end = time.monotonic() + seconds
        while b"\n" not in self._text:
            if not has_words(self._output.fileno(), end):
                self.close()
                return Ready(f"its process did not start in {seconds:g} s")
            if not self._read():
                words = self._last_words()
                self.close()
                return Ready(f"its process ended: {words}")
        verb, rest = self._next_line()
        if verb != "ready":
            self.close()
            return Ready(rest)
        about = json.loads(rest)
        return Ready("", str(about["address"]), int(about["port"]), tuple(about["able"]))

    def keep(self, on_told: Callable[[Any], None], on_end: Callable[[], None]) -> None:
        """Hand on what it is told, until it ends; in a thread.

        Args:
            on_told: called with what another world has found.
            on_end: called when it can't be asked any more.
        """
        threading.Thread(target=self._keep, args=(on_told, on_end), name="kv-probe", daemon=True).start()

    def close(self) -> None:
        """End it, and wait until it is gone. Idempotent."""
        with contextlib.suppress(ProcessLookupError):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # the tether ends it with us
            self._process.wait(_LEAVE_SECONDS)
        self._output.close()
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = -1

    def _keep(self, on_told: Callable[[Any], None], on_end: Callable[[], None]) -> None:
        try:
            while True:
                while b"\n" not in self._text:
                    if len(self._text) > _MOST_LINE or not self._read():
                        return
                verb, rest = self._next_line()
                if verb == "told":
                    on_told(json.loads(rest))
        finally:
            self.close()
            on_end()

    def _read(self) -> bool:
        data = os.read(self._output.fileno(), _READ_BYTES)
        self._text += data
        return bool(data)

    def _next_line(self) -> tuple[str, str]:
        line, _, self._text = self._text.partition(b"\n")
        verb, _, rest = line.decode("utf-8", "replace").partition(" ")
        return verb, rest

    def _last_words(self) -> str:
        size = os.fstat(self._stderr).st_size
        text = os.pread(self._stderr, _STDERR_BYTES, max(0, size - _STDERR_BYTES)).decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"
