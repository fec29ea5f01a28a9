# SPDX-License-Identifier: Apache-2.0
"""The process that holds all hosts, and the way into a host.

The *anchor* is the one process that the machine's own PID namespace knows by pid: ``unshare``, whose child is PID 1 of a PID namespace.
All hosts are descendants of that PID 1, so that one SIGKILL to it ends every process, network and mount of theirs at once.
"""

from __future__ import annotations

import select
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import ClusterError
from .processes import ProcessIdentity, children_of, command_line

READY = "ready"
"""What PID 1 says on stdout once everything runs."""
STATES, STATE_PREFIX = Path("/tmp"), "dynmpi-"
"""Where folders for hosts in namespaces are made, and how their names begin; ``anchor.json`` in each records its anchor."""
NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")


def why_no_namespaces() -> str | None:
    """Return why no namespaces can be made here, or None."""
    probe = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "--mount-proc", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"],
        capture_output=True,
        text=True,
    )
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else None


def enter_command(init: int, cwd: Path) -> list[str]:
    """Return the words before a command that is to run on a host; it gets SIGTERM when the caller dies.

    Args:
        init: the pid, on this machine, of the host's PID 1.
        cwd: the command's folder, as the host sees it.
    """
    # env --chdir, and not nsenter's own, as that keeps the folder of the outer mount namespace
    prepare = ("setpriv", "--pdeathsig", "TERM", "env", f"--chdir={cwd}", "--")
    return ["nsenter", f"--target={init}", *NAMESPACES, "--", *prepare]


def remove_leftovers() -> None:
    """Remove the folders of hosts that died together with the process that owned them."""
    for state in STATES.glob(f"{STATE_PREFIX}*"):
        anchor = ProcessIdentity.load(state / "anchor.json")
        if anchor and not anchor.is_alive():
            shutil.rmtree(state, ignore_errors=True)


class Anchor:
    """The process that holds all hosts, running or not.

    Args:
        record: file that says which process it is, for other processes.
    """

    def __init__(self, record: Path) -> None:
        self._record = record
        self._process: subprocess.Popen[str] | None = None

    def start(
        self,
        first: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        die_with_parent: bool,
        timeout: float,
    ) -> None:
        """Start it, and wait until its PID 1 says that it is ready.

        Args:
            first: what PID 1 runs.
            environment: its environment.
            log: for its stderr.
            die_with_parent: end everything when this process ends, however it ends.
            timeout: seconds.

        Raises:
            ClusterError: it is not ready in time.
        """
        tie = ("setpriv", "--pdeathsig", "KILL") if die_with_parent else ()
        namespaces = ("unshare", *NAMESPACES, "--fork", "--kill-child=KILL", "--mount-proc")
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*tie, *namespaces, *first],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                env=environment,
                text=True,
                start_new_session=True,
            )
        # setpriv becomes unshare in place, so pid and start time hold from the beginning
        identity = ProcessIdentity.of(self._process.pid)
        if identity:
            identity.save(self._record)
        stdout = self._process.stdout
        assert stdout is not None  # as PIPE was asked for
        with stdout:
            in_time, _, _ = select.select([stdout], [], [], timeout)
            answer = stdout.readline().strip() if in_time else f"silent for {timeout:g} s"
        if answer != READY:
            raise ClusterError(f"PID 1 of all hosts did not start ({answer or 'it ended'})")

    def is_alive(self) -> bool:
        identity = ProcessIdentity.load(self._record)
        return bool(identity and identity.is_alive())

    def init(self) -> int | None:
        """Return the pid, on this machine, of its PID 1; None where there is none."""
        identity = ProcessIdentity.load(self._record)
        children = children_of(identity.pid) if identity and identity.is_alive() else []
        return children[0] if children else None

    def nested_init(self, argv: Sequence[str]) -> int | None:
        """Return the pid, on this machine, of the PID 1 of a host that PID 1 has started by ``argv``; None where there is none."""
        init = self.init()
        # between the two stands an unshare that ends with the host's argv
        holders = [] if init is None else children_of(init)
        holders = [holder for holder in holders if command_line(holder)[-len(argv) :] == list(argv)]
        found = [child for holder in holders for child in children_of(holder)[:1]]
        return found[0] if found else None

    def end(self) -> None:
        """End every process of all hosts."""
        identity = ProcessIdentity.load(self._record)
        if identity and identity.is_alive():
            init = [ProcessIdentity.of(child) for child in children_of(identity.pid)]
            # PID 1 first: the kernel ends it only after everything else in its PID namespace, so this waits for them all
            for process in [*init, identity]:
                if process:
                    process.kill()
        if self._process:
            self._process.kill()  # also when it never came to be recorded
            self._process.wait()
            self._process = None
