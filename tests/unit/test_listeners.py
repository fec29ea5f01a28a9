# SPDX-License-Identifier: Apache-2.0
"""What listens: the table, the kernel's view of real processes, and what doctor says of them."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dynamo_mpi.common.ports import listening_at
from dynamo_mpi.ops.doctor.check import Context, Status
from dynamo_mpi.ops.doctor.ports import check_listeners, judge_listeners
from dynamo_mpi.ops.listeners import (
    EVERYWHERE,
    LISTENERS,
    ON_LOOPBACK,
    Found,
    Reach,
    find_listeners,
    kind_of,
    markdown_table,
    reach_of,
    rows_for,
)

LISTEN = (
    "import json, socket, sys; sockets = [socket.create_server((address, 0), family=socket.AF_INET6 if ':' in address else socket.AF_INET) "
    "for address in sys.argv[2].split(',')]; "
    "print(json.dumps([s.getsockname()[1] for s in sockets]), flush=True); sys.stdin.read()"
)


@contextlib.contextmanager
def listening(word: str, *addresses: str) -> Iterator[tuple[int, list[int]]]:
    """Run a process with a word in its command line that listens at these addresses; the value is its pid and its ports."""
    import json

    words = [sys.executable, "-c", LISTEN, word, ",".join(addresses)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield process.pid, json.loads(process.stdout.readline())
        process.stdin.close()


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


def test_a_process_is_seen_as_the_kernel_has_it() -> None:
    addresses = ["127.0.0.1", "0.0.0.0", *(["::1"] if has_ipv6() else [])]  # noqa: S104 - to be found
    with listening("dynamo_mpi.worker", *addresses) as (pid, ports):
        assert listening_at(pid) == sorted(zip(addresses, ports, strict=True))
        found = {each.reach: each for each in find_listeners([pid])}
    assert {(each.kind, each.pids) for each in found.values()} == {("rank", (pid,))}
    assert found[Reach.EVERYWHERE].places == (f"0.0.0.0:{ports[1]}",)
    assert f"127.0.0.1:{ports[0]}" in found[Reach.LOOPBACK].places
    if has_ipv6():
        assert f"[::1]:{ports[2]}" in found[Reach.LOOPBACK].places


def test_a_process_that_is_gone_listens_nowhere() -> None:
    with listening("x", "127.0.0.1") as (pid, _):
        pass
    assert listening_at(pid) == []
    assert kind_of(pid) is None


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("dynamo_mpi.worker", "rank"),
        ("dynamo.frontend", "frontend"),
        ("--advertise-client-urls", "etcd"),
        ("dynamo.trtllm", "dynamo.trtllm"),
        ("dynamo_mpi.checks.kv", "rank of the KV check"),
        ("dynamo_mpi.pods", "leader of pods"),
        ("dynamo_mpi.workers", None),
    ],
)
def test_kinds_of_processes(word: str, kind: str | None) -> None:
    with listening(word, "127.0.0.1") as (pid, _):
        assert kind_of(pid) == kind
        assert [each.kind for each in find_listeners([pid])] == ([kind] if kind else [])


def test_doctor_finds_them_by_itself() -> None:
    with listening("dynamo.frontend", "127.0.0.1") as (pid, ports):
        checks = [check for check in check_listeners(Context({})) if check.id == "frontend-loopback"]
    (check,) = checks
    assert check.status is Status.OK
    assert f"127.0.0.1:{ports[0]}" in check.found
    assert str(pid) in check.found
    assert "everybody who reaches it" in check.found


def test_what_the_table_does_not_have_is_a_warning() -> None:
    (check,) = judge_listeners([Found("etcd", Reach.EVERYWHERE, (7,), ("0.0.0.0:2379",))])
    assert (check.status, check.id) == (Status.WARNING, "etcd-all-addresses")
    assert "pid=7" in check.fix
    (nothing,) = judge_listeners([])
    assert nothing.status is Status.SKIPPED


def test_every_row_can_be_found_by_kind_and_place() -> None:
    for row in LISTENERS:
        found = {reach for reach in Reach if row in rows_for(row.process, reach)}
        if row.place == EVERYWHERE:
            assert found == {Reach.EVERYWHERE}
        elif row.place == ON_LOOPBACK:
            assert found == {Reach.LOOPBACK}
        else:
            assert found == {Reach.LOOPBACK, Reach.ADDRESS, *([Reach.EVERYWHERE] if row.anywhere else [])}
    assert markdown_table().count("\n") == len(LISTENERS) + 2
    assert "||" not in markdown_table()


@pytest.mark.parametrize(
    ("address", "reach"),
    [
        ("0.0.0.0", Reach.EVERYWHERE),  # noqa: S104 - to be distinguished
        ("::", Reach.EVERYWHERE),
        ("127.0.0.1", Reach.LOOPBACK),
        ("127.1.2.3", Reach.LOOPBACK),
        ("::1", Reach.LOOPBACK),
        ("::ffff:127.0.0.1", Reach.LOOPBACK),
        ("::ffff:10.0.0.1", Reach.ADDRESS),
        ("10.0.0.1", Reach.ADDRESS),
        ("fe80::1", Reach.ADDRESS),
    ],
)
def test_reach_of_an_address(address: str, reach: Reach) -> None:
    assert reach_of(address) is reach


def test_what_is_known_on_loopback_alone_is_a_warning_elsewhere() -> None:
    found = [Found("mpirun", reach, (7,), ("x:1",)) for reach in (Reach.LOOPBACK, Reach.ADDRESS)]
    found += [Found("etcd", reach, (8,), ("x:1",)) for reach in (Reach.LOOPBACK, Reach.ADDRESS)]
    checks = {check.id: check for check in judge_listeners(found)}
    assert checks["mpirun-loopback"].status is Status.OK
    assert checks["mpirun"].status is Status.WARNING
    assert "its peers" in checks["etcd-loopback"].found
    assert checks["etcd"].status is Status.OK
    assert "its peers" not in checks["etcd"].found
