# SPDX-License-Identifier: Apache-2.0
"""A host that is lost, and a network that is cut: two hosts are network namespaces of this test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, run_command

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "programs" / "two_hosts.py"
HEARTBEAT = 2.0
# of the kernel: idle 5 s, then three questions in 15 s; or 20 s for what was sent
KEEP_ALIVE_SECONDS = 20.0
NAMESPACES = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")


def on_two_hosts(network: str, heartbeat: float, what: str) -> dict[str, Any]:
    """Run the program, and return what it has seen."""
    if os.geteuid() or subprocess.run([*NAMESPACES, "ip", "netns", "list"], capture_output=True).returncode:
        pytest.skip("no network namespaces here: needs root and iproute2")
    command = [*NAMESPACES, sys.executable, str(PROGRAM), network, str(heartbeat), what]
    done = run_command(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=90)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("network", ["4", "6"])
def test_a_host_that_is_cut_off_is_lost_within_the_heartbeat_timeout(network: str) -> None:
    found = on_two_hosts(network, HEARTBEAT, "cut")
    cause, code, text, seconds = found["rank 0"]
    assert (cause, code) == ("HOST_UNREACHABLE", 75)
    assert text.startswith("is lost: its host doesn't answer"), text
    assert "check whether far is up" in text
    assert HEARTBEAT / 2 < seconds < 2 * HEARTBEAT
    ((rank, silent),) = found["silences"]
    assert rank == 1 and HEARTBEAT / 4 <= silent < HEARTBEAT, "it is seen before, and once"
    kind, seconds = found["rank 1"]
    assert (kind, seconds < 2 * HEARTBEAT) == ("lost", True), found


def test_a_process_that_is_stopped_is_distinguished_from_a_host_that_is_lost() -> None:
    found = on_two_hosts("4", HEARTBEAT, "stop")
    cause, code, text, seconds = found["rank 0"]
    assert found["silences"] == [], "its kernel acknowledges what is sent to it"
    assert (cause, code) == ("HEARTBEAT", 124)
    assert text.startswith("is stopped or stuck"), text
    assert seconds < 2 * HEARTBEAT


def test_a_host_is_lost_by_keep_alive_where_silence_is_allowed() -> None:
    found = on_two_hosts("4", 0, "cut")
    assert found["rank 0"][:2] == ["HOST_UNREACHABLE", 75]
    assert found["rank 0"][3] < KEEP_ALIVE_SECONDS + 10
    assert found["rank 1"][0] == "lost"
    assert found["rank 1"][1] < KEEP_ALIVE_SECONDS + 10
