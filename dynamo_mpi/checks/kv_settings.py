# SPDX-License-Identifier: Apache-2.0
"""The settings of the KV check, and which of the named hosts this one is."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.checks.kv_pull import NIXL, TCP
from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.ports import is_free
from dynamo_mpi.common.process import host_name
from dynamo_mpi.config.options import usage_parser
from dynamo_mpi.layout.format import listed

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Mapping, Sequence

_DESCRIPTION = "The KV check: before any worker starts, each decode host pulls a checked pattern from each prefill host; then it ends."
_VARIABLES = {
    "--transport": "DYN_MPI_KV_CHECK_TRANSPORT",
    "--kv-network": "DYN_MPI_KV_NETWORK",
    "--seconds": "DYN_MPI_KV_CHECK_SECONDS",
    "--min-rate": "DYN_MPI_KV_MIN_RATE",
}


class KvCheckSettings(NamedTuple):
    """Settings of the check; ``min_rate`` in GB/s."""

    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    transport: str
    kv_network: str | None
    seconds: float
    min_rate: float


def build_parser() -> ArgumentParser:
    """Return the parser of the check's command line."""
    parser = usage_parser(prog="python -m dynamo_mpi.checks.kv", description=_DESCRIPTION)
    add = parser.add_argument
    add("--prefill", type=_hosts, required=True, help="hosts of prefill workers, separated by commas")
    add("--decode", type=_hosts, required=True, help="hosts of decode workers, separated by commas")
    add("--transport", choices=("auto", NIXL, TCP), default="auto", help="auto: NIXL if all hosts have it, else TCP")
    add("--kv-network", help="interface, network or address at which prefill hosts listen, for TCP")
    add("--seconds", type=float, default=30.0, help="for all pairs; those left over are reported, and pass (30)")
    add("--min-rate", type=float, default=0.0, help="GB/s that each pair must reach; pairs are compared in any case")
    parser.epilog = f"Environment: {', '.join(f'{name} for {flag}' for flag, name in _VARIABLES.items())}"
    return parser


def read_settings(argv: Sequence[str], environ: Mapping[str, str]) -> KvCheckSettings:
    """Read the command line and the environment; raises UsageError."""
    words = [f"{flag}={environ[name]}" for flag, name in _VARIABLES.items() if environ.get(name)]
    parser = build_parser()
    settings = KvCheckSettings(**vars(parser.parse_args([*words, *argv])))
    if set(settings.prefill) & set(settings.decode):
        parser.error("a host is named both with --prefill and with --decode")
    return settings


def _hosts(text: str) -> tuple[str, ...]:
    hosts = tuple(text.split(","))
    if not all(hosts) or len(set(hosts)) < len(hosts):
        raise ValueError
    return hosts


def find_host(hosts: Sequence[str], environ: Mapping[str, str]) -> str:
    """Return which of the hosts this one is: by Slurm's name of it, its own, or an address. UsageError for none of them, or several."""
    own = {environ.get("SLURMD_NODENAME"), os.uname().nodename, host_name()}
    found = [host for host in hosts if host in own] or [host for host in hosts if _is_here(host)]
    if len(found) != 1:
        raise UsageError(
            f"this host is {listed(found) or 'none'} of {listed(hosts)}",
            expected="each host by one name, as Slurm or the hostfile has it, and one rank on each",
            fix="correct --prefill and --decode; srun --ntasks-per-node=1, or mpirun --map-by ppr:1:node",
        )
    return found[0]


def _is_here(host: str) -> bool:
    try:
        return any(is_free(0, str(place[0])) for *_, place in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError):
        return False
