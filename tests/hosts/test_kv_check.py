# SPDX-License-Identifier: Apache-2.0
"""The KV check by mpirun over four hosts: what it measures, and that a slow, a cut and a wrong pair are named."""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from dynamo_mpi.checks.kv_pull import nixl_installed
from tests.conftest import ROOT, find_mpirun, mpi_environment

from .conftest import MakeHosts
from .hosts import Hosts

pytestmark = pytest.mark.hosts
needs_nixl = pytest.mark.skipif(not nixl_installed(), reason="NIXL is not installed: pip install --no-deps nixl-cu12")
TRANSPORTS = ["tcp", pytest.param("nixl", marks=needs_nixl)]
PREFILL, DECODE = ("h1", "h2"), ("h3", "h4")
OUR_MODULES = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


@pytest.fixture(scope="module")
def four(make_hosts: MakeHosts) -> Hosts:
    return make_hosts(4)


def check(
    hosts: Hosts,
    *flags: str,
    prefill: Sequence[str] = PREFILL,
    decode: Sequence[str] = DECODE,
    ranks_on: Sequence[str] = (),
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run the check with a rank on each host, from the first."""
    own = {**OUR_MODULES, "OMPI_MCA_mpi_yield_when_idle": "1", "OMPI_MCA_btl_tcp_if_exclude": "lo,net9", **variables}
    names = ranks_on or (*prefill, *decode)
    placed = ("--host", ",".join(f"{name}:1" for name in names), "--map-by", "ppr:1:node")
    exported = [word for name in sorted(own) for word in ("-x", name)]
    roles = ("--prefill", ",".join(prefill), "--decode", ",".join(decode))
    program = (sys.executable, "-m", "dynamo_mpi.checks.kv", *roles, *flags)
    words = (find_mpirun(), "--prtemca", "plm_ssh_agent", str(hosts.agent), *placed, *exported, *program)
    done = hosts.run("h1", words, {**mpi_environment(), **own}, timeout=120)
    print(done.stderr)
    return done


@contextmanager
def cut(hosts: Hosts, one: str, other: str) -> Iterator[None]:
    """Have two hosts lose what they send each other, without an error: dropped where it arrives."""
    for host, peer in ((one, other), (other, one)):
        tc(hosts, host, "qdisc", "add", "dev", "eth0", "clsact")
        address = int(ipaddress.ip_address(hosts.address(peer)))
        # classic BPF: an IPv4 packet's sender, behind the Ethernet header, is the peer: dropped (2), else it passes
        program = f"4,32 0 0 26,21 0 1 {address},6 0 0 2,6 0 0 4294967295"
        tc(hosts, host, "filter", "add", "dev", "eth0", "ingress", "bpf", "da", "bytecode", program)
    try:
        yield
    finally:
        for host in (one, other):
            tc(hosts, host, "qdisc", "del", "dev", "eth0", "clsact")


@contextmanager
def slow(hosts: Hosts, host: str) -> Iterator[None]:
    """Let a host send at 80 Mbit/s only."""
    tc(
        hosts,
        host,
        *["qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "80mbit", "burst", "64k", "latency", "400ms"],
    )
    try:
        yield
    finally:
        tc(hosts, host, "qdisc", "del", "dev", "eth0", "root")


def tc(hosts: Hosts, host: str, *words: str) -> None:
    done = hosts.run(host, ["tc", *words])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_all_pairs_are_measured(four: Hosts, transport: str) -> None:
    done = check(four, "--transport", transport)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "dynamo_mpi: rank 0 on h1: kv check: 4 pairs, slowest " in done.stderr
    assert f"over {transport} (tcp/eth0)" in done.stderr


@pytest.mark.skipif(nixl_installed(), reason="NIXL is installed")
def test_without_nixl_tcp_is_used_and_reported(four: Hosts) -> None:
    done = check(four, prefill=["h1"], decode=["h2"])
    assert done.returncode == 0, done.stderr
    assert "info T5: checked over TCP, which says little about NIXL: not installed on h1, h2" in done.stderr
    refused = check(four, "--transport", "nixl", prefill=["h1"], decode=["h2"])
    assert (refused.returncode, "NIXL is not installed on h1, h2" in refused.stderr) == (64, True)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_slow_host_is_named_with_both_rates(four: Hosts, transport: str) -> None:
    with slow(four, "h2"):
        done = check(four, "--transport", transport)
    assert done.returncode == 75, done.stderr
    assert "error T3: KV is too slow between 2 pairs of hosts: what they have in common is h2" in done.stderr
    pair = rf"decode host h3 <- prefill host h2 over {transport} \(tcp/eth0\): (.*) MB/s, expected at least (.*) .B/s"
    assert (found := re.search(pair, done.stderr)), done.stderr
    assert float(found[1]) < 12


def test_a_rate_that_is_expected_needs_no_other_pair(four: Hosts) -> None:
    done = check(four, "--min-rate", "1000", prefill=["h1"], decode=["h2"])
    assert (done.returncode, "B/s, expected at least 1000.0 GB/s" in done.stderr) == (75, True), done.stderr


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_cut_pair_is_named_and_costs_no_other(four: Hosts, transport: str) -> None:
    with cut(four, "h2", "h3"):
        began = time.monotonic()
        done = check(four, "--transport", transport)
    assert time.monotonic() - began < 60
    assert done.returncode == 75, done.stderr
    assert "error T2: no KV comes through between 1 pair of hosts of 4\n" in done.stderr
    assert re.search(f"h3 <- prefill host h2 over {transport}.*: not done in [4-9] s", done.stderr), done.stderr


def test_a_host_that_rank_0_cannot_reach_is_named(four: Hosts) -> None:
    with cut(four, "h2", "h3"):
        done = check(four, prefill=["h2"], decode=["h3"])
    assert done.returncode == 75, done.stderr
    assert "h3 <- prefill host h2 over tcp: h3 sends nothing to rank 0 on h2" in done.stderr


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_wrong_byte_is_found(four: Hosts, transport: str) -> None:
    fault = {"DYN_MPI_FAULT": "rank1:hardware_check:corrupt", "DYN_MPI_ALLOW_FAULTS": "1"}
    done = check(four, "--transport", transport, **fault)
    assert done.returncode == 75, done.stderr
    assert "error T1: wrong bytes arrive between 2 pairs of hosts: what they have in common is h2" in done.stderr


def test_ranks_on_other_hosts_than_named_are_refused(four: Hosts) -> None:
    done = check(four, ranks_on=["h1", "h2", "h3"])
    assert (done.returncode, "expected: one rank on each of h1, h2, h3, h4" in done.stderr) == (64, True), done.stderr
    done = check(four, prefill=["h1"], decode=["h2"], ranks_on=["h1", "h3"])
    assert (done.returncode, "h3: this host is none of h1, h2" in done.stderr) == (64, True), done.stderr


def test_launch_by_mpirun_runs_it_before_anything_else(four: Hosts, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("h1\nh2\n")
    mpirun = shlex.join([find_mpirun(), "--prtemca", "plm_ssh_agent", str(four.agent)])
    engines = [word for role in ("prefill", "decode") for word in (f"--{role}-engine-config", "engine.yaml")]
    words = ("launch", "--hostfile", tmp_path / "hosts", "--run-dir", tmp_path / "run", "--mpirun", mpirun, *engines)
    more = ("--model", "m", "--skip-check", "--gpus-per-node", "1")
    own = {**OUR_MODULES, "OMPI_MCA_btl_tcp_if_exclude": "lo,net9", "DYN_MPI_KV_MIN_RATE": "1000"}
    program = (sys.executable, "-m", "dynamo_mpi", *words, *more)
    done = four.run("h1", [str(word) for word in program], {**mpi_environment(), **own}, timeout=60)
    assert done.returncode == 75, done.stderr
    assert (
        "dynamo-mpi launch: the KV check refused the deployment with exit code 75; no worker was started" in done.stderr
    )
    assert "decode host h2 <- prefill host h1 over " in done.stderr
    assert {path.name for path in (tmp_path / "run" / "logs").iterdir()} == {"kv-check.log"}
