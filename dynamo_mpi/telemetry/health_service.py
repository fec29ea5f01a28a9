# SPDX-License-Identifier: Apache-2.0
"""Answers health requests in the node agent, for the rank that started the agent: in threads, beside the agent's own.

It isn't the rank that answers, because native code may block the rank's interpreter for minutes during the load, and Kubernetes would
restart a pod whose probe isn't answered. The agent's thread only notes what the rank says; nothing here makes it wait or fail.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.mpi.launcher import restart_count
from dynamo_mpi.supervisor.agent_socket import warn
from dynamo_mpi.telemetry.health_state import HealthState, note

if TYPE_CHECKING:
    from dynamo_mpi.mpi.launcher import LaunchInfo
    from dynamo_mpi.telemetry.health_address import HealthEndpoint
    from dynamo_mpi.telemetry.health_server import HealthServer

# how long the agent's thread waits at most for each busy thread that answers a request; docs/concepts/architecture.md has measurements
_SWITCH_SECONDS = 0.0005
# of requests: the agent has as many for its ranks as before
_MAX_FILES = 520


class HealthService:
    """The health endpoint of a node.

    Args:
        endpoint: where requests arrive.
        launch: how the rank that started the agent was started.
        host: this node.
        heartbeat_timeout: see `Rendezvous`.
        started: the rank's process, and when it started, in seconds since 1970 and of the monotonic clock.

    Attributes:
        state: what the rank has said last.
    """

    def __init__(
        self,
        endpoint: HealthEndpoint,
        launch: LaunchInfo,
        host: str,
        heartbeat_timeout: float | None,
        started: tuple[int, float, float],
    ) -> None:
        self._endpoint, self._host = endpoint, host
        pid, born, began = started
        self.state = HealthState(
            launch.rank,
            host,
            pid,
            born,
            began,
            restart_count(os.environ),
            since=born,
            last_seen=time.monotonic(),
            heartbeat_timeout=heartbeat_timeout,
        )
        self._server: HealthServer | None = None
        self._lock = threading.Lock()
        self._closed = False

    def start(self) -> None:
        """Answer requests from now on. Does not raise."""
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._raise_files_limit()
        try:
            threading.Thread(target=self._serve, name="http", daemon=True).start()
        except RuntimeError:
            warn("this node has no health server: too many threads of this user", self._host)
            self.on_exit()

    def on_message(self, text: str) -> None:
        """Note what the rank says about its state; see `RankObserver`."""
        with contextlib.suppress(Exception):
            self.state = note(self.state, text, time.monotonic(), time.time())

    def on_exit(self) -> None:
        """Answer nothing any more: the rank has exited. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            server = self._server
        if server is not None:
            server.close()
            return
        with contextlib.suppress(OSError):
            # a process that has inherited the socket would keep the port
            self._endpoint.listener.shutdown(socket.SHUT_RDWR)
        self._endpoint.listener.close()

    def _serve(self) -> None:
        try:
            # takes a while: the agent watches its ranks meanwhile
            from dynamo_mpi.telemetry.health_server import HealthServer

            with self._lock:
                if self._closed:
                    return
                self._server = HealthServer(self._endpoint, self)
            self._server.run()
        except Exception as error:
            warn(f"this node's health server has ended: {type(error).__name__}: {error}", self._host)
            self.on_exit()

    def _raise_files_limit(self) -> None:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY:
            wanted = soft + _MAX_FILES
            with contextlib.suppress(OSError, ValueError):
                limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
