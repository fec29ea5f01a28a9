# SPDX-License-Identifier: Apache-2.0
"""The leader's pod: accepts the other pods, runs mpirun, and sends the others its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.admission import Admission, Throttle
from dynamo_mpi.common.errors import DynamoMpiError, ExitCode, PhaseTimeoutError, UsageError, of_signal
from dynamo_mpi.common.host_address import service_address
from dynamo_mpi.common.process import home_variable, raise_nofile_limit
from dynamo_mpi.common.subprocess import kill_session
from dynamo_mpi.deploy.kubernetes.agent import ANSWER_SECONDS, SOCKET_VARIABLE
from dynamo_mpi.deploy.kubernetes.wire import HANDSHAKE_SECONDS, MOST_LINE, Channel, accept, enable_keepalive
from dynamo_mpi.deploy.launchers import UNBOUND, folder_environment
from dynamo_mpi.layout.format import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from dynamo_mpi.deploy.kubernetes.settings import LeadSettings

# variables of the MPI Operator, for its launch by ssh with its own hostfile
_NOT_OURS = ("default_hostfile", "rsh_args", "ssh_args", "set_default_slots", "keep_fqdn_hostnames")
_HURRY_SECONDS = 1.0
_LAST_MESSAGE_SECONDS = 5.0
_MOST_STRANGERS = 64


class _Pod(NamedTuple):
    place: int
    host: str
    channel: Channel
    answers: asyncio.Queue[dict[str, Any]]


class LeaderPod:
    """One group's leader.

    Args:
        settings: the number of pods, and the command.
        folder: a private folder for mpirun's session files, the hostfile and the agent's socket.
        say: prints one line for the operator.
    """

    def __init__(self, settings: LeadSettings, folder: Path, say: Callable[[str], None]) -> None:
        self._settings, self._folder, self._print = settings, folder, say
        self._pods: dict[int, _Pod] = {}
        self._changed = asyncio.Event()
        self._mpirun: asyncio.subprocess.Process | None = None
        self._asked: float | None = None
        self._signal = 0
        self._ended: dict[int, bool] = {}
        self._admission: Admission[asyncio.StreamWriter] = Admission(_MOST_STRANGERS, HANDSHAKE_SECONDS)
        self._rejections = Throttle()

    async def run(self) -> int:
        """Run the group until its end; return mpirun's exit code, or 128 + n if a signal arrived before.

        Raises:
            PhaseTimeoutError: not all pods have joined in time.
            UsageError: this pod has no such address, or mpirun can't be started.
        """
        raise_nofile_limit(self._settings.pods + _MOST_STRANGERS)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number, "this pod")
        address = service_address(self._settings.address, "--address")
        try:
            server = await asyncio.start_server(self._admit, address, self._settings.port, limit=MOST_LINE)
        except OSError as error:
            raise UsageError(
                f"{address} port {self._settings.port} can't be listened at: {error.strerror}",
                expected="an address of this pod, and a free port",
                fix="--port N",
            ) from None
        try:
            agents = await asyncio.start_unix_server(self._serve_agent, self._folder / "agent", limit=MOST_LINE)
        except OSError as error:
            server.close()
            raise UsageError(
                f"no socket can be made in {self._folder}: {error.strerror or error}",
                expected="a folder for temporary files whose path is shorter than about 80 characters",
                fix="TMPDIR=/tmp",
            ) from None
        code = of_signal(signal.SIGTERM)
        try:
            self._print(f"waiting for {self._settings.pods - 1} pods at {address} port {self._settings.port}")
            await self._gather()
            if not self._signal:
                code = await self._launch()
            else:
                code = of_signal(self._signal)
        except DynamoMpiError as error:
            code = error.exit_code
            raise
        finally:
            server.close()
            agents.close()
            if self._mpirun is not None:
                # ranks on this pod of an mpirun that was killed
                kill_session(self._mpirun.pid)
            for pod in self._pods.values():
                pod.channel.send({"end": code})
            await asyncio.gather(*(pod.channel.close() for pod in self._pods.values()))
        return code

    async def _gather(self) -> None:
        end = asyncio.get_running_loop().time() + self._settings.timeout
        while len(self._pods) < self._settings.pods - 1 and not self._signal:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), end - asyncio.get_running_loop().time())
            except asyncio.TimeoutError:
                missing = sorted(set(range(1, self._settings.pods)) - self._pods.keys())
                raise PhaseTimeoutError(
                    f"after {self._settings.timeout:g} s these pods have not joined: {', '.join(map(str, missing))}",
                    expected="all pods of the group, each calling this one",
                    fix="kubectl get pods, and the logs of those that are missing; a NetworkPolicy must let them in",
                ) from None

    async def _launch(self) -> int:
        hosts = [socket.gethostname(), *(self._pods[index].host for index in sorted(self._pods))]
        if len(set(hosts)) < len(hosts):
            raise UsageError(
                f"two pods have one host name: {', '.join(hosts)}", expected="a name for each", fix="hostname"
            )
        ranks = self._settings.ranks_per_pod
        hostfile = self._folder / "hosts"
        hostfile.write_text("".join(f"{host} slots={ranks}\n" for host in hosts), encoding="utf-8")
        words = (
            *shlex.split(self._settings.mpirun),
            *("--leave-session-attached", "--hostfile", str(hostfile), "--map-by", "slot"),
            *("-n", str(ranks * len(hosts)), *self._settings.command),
        )
        self._print(f"{counted(ranks * len(hosts), 'rank')} on {', '.join(hosts)}")
        try:
            self._mpirun = await asyncio.create_subprocess_exec(
                *words, env=mpirun_environment(os.environ, self._folder), start_new_session=True
            )
        except OSError as error:
            raise UsageError(
                f"{words[0]} can't be started: {error.strerror}", expected="the mpirun of Open MPI", fix="--mpirun PATH"
            ) from None
        if early := self._signal:
            # the signal arrived before mpirun was started; no rank runs
            self._mpirun.terminate()
        code = await self._mpirun.wait()
        if early:
            return of_signal(early)
        # an mpirun that has lost a daemon ends with 0 (Open MPI 5) or 205 (4), which restart policies would misunderstand
        if lost := await self._lost(_LAST_MESSAGE_SECONDS if code == 0 else 0.0):
            self._print(f"mpirun ended with {code} after it lost {lost}")
            return ExitCode.TEMPORARY
        return of_signal(-code) if code < 0 else code

    async def _lost(self, seconds: float) -> str:
        """Return the pods that were lost before their daemon ended, including those that don't report its end within some seconds."""
        if seconds == 0:
            return ", ".join(pod.host for place, pod in sorted(self._pods.items()) if self._ended.get(place) is False)
        end = asyncio.get_running_loop().time() + seconds
        while len(self._ended) < len(self._pods):
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), end - asyncio.get_running_loop().time())
            except asyncio.TimeoutError:
                break
        return ", ".join(pod.host for place, pod in sorted(self._pods.items()) if not self._ended.get(place))

    def _stop(self, number: int, who: str) -> None:
        """End in order; after a second signal to this pod, more than a moment later, end at once."""
        now = asyncio.get_running_loop().time()
        first, self._signal = not self._signal, number
        self._changed.set()
        if self._mpirun is None or self._mpirun.returncode is not None:
            return
        # mpirun forwards SIGUSR2, which requests a worker's orderly end; after SIGTERM it would kill the ranks at once
        if first:
            self._asked = now
            self._print(f"{who} got {signal.Signals(number).name}: ending in order")
            self._mpirun.send_signal(signal.SIGUSR2)
        elif who == "this pod" and self._asked is not None and now - self._asked > _HURRY_SECONDS:
            self._mpirun.send_signal(signal.SIGTERM)

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address, *_ = writer.get_extra_info("peername") or ("a connection",)
        now = asyncio.get_running_loop().time()
        for stranger in self._admission.enter(writer, address, now):
            # its own call of this method ends by that
            stranger.transport.abort()
        try:
            enable_keepalive(writer)
            joined = await asyncio.wait_for(accept(reader, writer, self._settings.secret), HANDSHAKE_SECONDS)
        except (OSError, asyncio.TimeoutError):
            joined = None
        finally:
            self._admission.leave(writer)
        if joined is None or not 1 <= joined[1] < self._settings.pods or joined[1] in self._pods:
            if (suppressed := self._rejections.permit(now)) is not None:
                more = f" ({suppressed} more since the last such line)" if suppressed else ""
                self._print(f"{address} was rejected: {_reason(joined, self._settings.pods)}{more}")
            writer.close()
            return
        channel, index, host = joined
        self._ended.pop(index, None)
        pod = self._pods[index] = _Pod(index, host, channel, asyncio.Queue())
        self._print(f"pod {index} joined: {host}")
        self._changed.set()
        while (message := await channel.receive()) is not None:
            if isinstance(number := message.get("stop"), int):
                self._stop(number if number in (signal.SIGTERM, signal.SIGINT) else signal.SIGTERM, f"pod {index}")
            elif "ended" in message:
                self._ended[index] = True
                self._changed.set()
            else:
                pod.answers.put_nowait(message)
        pod.answers.put_nowait({"failed": f"pod {index} ({host}) is lost"})
        if self._mpirun is None:
            del self._pods[index]
            self._print(f"pod {index} is lost: {host}")
        self._ended.setdefault(index, False)
        self._changed.set()
        with contextlib.suppress(OSError):
            writer.close()

    async def _serve_agent(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer: dict[str, Any]
        try:
            command = json.loads(await reader.readline())
            pod = next(pod for pod in self._pods.values() if pod.host == command["host"])
            pod.channel.send({"start": {"daemon": command["daemon"], "arguments": command["arguments"]}})
            answer = await asyncio.wait_for(pod.answers.get(), ANSWER_SECONDS)
        except (OSError, ValueError, KeyError, TypeError, StopIteration, asyncio.TimeoutError) as error:
            answer = {"failed": f"no pod of that name joined, or it doesn't answer ({type(error).__name__})"}
        with contextlib.suppress(OSError):
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
            writer.close()


def mpirun_environment(environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Return mpirun's environment (Open MPI 4 and 5), with which it starts its daemons by our agent.

    Args:
        environ: this process's environment.
        folder: the folder of its session files and of the agent's socket.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if not (name.startswith(("OMPI_MCA_", "PRTE_MCA_")) and name.endswith(_NOT_OURS))
    }
    agent = f"{sys.executable} -m dynamo_mpi.deploy.kubernetes.agent"
    return {
        **UNBOUND,
        **kept,
        **home_variable(environ),
        **folder_environment(folder),
        SOCKET_VARIABLE: str(folder / "agent"),
        "OMPI_MCA_plm_rsh_agent": agent,
        "PRTE_MCA_plm_ssh_agent": agent,
        # mpirun starts each daemon itself; no daemon starts another
        "OMPI_MCA_plm_rsh_no_tree_spawn": "1",
        "PRTE_MCA_plm_ssh_no_tree_spawn": "1",
    }


def _reason(joined: tuple[Channel, int, str] | None, pods: int) -> str:
    if joined is None:
        return "it doesn't know this group's secret"
    return f"its index {joined[1]} is not in 1 to {pods - 1}, or that pod has already joined"
