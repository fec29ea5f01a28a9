# SPDX-License-Identifier: Apache-2.0
"""A pod other than the leader's: connects to the leader, runs mpirun's daemon, and exits with the world's exit code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import ExitCode, PhaseTimeoutError, of_signal
from dynamo_mpi.common.subprocess import kill_session
from dynamo_mpi.deploy.kubernetes.agent import refuse_other_than_daemon
from dynamo_mpi.deploy.kubernetes.wire import HANDSHAKE_SECONDS, MOST_LINE, Channel, enable_keepalive, join
from dynamo_mpi.deploy.launchers import folder_environment

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dynamo_mpi.deploy.kubernetes.settings import JoinSettings

_AGAIN_SECONDS = 1.0
# the daemon ends its ranks itself when the leader's mpirun is lost; remaining processes are killed after this time
_END_SECONDS = 5.0


class WorkerPod:
    """One pod that isn't the leader's.

    Args:
        settings: the leader's address and more.
        host: this pod's name.
        folder: a private folder for the daemon's session files.
        say: prints one line for the operator.
    """

    def __init__(self, settings: JoinSettings, host: str, folder: Path, say: Callable[[str], None]) -> None:
        self._settings, self._host, self._folder, self._print = settings, host, folder, say
        self._daemon: asyncio.subprocess.Process | None = None
        self._channel: Channel | None = None
        self._task: asyncio.Task[int] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._signal = 0

    async def run(self) -> int:
        """Run as a pod of the group until its end.

        Returns:
            The leader's exit code; 75 if the leader was lost before sending one; 128 + n if a signal arrived before anything ran.

        Raises:
            AuthorizationError: the secret isn't the leader's.
            PhaseTimeoutError: the leader can't be reached in time.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        self._task = asyncio.ensure_future(self._follow())
        try:
            return await self._task
        except asyncio.CancelledError:
            return of_signal(self._signal)
        finally:
            await self._end_daemon()

    async def _follow(self) -> int:
        self._channel = channel = await self._call()
        self._print(f"joined {self._settings.leader}")
        try:
            while (message := await channel.receive()) is not None:
                if isinstance(code := message.get("end"), int):
                    return code
                if isinstance(start := message.get("start"), dict):
                    channel.send(await self._start(start.get("daemon"), start.get("arguments")))
        finally:
            await channel.close()
        self._print("the leader is lost")
        return of_signal(self._signal) if self._signal else ExitCode.TEMPORARY

    async def _call(self) -> Channel:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._settings.timeout
        why = "it didn't answer"
        while loop.time() < end:
            try:
                reader, writer = await asyncio.wait_for(
                    asyncio.open_connection(self._settings.leader, self._settings.port, limit=MOST_LINE),
                    HANDSHAKE_SECONDS,
                )
                enable_keepalive(writer)
                with contextlib.suppress(asyncio.TimeoutError):
                    channel = await asyncio.wait_for(
                        join(reader, writer, self._settings.secret, self._settings.index, self._host),
                        HANDSHAKE_SECONDS,
                    )
                    if channel is not None:
                        return channel
                writer.close()
            except (OSError, asyncio.TimeoutError) as error:
                why = str(error) or why
            await asyncio.sleep(_AGAIN_SECONDS)
        raise PhaseTimeoutError(
            f"the leader {self._settings.leader} port {self._settings.port} can't be reached: {why}",
            expected=f"the leader's pod, within {self._settings.timeout:g} s",
            fix="check its log; its name needs a headless service, and a NetworkPolicy must let this pod in",
        )

    async def _start(self, daemon: object, arguments: object) -> dict[str, object]:
        try:
            name, words = refuse_other_than_daemon(daemon, arguments)
        except ValueError as error:
            self._print(f"refused to start {daemon!r:.40}: {error}")
            return {"failed": f"{self._host} refused: {error}"}
        program = shutil.which(name)
        if program is None:
            return {"failed": f"{self._host} has no {name} on PATH: the same Open MPI is needed in all pods"}
        if self._daemon is not None:
            return {"failed": f"{self._host} runs a daemon already"}
        try:
            # a session of its own, which also contains the ranks
            self._daemon = await asyncio.create_subprocess_exec(
                program, *words, env={**os.environ, **folder_environment(self._folder)}, start_new_session=True
            )
        except OSError as error:
            return {"failed": f"{self._host} can't start {program}: {error.strerror}"}
        self._watcher = asyncio.ensure_future(self._watch(self._daemon))
        return {"started": True}

    async def _watch(self, daemon: asyncio.subprocess.Process) -> None:
        code = await daemon.wait()
        if self._channel is not None:
            self._channel.send({"ended": code})

    async def _end_daemon(self) -> None:
        if self._daemon is None:
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._daemon.wait(), _END_SECONDS)
        kill_session(self._daemon.pid)
        await self._daemon.wait()

    def _stop(self, number: int) -> None:
        """Request an orderly end of all pods from the leader; a second signal ends this pod."""
        again, self._signal = self._signal != 0, number
        if self._daemon is not None and self._channel is not None and not again:
            self._channel.send({"stop": number})
        elif self._task is not None:
            self._task.cancel()
