# SPDX-License-Identifier: Apache-2.0
"""A world over three "pods", which are host names of their own here, by a real mpirun and its real daemons, without ssh."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from dynamo_mpi.common.ports import free_port
from dynamo_mpi.common.subprocess import session_members
from tests.conftest import find_mpirun, mpi_environment

pytestmark = pytest.mark.mpi

_UNSHARE = ["unshare", "--user", "--map-root-user", "--uts"]
_SECONDS = 60
WHERE = "import os, socket; print('at', socket.gethostname(), os.environ['OMPI_COMM_WORLD_RANK'], flush=True)"
Process = subprocess.Popen[str]


@pytest.fixture(scope="module", autouse=True)
def host_names() -> None:
    """Pods with host names of their own, as far as this machine lets us."""
    done = subprocess.run([*_UNSHARE, "hostname", "x"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"unshare can't give processes a host name of their own here: {done.stderr.strip()}")


@contextmanager
def pods(folder: Path, *command: str, secret: str = "0123456789abcdef") -> Iterator[list[Process]]:  # noqa: S107 - a test's
    """Start a leader and two others; the first of the list is the leader. All are gone in the end."""
    (folder / "secret").write_text("0123456789abcdef")
    (folder / "theirs").write_text(secret)
    environment = mpi_environment({"PATH": f"{Path(find_mpirun()).parent}:/usr/bin:/bin", "TMPDIR": str(folder)})
    port = str(free_port())
    common = ["--port", port, "--timeout", str(_SECONDS)]
    lead = [
        "lead",
        "--pods",
        "3",
        "--ranks-per-pod",
        "2",
        "--address",
        "127.0.0.1",
        "--secret-file",
        str(folder / "secret"),
    ]
    join = ["join", "--leader", "127.0.0.1", "--secret-file", str(folder / "theirs"), *common]
    with ExitStack() as stack:
        started = []
        for name, words in (("p-0", [*lead, *common, "--", *command]), ("p-0-1", join), ("p-0-2", join)):
            argv = [
                *_UNSHARE,
                "sh",
                "-c",
                'hostname "$0" && exec "$@"',
                name,
                sys.executable,
                "-m",
                "dynamo_mpi.pods",
                *words,
            ]
            process = subprocess.Popen(
                argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            stack.callback(_end, process)
            started.append(process)
        yield started


def _end(process: Process) -> None:
    process.kill()
    process.communicate()


# mpirun ends the others as soon as one has failed: not before all have said where they are
LAST_ENDS_WITH_3 = """
import time
from pathlib import Path
folder, rank = Path(os.environ["TMPDIR"]), os.environ["OMPI_COMM_WORLD_RANK"]
(folder / f"said-{rank}").touch()
if rank == "5":
    while len(said := list(folder.glob("said-*"))) < 6:
        time.sleep(0.01)
    for path in said:
        path.unlink()
    os._exit(3)
"""


def test_ranks_stand_in_blocks_and_all_pods_leave_with_the_worlds_code(tmp_path: Path) -> None:
    with pods(tmp_path, sys.executable, "-c", f"{WHERE}\n{LAST_ENDS_WITH_3}") as found:
        said = "".join(process.communicate(timeout=_SECONDS)[0] for process in found)
        codes = [process.returncode for process in found]
    # ranks' lines may come as one
    places = set(re.findall(r"at (p-\d(?:-\d)?) (\d)", said))
    assert places == {
        (host, str(2 * at + one)) for at, host in enumerate(("p-0", "p-0-1", "p-0-2")) for one in (0, 1)
    }, said
    assert codes == [3, 3, 3], said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "theirs"]


def until_up(leader: subprocess.Popen[str]) -> list[str]:
    """Read what the leader says until all six ranks are up, and return it."""
    assert leader.stdout is not None
    heard: list[str] = []
    while sum("up" in line.split() for line in heard) < 6:
        heard.append(leader.stdout.readline())
        assert heard[-1], heard
    return heard


def test_a_signal_to_any_pod_asks_all_ranks_for_an_orderly_end(tmp_path: Path) -> None:
    wait = "import signal, sys; signal.signal(signal.SIGUSR2, lambda *_: sys.exit(0)); print('up', flush=True); signal.pause()"
    with pods(tmp_path, sys.executable, "-c", wait) as found:
        leader = found[0]
        until_up(leader)
        found[2].send_signal(signal.SIGTERM)
        said = "".join(process.communicate(timeout=_SECONDS)[0] for process in found)
        assert [process.returncode for process in found] == [0, 0, 0], said
    assert "pod 2 got SIGTERM: ending in order" in said


def test_a_second_signal_to_the_leader_ends_ranks_that_do_not_listen(tmp_path: Path) -> None:
    deaf = "import signal; signal.signal(signal.SIGUSR2, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    with pods(tmp_path, sys.executable, "-c", deaf) as found:
        leader = found[0]
        heard = until_up(leader)
        assert leader.stdout is not None
        leader.send_signal(signal.SIGTERM)
        while "ending in order" not in heard[-1]:
            heard.append(leader.stdout.readline())
            assert heard[-1], heard
        leader.send_signal(signal.SIGTERM)  # too soon: a launcher's way to say it twice
        with pytest.raises(subprocess.TimeoutExpired):
            leader.wait(timeout=1.5)
        leader.send_signal(signal.SIGTERM)
        said = "".join(process.communicate(timeout=_SECONDS)[0] for process in found)
        assert all(process.returncode not in (0, None) for process in found), said
        assert len({process.returncode for process in found}) == 1, said


def test_a_pod_that_goes_ends_all_with_75(tmp_path: Path) -> None:
    with pods(tmp_path, "sh", "-c", "echo up; while kill -0 $PPID 2>/dev/null; do sleep 0.2; done") as found:
        leader = found[0]
        until_up(leader)
        children = Path(f"/proc/{found[1].pid}/task/{found[1].pid}/children").read_text().split()
        assert len(children) == 1  # the daemon; in a container it and its ranks end with the first process
        found[1].kill()
        for pid in session_members(int(children[0])):
            os.kill(pid, signal.SIGKILL)
        said = "".join(process.communicate(timeout=_SECONDS)[0] for process in found)
        assert (leader.returncode, found[2].returncode) == (75, 75), said
    assert "after it lost p-0-1" in said


def test_who_does_not_know_the_secret_does_not_get_in(tmp_path: Path) -> None:
    with pods(tmp_path, "true", secret="something else, as long") as found:  # noqa: S106 - a test's
        said = [process.communicate(timeout=_SECONDS)[0] for process in found[1:]]
        assert [process.returncode for process in found[1:]] == [77, 77], said
        found[0].send_signal(signal.SIGTERM)
        refused = found[0].communicate(timeout=_SECONDS)[0]
        assert found[0].returncode == 128 + signal.SIGTERM
    assert "refused this pod" in said[0]
    assert "doesn't know this group's secret" in refused
