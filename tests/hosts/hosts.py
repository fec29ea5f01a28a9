# SPDX-License-Identifier: Apache-2.0
"""Build hosts, run commands on them, and leave nothing behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests.conftest import ROOT
from tests.namespaces.anchor import STATE_PREFIX, STATES, Anchor, enter_command, why_no_namespaces
from tests.namespaces.commands import InsideProcess, default_environment, run_to_end
from tests.namespaces.errors import ClusterError
from tests.namespaces.processes import namespace_of, processes_in_namespace
from tests.slurm.cluster import packages

from . import inside
from .settings import HostsSettings

PACKAGES = ("iproute2",)
START_TIMEOUT = 60.0
TMP = Path("/tmp")


def why_unavailable() -> str | None:
    """Return why no hosts can be built here, or None."""
    if sys.platform != "linux":
        return "namespaces need Linux"
    if os.geteuid() != 0:
        return "needs root, to make namespaces"
    missing = [tool for tool in ("ip", "unshare", "nsenter", "setpriv") if shutil.which(tool) is None]
    if missing and (missing != ["ip"] or packages.why_not_installable()):
        return f"no {', '.join(missing)}"
    return why_no_namespaces()


class Hosts:
    """Some hosts, running or not.

    Every command starts from this process's environment without any launcher's variables, with this Python's folder first on PATH.
    The hosts see this machine's files, but have a /tmp and a /dev/shm of their own. What this checkout and this Python
    have under /tmp is visible there, too.

    Args:
        count: of hosts, named h1, h2, ...
        visible: folders under /tmp that every host has, too.
        resolvable: whether their names resolve; there is never a default route.
        second_rate: of a second network between them, as tc writes it; empty for none.
    """

    def __init__(
        self, count: int, visible: Sequence[Path] = (), *, resolvable: bool = True, second_rate: str = ""
    ) -> None:
        needed = [*visible, ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix), Path(sys.executable).parent]
        under = tuple(dict.fromkeys(path for path in needed if path.is_relative_to(TMP)))
        # short, for the socket in it
        state = Path(tempfile.mkdtemp(prefix=f"{STATE_PREFIX}hosts-", dir=STATES))
        self.settings = HostsSettings(state, count, under, resolvable, second_rate)
        self._anchor = Anchor(self.settings.anchor)

    @property
    def names(self) -> tuple[str, ...]:
        return self.settings.names

    def address(self, host: str, network: int = 0) -> str:
        """Return a host's IPv4 address."""
        return self.settings.address(host, network)

    @property
    def agent(self) -> Path:
        """The program for launchers to call in ssh's place, on any of the hosts."""
        return self.settings.agent

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start them. They end with this process, however it ends.

        Raises:
            ClusterError: they cannot be built here.
        """
        settings = self.settings
        packages.install(PACKAGES)
        settings.save()
        settings.hosts.write_text(settings.render_hosts())
        settings.resolv_conf.touch()
        words = (sys.executable, "-S", ROOT / "tests/hosts/agent.py", settings.socket)
        settings.agent.write_text(f'#!/bin/sh\nexec {" ".join(map(str, words))} "$@"\n')
        settings.agent.chmod(0o755)
        environment = {**inside.LOGIN_ENVIRONMENT, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            self._anchor.start(
                inside.inside_command("anchor", settings.state),
                environment,
                settings.log,
                die_with_parent=True,
                timeout=START_TIMEOUT,
            )
        except BaseException as error:
            words_of_log = settings.log.read_text(errors="replace").strip()
            self.stop()
            if isinstance(error, ClusterError):
                raise ClusterError(f"{error}\n{words_of_log}") from None
            raise

    def stop(self) -> None:
        """End every process on them, and remove their folder."""
        self._anchor.end()
        shutil.rmtree(self.settings.state, ignore_errors=True)

    def __enter__(self) -> Hosts:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- commands -----------------------------------------------------------------------------------------------------

    def popen(
        self,
        host: str,
        argv: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        *,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = subprocess.PIPE,
    ) -> InsideProcess:
        """Start a command on a host. It gets SIGTERM if this process dies.

        Args:
            host: its name.
            argv: the command; looked up in the environment's PATH.
            environment: added to ``environment()``.
            stdin, stdout, stderr: as for subprocess.Popen.

        Raises:
            ClusterError: that host is not running.
        """
        return InsideProcess(
            [*enter_command(self.init_pid(host), Path("/root")), *map(str, argv)],
            env=self.environment(environment),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )

    def run(
        self,
        host: str,
        argv: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; as ``popen`` otherwise.

        Raises:
            subprocess.TimeoutExpired: it did not end within ``timeout`` seconds, and was ended.
        """
        return run_to_end(self.popen(host, argv, environment), timeout)

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return what commands have, and ``extra``."""
        return {**default_environment(TMP), **(extra or {})}

    # -- hosts --------------------------------------------------------------------------------------------------------

    def init_pid(self, host: str) -> int:
        """Return the pid, on this machine, of a host's PID 1.

        Raises:
            ClusterError: it is not running, or unknown.
        """
        self.settings.address(host)
        pid = self._anchor.nested_init(inside.inside_command("host", self.settings.state, host))
        if pid is None:
            raise ClusterError(f"{host} is not running")
        return pid

    def pids(self, host: str) -> list[int]:
        """Return the pids, on this machine, of a host's processes, but for its PID 1."""
        init = self.init_pid(host)
        namespace = namespace_of(init, "pid")
        return [pid for pid in processes_in_namespace(namespace, "pid") if pid != init] if namespace else []

    def files(self, host: str, folder: Path) -> Path:
        """Return where this machine sees a folder of a host's own: of its /tmp, its /dev/shm."""
        return Path(f"/proc/{self.init_pid(host)}/root") / folder.relative_to("/")
