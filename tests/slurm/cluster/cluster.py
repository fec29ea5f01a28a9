# SPDX-License-Identifier: Apache-2.0
"""Build a cluster, run commands in it, switch nodes off and on, and leave nothing behind.

The anchor's PID 1 is that of the login node. Everything else of the cluster is a descendant of it in its PID namespace.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests.namespaces.anchor import STATE_PREFIX, STATES, Anchor, enter_command, why_no_namespaces
from tests.namespaces.commands import InsideProcess, default_environment, run_to_end
from tests.namespaces.errors import ClusterError
from tests.namespaces.processes import ProcessIdentity, command_line, namespace_of, processes_in_namespace

from . import config, packages
from .entry import inside_command, inside_environment
from .settings import LOGIN, ClusterSettings, cable

START_TIMEOUT = 60.0
"""Seconds for the daemons to start and every node to be idle; one or two are usual."""


def why_unavailable() -> str | None:
    """Return why no cluster can be built here, or None."""
    if sys.platform != "linux":
        return "Slurm needs Linux"
    if os.geteuid() != 0:
        return "needs root, to install packages and make namespaces"
    if reason := packages.why_not_installable():
        return reason
    return why_no_namespaces()


class Cluster:
    """One cluster, up or not. Any number of these objects, in any process, may stand for the same state folder."""

    def __init__(self, settings: ClusterSettings) -> None:
        self.settings = settings
        self._anchor = Anchor(settings.anchor)

    @classmethod
    def temporary(cls, **values: int) -> Cluster:
        """A cluster with a new state folder of its own; ``values`` as in ClusterSettings."""
        # not tempfile.gettempdir(): pytest or a job may have made that one long, and sockets lie in here
        return cls(ClusterSettings(Path(tempfile.mkdtemp(prefix=STATE_PREFIX, dir=STATES)), **values))

    @classmethod
    def existing(cls, state: Path) -> Cluster:
        """The cluster of that folder.

        Raises:
            ClusterError: there is none.
        """
        return cls(ClusterSettings.load(state))

    # -- life ---------------------------------------------------------------------------------------------------------

    def up(self, *, die_with_parent: bool = False) -> None:
        """Install what is missing, start the cluster and wait until every node is idle. Nothing stays when it fails.

        Args:
            die_with_parent: end the cluster when this process ends, however it ends.

        Raises:
            ClusterError: it cannot be built here, or a daemon does not start; with the ends of the logs.
        """
        if self.is_up():
            return
        if reason := why_unavailable():
            raise ClusterError(reason)
        packages.install()
        state = self.settings.state
        shutil.rmtree(state, ignore_errors=True)
        state.mkdir(parents=True)
        state.chmod(0o755)  # daemons and tasks of other users look for their sockets in it
        self.settings.save()
        try:
            config.write_configuration(self.settings)
            self._anchor.start(
                inside_command("login", state),
                inside_environment(state),
                self.settings.logs / "login.out",
                die_with_parent=die_with_parent,
                timeout=START_TIMEOUT,
            )
            self.wait_until_idle()
        except ClusterError as error:
            logs = self.log_tails()
            self.down()
            raise ClusterError(f"{error}\n{logs}") from None
        except BaseException:
            self.down()
            raise

    def wait_until_idle(self, timeout: float = START_TIMEOUT) -> None:
        """Wait until slurmctld calls every node idle (seconds).

        Raises:
            ClusterError: it does not within the timeout.
        """
        wanted = set(self.settings.node_names)
        deadline = time.monotonic() + timeout
        while (idle := self.idle_nodes()) != wanted:
            if time.monotonic() > deadline or not self.is_up():
                raise ClusterError(f"nodes that are not idle after {timeout:g} s: {sorted(wanted - idle)}")
            time.sleep(0.05)

    def idle_nodes(self) -> set[str]:
        return set(self.run(["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]).stdout.split())

    def is_up(self) -> bool:
        return self._anchor.is_alive()

    def down(self) -> None:
        """End every process of the cluster and remove its folder. Does nothing to a cluster that is down already."""
        self._anchor.end()
        shutil.rmtree(self.settings.state, ignore_errors=True)

    def log_tails(self, lines: int = 5) -> str:
        """The last lines of each log that has any."""
        tails = []
        for path in sorted(self.settings.logs.glob("*")):
            if text := path.read_text(errors="replace").strip():
                tails.append("\n  ".join([f"{path.name}:", *text.splitlines()[-lines:]]))
        return "\n".join(tails)

    # -- commands -----------------------------------------------------------------------------------------------------

    def popen(
        self,
        argv: Sequence[str | Path],
        *,
        host: str = LOGIN,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = subprocess.PIPE,
    ) -> InsideProcess:
        """Start a command on one of the cluster's hosts. It gets SIGTERM if this process dies.

        Args:
            argv: the command; looked up in the environment's PATH.
            host: ``login`` or a node's name.
            environment: all of its environment but SLURM_CONF; ``default_environment()`` unless given.
            cwd: its folder; the state folder unless given.
            stdin, stdout, stderr: as for subprocess.Popen.

        Raises:
            ClusterError: that host is not running.
        """
        enter = enter_command(self.init_pid(host), cwd or self.settings.state)
        chosen = self.default_environment() if environment is None else environment
        return InsideProcess(
            [*enter, *map(str, argv)],
            env={**chosen, "SLURM_CONF": str(self.settings.slurm_conf)},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        host: str = LOGIN,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; as ``popen`` otherwise.

        Raises:
            ClusterError: that host is not running.
            subprocess.TimeoutExpired: it did not end within ``timeout`` seconds, and was ended.
        """
        return run_to_end(self.popen(argv, host=host, environment=environment, cwd=cwd), timeout)

    def default_environment(self) -> dict[str, str]:
        """As ``commands.default_environment``."""
        return default_environment(self.settings.temporary)

    # -- hosts --------------------------------------------------------------------------------------------------------

    def find_init_pid(self, host: str) -> int | None:
        """The pid, on this machine, of PID 1 of a host; None if the host is off.

        Raises:
            ClusterError: there is no such host in the cluster.
        """
        if host not in self.settings.addresses:
            raise ClusterError(f"no host {host}: there are {', '.join(self.settings.addresses)}")
        if host == LOGIN:
            return self._anchor.init()
        return self._anchor.nested_init(inside_command("node", self.settings.state, host))

    def init_pid(self, host: str) -> int:
        """As ``find_init_pid``.

        Raises:
            ClusterError: the host is off, or unknown.
        """
        pid = self.find_init_pid(host)
        if pid is None:
            raise ClusterError(f"{host} is not running")
        return pid

    def pids(self, host: str) -> list[int]:
        """The pids, on this machine, of the host's own processes; a node's are not the login node's."""
        namespace = namespace_of(self.init_pid(host), "pid")
        return processes_in_namespace(namespace, "pid") if namespace else []

    def kill_node(self, node: str) -> None:
        """Power a node off: its cable goes dead, then everything in it gets SIGKILL. Slurm must find out for itself.

        As with a real power failure no connection is closed towards other hosts: they just hear nothing any more.

        Raises:
            ClusterError: it is off already, or is the login node.
        """
        if node == LOGIN:
            raise ClusterError("the login node holds the cluster: use down")
        init = ProcessIdentity.of(self.init_pid(node))
        self.switch_cable(node, on=False)
        if init:
            init.kill()

    def stop_slurmd(self, node: str, *, stopped: bool) -> None:
        """Let a node's slurmd not answer, though it accepts connections, or let it go on (SIGSTOP, SIGCONT); its steps go on."""
        for pid in self.pids(node):
            if command_line(pid)[:1] == ["slurmd"]:
                os.kill(pid, signal.SIGSTOP if stopped else signal.SIGCONT)

    def switch_cable(self, node: str, *, on: bool) -> None:
        """Cut a running node off from the network, or connect it again.

        Raises:
            ClusterError: there is no such cable.
        """
        done = self.run(["ip", "link", "set", cable(node), "up" if on else "down"])
        if done.returncode:
            raise ClusterError(f"cable of {node}: {done.stderr.strip()}")

    def start_node(self, node: str, *, wait: bool = True) -> None:
        """Power a node on again, and wait until the whole cluster is idle.

        Raises:
            ClusterError: it is on already, or does not become idle.
        """
        if self.find_init_pid(node) is not None:
            raise ClusterError(f"{node} is running")
        self.switch_cable(node, on=True)
        command = inside_command("power-on", self.settings.state, node)
        done = self.run(command, environment=inside_environment(self.settings.state))
        if done.returncode:
            raise ClusterError(f"{node} does not start: {done.stderr}")
        if wait:
            self.wait_until_idle()
