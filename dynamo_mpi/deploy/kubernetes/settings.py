# SPDX-License-Identifier: Apache-2.0
"""The settings of a group of pods: flags over environment over defaults."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.config.options import Option, add_options, resolve, to_count, to_path, to_text, usage_parser
from dynamo_mpi.config.sources import to_seconds

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PROGRAM = "python -m dynamo_mpi.pods"
LEAST_SECRET_BYTES = 16


def _to_port(text: str) -> int:
    if not text.strip().isdecimal() or not 1 <= int(text) <= 65535:
        raise ValueError("a port: 1 to 65535")
    return int(text)


def _to_index(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError("a whole number from 0 on")
    return int(text)


def _to_command(text: str) -> str:
    shlex.split(text)
    return text


_SECRET_FILE = Option(
    "secret_file",
    ("--secret-file",),
    ("DYN_MPI_PODS_SECRET_FILE",),
    None,
    to_path,
    f"file with what only this group's pods know, at least {LEAST_SECRET_BYTES} bytes: a Secret, mounted",
)
_PORT = Option(
    "port", ("--port",), ("DYN_MPI_PODS_PORT",), 7371, _to_port, "at which the leader listens for the others"
)
_TIMEOUT = Option(
    "timeout", ("--timeout",), ("DYN_MPI_PODS_TIMEOUT",), 1800.0, to_seconds, "seconds until all pods have joined"
)
LEAD_OPTIONS: tuple[Option, ...] = (
    Option(
        "pods",
        ("--pods",),
        ("DYN_MPI_PODS", "LWS_GROUP_SIZE"),
        None,
        to_count,
        "pods of the group, this one included; LWS says it",
    ),
    Option("ranks_per_pod", ("--ranks-per-pod",), ("NUM_GPUS_PER_NODE",), 1, to_count, "GPUs, and so ranks, of each"),
    Option(
        "address",
        ("--address",),
        ("DYN_MPI_PODS_ADDRESS",),
        None,
        to_text,
        "at which the leader listens, an interface or a network of it; the address of the pod's own name by default",
    ),
    Option(
        "mpirun", ("--mpirun",), ("DYN_MPI_MPIRUN",), "mpirun", _to_command, "Open MPI's launcher, with further words"
    ),
    _SECRET_FILE,
    _PORT,
    _TIMEOUT,
)
JOIN_OPTIONS: tuple[Option, ...] = (
    Option(
        "leader",
        ("--leader",),
        ("DYN_MPI_PODS_LEADER", "LWS_LEADER_ADDRESS"),
        None,
        to_text,
        "the leader's address or name; LWS says it",
    ),
    Option(
        "index",
        ("--index",),
        ("DYN_MPI_PODS_INDEX", "LWS_WORKER_INDEX"),
        None,
        _to_index,
        "this pod's place, which is that of its ranks; LWS says it, else the number that the pod's name ends with",
    ),
    _SECRET_FILE,
    _PORT,
    _TIMEOUT,
)


@dataclass(frozen=True)
class LeadSettings:
    """The leader's settings; see `LEAD_OPTIONS`. ``command`` is each rank's command."""

    pods: int
    ranks_per_pod: int
    address: str | None
    mpirun: str
    secret: bytes
    port: int
    timeout: float
    command: tuple[str, ...]


@dataclass(frozen=True)
class JoinSettings:
    """Another pod's settings; see `JOIN_OPTIONS`."""

    leader: str
    index: int
    secret: bytes
    port: int
    timeout: float


def build_lead_parser() -> ArgumentParser:
    """Return the parser of ``lead``'s arguments before ``--``."""
    parser = usage_parser(
        prog=f"{PROGRAM} lead",
        usage=f"{PROGRAM} lead [FLAGS] -- COMMAND OF EACH RANK",
        description="Wait for the other pods, then run a command in all ranks of all pods by mpirun. SIGTERM ends it in order.",
        allow_abbrev=False,
    )
    add_options(parser, LEAD_OPTIONS)
    return parser


def build_join_parser() -> ArgumentParser:
    """Return the parser of ``join``'s arguments."""
    parser = usage_parser(
        prog=f"{PROGRAM} join",
        description="Be one of the other pods: run the ranks that the leader's mpirun has for this one, and leave with its exit code.",
        allow_abbrev=False,
    )
    add_options(parser, JOIN_OPTIONS)
    return parser


def load_lead(argv: Sequence[str], environ: Mapping[str, str]) -> LeadSettings:
    """Read the leader's settings.

    Raises:
        UsageError: a setting is invalid or missing.
    """
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    values, _ = resolve(LEAD_OPTIONS, vars(build_lead_parser().parse_args(words[:at])), environ, {})
    if values["pods"] is None:
        raise UsageError(
            "the number of pods wasn't given", expected="how many pods the group has", fix="--pods N, or DYN_MPI_PODS=N"
        )
    if not words[at + 1 :]:
        raise UsageError(
            "no command for the ranks was given",
            expected="what each rank runs, after --",
            fix=f"{PROGRAM} lead … -- python3 -m dynamo_mpi.worker …",
        )
    return LeadSettings(**_with_secret(values), command=tuple(words[at + 1 :]))


def load_join(argv: Sequence[str], environ: Mapping[str, str], host: str) -> JoinSettings:
    """Read another pod's settings.

    Raises:
        UsageError: a setting is invalid or missing.
    """
    values, _ = resolve(JOIN_OPTIONS, vars(build_join_parser().parse_args(list(argv))), environ, {})
    if values["leader"] is None:
        raise UsageError(
            "the leader wasn't given",
            expected="the name of the group's first pod",
            fix="--leader NAME, or DYN_MPI_PODS_LEADER=NAME",
        )
    if values["index"] is None:
        number = host.rpartition("-")[2]
        if not number.isdecimal():
            raise UsageError(
                f"{host} doesn't end with a number, so this pod's place isn't known",
                expected="a name that ends with -N, as LeaderWorkerSet gives",
                fix="--index N",
            )
        values["index"] = int(number)
    return JoinSettings(**_with_secret(values))


def _with_secret(values: dict[str, Any]) -> dict[str, Any]:
    path: Path | None = values.pop("secret_file")
    fix = "mount a Secret in all pods of the group and give --secret-file, or DYN_MPI_PODS_SECRET_FILE"
    if path is None:
        raise UsageError("no secret was given", expected="what only this group's pods know", fix=fix)
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise UsageError(
            f"the secret {path} can't be read: {error.strerror}",
            expected="a file with what only this group's pods know",
            fix=fix,
        ) from None
    if len(secret) < LEAST_SECRET_BYTES:
        raise UsageError(
            f"the secret in {path} has {len(secret)} bytes",
            expected=f"at least {LEAST_SECRET_BYTES}",
            fix="openssl rand -hex 32",
        )
    return {**values, "secret": secret}
