# SPDX-License-Identifier: Apache-2.0
"""Forks the companion of a node's ranks. Imported by every rank before the verdict."""

from __future__ import annotations

import _socket
import contextlib
import errno
import os
import signal
from typing import TYPE_CHECKING

from dynamo_mpi.supervision.companion_address import address_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.launchers.launch import Launch

# what a launcher or an operator sends to all processes of a step: the companion stays to the end of its ranks
_NOT_FOR_IT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_LEAST_BACKLOG = 128


def bring_companion(
    launch: Launch, host: str, argv: Sequence[str], environ: Mapping[str, str]
) -> _socket.socket | None:
    """Fork the companion of this node, if that is for this rank to do. Only before MPI and any thread is started. Does not raise.

    Args:
        launch: how this rank was started.
        host: this node.
        argv: the worker's command line, without the program.
        environ: names the world, and holds the companion's limits.

    Returns:
        A connection to it; None where another rank of this node brings it, or there is none.
    """
    address = address_of(launch, environ)
    if launch.local_rank not in (0, None) or (launch.local_rank is None and launch.rank):
        return None
    if not address and launch.size != 1:
        return None
    try:
        listener = _listen(address, launch) if address else None
        ours, its = _socket.socketpair()
        pid = os.fork()
    except OSError as error:
        why = "another program holds its address" if error.errno == errno.EADDRINUSE else error.strerror
        _say(host, f"warning: nobody watches over the ranks of this node before the verdict: {why}")
        return None
    if pid:
        for each in (listener, its):
            if each is not None:
                each.close()
        return ours
    try:
        ours.close()
        os.setsid()
        for number in _NOT_FOR_IT:
            signal.signal(number, signal.SIG_IGN)
        # in this process, not in a new interpreter: it has to be there before the first rank dies
        from dynamo_mpi.supervision.companion import accompany

        accompany(None if listener is None else listener.detach(), its.detach(), launch, host, argv, environ)
    except BaseException as error:  # whatever it is, this process must not go on as a rank
        _say(host, f"warning: nobody watches over the ranks of this node any more: {type(error).__name__}: {error}")
    finally:
        os._exit(0)


def _listen(address: str, launch: Launch) -> _socket.socket:
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        listener.bind(address)
        # all ranks of a node come at the same moment
        listener.listen(max(_LEAST_BACKLOG, launch.local_size or 0))
    except OSError:
        listener.close()
        raise
    return listener


def _say(host: str, text: str) -> None:
    with contextlib.suppress(Exception):  # a file system that has gone, say
        from dynamo_mpi.observe.speech import speech

        speech.speak(None, host, text)
