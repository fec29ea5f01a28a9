# SPDX-License-Identifier: Apache-2.0
"""Rank 0's request to every rank, and each rank's report: one broadcast, one gather.

Rank 0 sends the *contents* of the files, so that a rank compares bytes instead of hashes, and can report the first difference. This module
runs on every rank before the preflight's result; it imports only modules that are loaded already, unless the request is for facts of hosts.
"""

from __future__ import annotations

import os
from itertools import islice

from dynamo_mpi import __version__
from dynamo_mpi.common.codec import decode_strings, encode_strings
from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple
from dynamo_mpi.common.process import host_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.mpi.launcher import LaunchInfo


class ComparedFile(NamedTuple):
    """A file that must be the same on every rank.

    Args:
        label: its name for the user, e.g. ``"engine config"``.
        path: the path that every rank opens.
        content: its content on rank 0.
    """

    label: str
    path: str
    content: str


class ReportRequest(NamedTuple):
    """Rank 0's request.

    Args:
        argv: rank 0's command line, without the program.
        model_dir: the model folder.
        weights: names of the weight files that rank 0 sees in it, sorted.
        files: files to compare.
        hosts: whether to report facts about the host, which TensorRT-LLM's rules need.
        gpus: whether to report facts about the node's GPUs.
        version: rank 0's dynamo_mpi. The rest of another version's request isn't read: it may have another meaning.
    """

    argv: tuple[str, ...]
    model_dir: str
    weights: tuple[str, ...]
    files: tuple[ComparedFile, ...]
    hosts: bool = False
    gpus: bool = False
    version: str = __version__

    def pack(self) -> bytes:
        """Encode for the broadcast."""
        return encode_strings(
            [
                self.version,
                "hosts" if self.hosts else "",
                "gpus" if self.gpus else "",
                str(len(self.argv)),
                *self.argv,
                self.model_dir,
                str(len(self.weights)),
                *self.weights,
                *(text for file in self.files for text in file),
            ]
        )

    @classmethod
    def unpack(cls, data: bytes) -> ReportRequest:
        """Decode a request."""
        version, *values = decode_strings(data)
        if version != __version__:
            return cls((), "", (), (), version=version)
        hosts, gpus, count, *values = values
        argv, rest = values[: int(count)], values[int(count) :]
        model_dir, end = rest[0], 2 + int(rest[1])
        weights, rest = rest[2:end], rest[end:]
        files = tuple(ComparedFile(*rest[i : i + 3]) for i in range(0, len(rest), 3))
        return cls(tuple(argv), model_dir, tuple(weights), files, bool(hosts), bool(gpus))


class RankReport(NamedTuple):
    """One rank's report.

    Args:
        host: this node's name.
        visible_gpus: ``CUDA_VISIBLE_DEVICES``, empty if it isn't set.
        version: dynamo_mpi's.
        problems: ``label: what is wrong`` for everything that isn't as rank 0 has it.
        host_facts: `HostFacts`, packed; empty if it wasn't asked for.
        gpu_facts: `NodeGpus`, packed; empty if it wasn't asked for.
        networks: `HostNetworks`, packed; of the first rank of each node, where there may be several nodes, else empty.
    """

    host: str
    visible_gpus: str
    version: str
    problems: tuple[str, ...]
    host_facts: tuple[str, ...] = ()
    gpu_facts: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()

    def pack(self) -> bytes:
        """Encode for the gather."""
        parts = (self.problems, self.host_facts, self.gpu_facts, self.networks)
        counts = (str(len(part)) for part in parts[:-1])
        return encode_strings(
            [self.host, self.visible_gpus, self.version, *counts, *(value for part in parts for value in part)]
        )

    @classmethod
    def unpack(cls, data: bytes) -> RankReport:
        """Decode a report; from a report of another version, only the fields that all versions have."""
        host, gpus, version, *values = decode_strings(data)
        if version != __version__:
            return cls(host, gpus, version, ())
        counts, rest = map(int, values[:3]), iter(values[3:])
        problems, host_facts, gpu_facts = (tuple(islice(rest, count)) for count in counts)
        return cls(host, gpus, version, problems, host_facts, gpu_facts, tuple(rest))


def collect_rank_report(
    report_request: ReportRequest, launch: LaunchInfo, argv: Sequence[str], mpi_library: str = ""
) -> RankReport:
    """Answer ``report_request`` for this rank. Never raises: what can't be read becomes a problem.

    Args:
        report_request: rank 0's request.
        launch: how this rank was started.
        argv: its command line, without the program.
        mpi_library: the MPI library's own version text.
    """
    if report_request.version != __version__:
        return RankReport(host_name(), os.environ.get("CUDA_VISIBLE_DEVICES", ""), __version__, ())
    first_of_node = launch.local_rank in (0, None)
    problems: list[str] = []
    if tuple(argv) != report_request.argv:
        problems.append(f"command line: is `{' '.join(argv)}`, on rank 0 `{' '.join(report_request.argv)}`")
    problems += [f"{file.label}: {found}" for file in report_request.files if (found := _compare(file))]
    if report_request.weights and (found := _weights(report_request, each_file=first_of_node)):
        problems.append(f"model: {found}")
    return RankReport(
        host_name(),
        os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        __version__,
        tuple(problems),
        _host_facts(mpi_library, first_of_node) if report_request.hosts else (),
        _gpu_facts() if report_request.gpus else (),
        # not needed if all ranks are on one node
        _networks() if first_of_node and launch.size != 1 and launch.local_size != launch.size else (),
    )


def _host_facts(mpi_library: str, first_of_node: bool) -> tuple[str, ...]:
    from dynamo_mpi.checks.host_facts import collect

    return collect(mpi_library, os.environ, speaks_for_node=first_of_node).pack()


def _networks() -> tuple[str, ...]:
    from dynamo_mpi.common.interfaces import host_networks

    return host_networks().pack()


def _gpu_facts() -> tuple[str, ...]:
    from dynamo_mpi.checks.gpu_facts import read_gpus

    return read_gpus(os.environ).pack()


def _compare(file: ComparedFile) -> str:
    try:
        # no TextIOWrapper: newline translation would hide a difference
        with open(file.path, "rb") as stream:
            mine = stream.read().decode("utf-8", "surrogateescape")
    except (OSError, UnicodeError) as error:
        return f"{file.path} can't be read: {_why(error)}"
    if mine == file.content:
        return ""
    here, there = mine.splitlines(keepends=True), file.content.splitlines(keepends=True)
    for number, (a, b) in enumerate(zip(here, there, strict=False), 1):
        if a != b:
            return f"{file.path} differs, first at line {number}: {_excerpt(a, b)}, on rank 0 {_excerpt(b, a)}"
    return f"{file.path} differs: {len(here)} lines, on rank 0 {len(there)}"


def _why(error: OSError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):  # rank 0's locale knows more characters than this rank's
        return "this rank's locale can't write its name; set the same LC_ALL on all hosts, or PYTHONUTF8=1"
    return error.strerror or str(error)


def _excerpt(line: str, other: str) -> str:
    """Return ``line`` around its first difference from ``other``, with visible blanks and line ends."""
    alike = next((at for at, (a, b) in enumerate(zip(line, other, strict=False)) if a != b), min(len(line), len(other)))
    start = max(0, alike - 30)
    end = start + 60
    return ("..." if start else "") + repr(line[start:end]) + ("..." if end < len(line) else "")


def weight_files(names: Sequence[str]) -> tuple[str, ...]:
    """Return those of a folder's file names that hold weights, sorted."""
    return tuple(sorted(name for name in names if name.endswith((".safetensors", ".gguf", ".bin"))))


def _weights(report_request: ReportRequest, *, each_file: bool) -> str:
    try:
        names = set(weight_files(os.listdir(report_request.model_dir)))
    except (OSError, UnicodeError) as error:
        return f"{report_request.model_dir} can't be read: {_why(error)}"
    if missing := [name for name in report_request.weights if name not in names]:
        return f"{report_request.model_dir} lacks {len(missing)} of {len(report_request.weights)} weight files, first {missing[0]}"
    if each_file:  # once per node: if every rank opened hundreds of shards, a shared file system would be overloaded
        for name in report_request.weights:
            if not os.access(os.path.join(report_request.model_dir, name), os.R_OK):
                return f"{os.path.join(report_request.model_dir, name)} can't be read"
    return ""
