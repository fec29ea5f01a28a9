# SPDX-License-Identifier: Apache-2.0
"""The process of one rank that takes part in the KV probe: ``python -m dynamo_mpi.probe.kv_station``. It ends by itself, and with its rank.

It reads one line of JSON with its terms, so that no secret stands in its arguments, and answers by lines on stdout:

    ready {"address", "port", "able"}
    failed TEXT                          instead
    told {...}                           what another world has found between it and this one

Who knows the token may ask a prefill rank for a pattern (`FETCH`), have a decode rank pull (`ORDER`), and leave word. It has no GPU, and
loads NIXL or UCX when it is first asked for it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from dynamo_mpi.engines.reference.kv_wire import Deadline
from dynamo_mpi.errors import BootstrapError
from dynamo_mpi.probe.kv_answer import LARGE_BYTES
from dynamo_mpi.probe.kv_fetch import Source, pull_from
from dynamo_mpi.probe.kv_nixl import NixlAgent
from dynamo_mpi.probe.kv_pattern import pattern
from dynamo_mpi.probe.kv_terms import LOAD_SECONDS, NIXL, UCX, KvTerms
from dynamo_mpi.probe.kv_ucx import UcxAgent, UcxError, find_ucx
from dynamo_mpi.probe.kv_wire import FETCH, Talk, TalkError, welcome
from dynamo_mpi.probe.nixl_library import nixl_installed
from dynamo_mpi.services.host_address import host_address

if TYPE_CHECKING:
    from collections.abc import Mapping

_STRANGER_SECONDS = 5.0
LONGEST_SECONDS = 15.0
"""How long one pull may take at the most."""
_MOST_TALKS = 32
_BACKLOG = 64


class Station:
    """Serves until its time is over.

    Args:
        terms: of the probe.
        rank: this rank's number.
        spoilt: sends a wrong byte: a fault on demand.
    """

    def __init__(self, terms: KvTerms, rank: int, *, spoilt: bool = False) -> None:
        self._terms, self._rank, self._spoilt = terms, rank, spoilt
        address = host_address(terms.network or None, "--kv-network / DYN_MPI_KV_NETWORK")
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=_BACKLOG)
        self._room = threading.BoundedSemaphore(_MOST_TALKS)
        # one pull at a time, or they would measure each other
        self._pulling = threading.Lock()
        self._memory_lock, self._loading = threading.Lock(), threading.Lock()
        self._agents: dict[str, NixlAgent | UcxAgent] = {}
        self._memory: Any = None
        self._made = b"", b""
        self._saying = threading.Lock()
        # as it was before anything that is loaded here wrote to it
        self._parent = os.dup(1)
        os.dup2(2, 1)

    def run(self) -> None:
        """Say that it is ready, and serve."""
        address, port = self._listener.getsockname()[:2]
        able = [name for name, there in ((NIXL, nixl_installed()), (UCX, find_ucx(os.environ))) if there]
        self._say("ready", {"address": address, "port": port, "able": able})
        end = time.monotonic() + self._terms.seconds
        while (left := end - time.monotonic()) > 0:
            self._listener.settimeout(left)
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                break
            except OSError:  # out of descriptors, say: conversations that end make room again
                time.sleep(min(1.0, left))
                continue
            if not self._room.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                talk = welcome(connection, self._terms.token, Deadline.after(_STRANGER_SECONDS))
                while True:
                    self._answer(talk, talk.hear())
        except (OSError, TalkError, ValueError, KeyError, TypeError):
            pass  # whoever it is has lost its connection by it, and knows
        finally:
            self._room.release()

    def _answer(self, talk: Talk, asked: Mapping[str, Any]) -> None:
        # whoever is here knows the token
        talk.deadline = Deadline.after(LONGEST_SECONDS)
        if talk.access.purpose == FETCH:
            if self._terms.role != "prefill":
                talk.say(refused="a decode rank has nothing to be pulled")
            elif "locate" in asked:
                self._let_read(talk, str(asked["locate"]))
            else:
                talk.send(self._pattern(talk)[: int(asked["send"])])
        elif "told" in asked:
            self._say("told", asked["told"])
            talk.say(heard=True)
        elif "prepare" in asked:
            self._prepare(talk, str(asked["prepare"]))
        elif self._terms.role != "decode":
            talk.say(refused="a prefill rank doesn't pull")
        else:
            self._pull(talk, asked)

    def _prepare(self, talk: Talk, transport: str) -> None:
        """Load what it will go over, in time that is no pull's."""
        talk.deadline = Deadline.after(LOAD_SECONDS)
        try:
            self._agent_of(transport)
        except (BootstrapError, UcxError) as error:
            talk.say(refused=" ".join(str(error).split()))
            return
        talk.say(prepared=True)

    def _pull(self, talk: Talk, asked: Mapping[str, Any]) -> None:
        seconds = min(float(asked["seconds"]), LONGEST_SECONDS)
        source = Source(
            int(asked["rank"]), str(asked["address"]), int(asked["port"]), talk.access.run, bytes.fromhex(asked["key"])
        )
        with self._pulling:
            pull = pull_from(source, str(asked["transport"]), seconds, self._agent_of)
        talk.say(pull=pull._asdict())

    def _let_read(self, talk: Talk, transport: str) -> None:
        """Say where a pattern lies, and let UCX go on until whoever reads it says something else, or goes."""
        import numpy as np

        with self._memory_lock:
            try:
                agent = self._agent_of(transport)
                if self._memory is None:
                    self._memory = np.zeros(LARGE_BYTES // 4, np.float32)
                if not agent.description:
                    agent.share(self._memory)
            except (BootstrapError, UcxError) as error:
                talk.say(refused=" ".join(str(error).split()))
                return
            self._memory[:] = np.frombuffer(self._pattern(talk), np.float32)
            agent_words = base64.b64encode(agent.description).decode()
            talk.say(address=int(self._memory.ctypes.data), agent=agent_words)
            while not talk.readable():
                agent.progress()

    def _agent_of(self, transport: str) -> NixlAgent | UcxAgent:
        """Return this rank's agent, which is loaded when it is first asked for."""
        with self._loading:
            if transport not in self._agents:
                if transport == NIXL:
                    agent = NixlAgent(self._terms.network or None)
                    agent.open()
                    self._agents[transport] = agent
                else:
                    self._agents[transport] = UcxAgent()
            return self._agents[transport]

    def _pattern(self, talk: Talk) -> memoryview:
        """Return what this run is sent, which is not made anew while somebody takes the time."""
        run, data = self._made
        if run != talk.access.run:
            data = pattern(talk.access.run, self._rank, LARGE_BYTES, spoilt=self._spoilt)
            self._made = talk.access.run, data
        return memoryview(data)

    def _say(self, verb: str, content: Any) -> None:
        with self._saying, contextlib.suppress(OSError):  # nobody listens any more: the rank is going
            os.write(self._parent, f"{verb} {json.dumps(content, separators=(',', ':'))}\n".encode())


def main() -> None:
    """Run it."""
    told = json.loads(sys.stdin.readline())
    code = 0
    try:
        Station(KvTerms.unpack(told["terms"]), int(told["rank"]), spoilt=told["spoilt"]).run()
    except (BootstrapError, OSError) as error:
        print("failed", " ".join(str(error).split()), flush=True)
        code = 1
    # no destructors: NIXL's may wait for peers that have gone
    os._exit(code)


if __name__ == "__main__":
    main()
