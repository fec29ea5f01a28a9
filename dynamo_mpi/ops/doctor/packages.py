# SPDX-License-Identifier: Apache-2.0
"""Doctor's checks of Python and of the packages for workers. Nothing is imported: importing TensorRT-LLM is a collective (K1)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import dynamo_mpi
from dynamo_mpi.checks.host_facts import UNKNOWN_VERSION, version_of
from dynamo_mpi.ops.doctor.check import Check, Context, Probe, Section, error, error_or_warning, ok, skipped, warning

if TYPE_CHECKING:
    from collections.abc import Iterator


OLDEST_PYTHON = (3, 10)


class Package(NamedTuple):
    """A required or optional distribution.

    Args:
        name: the distribution's name.
        module: the module that it provides.
        use: which process needs it, and for what.
        oldest: the oldest usable version; empty for any.
        every_rank: whether no rank starts without it.
    """

    name: str
    module: str
    use: str
    oldest: str = ""
    every_rank: bool = False


PACKAGES = (
    Package("mpi4py", "mpi4py", "every rank: MPI", "3.1.4", every_rank=True),
    Package("ai-dynamo-runtime", "dynamo", "rank 0, or its dynamo.trtllm: registering and serving", "1.4"),
    Package("ai-dynamo", "dynamo", "the frontend; with --engine trtllm rank 0's dynamo.trtllm", "1.4"),
    Package("tensorrt_llm", "tensorrt_llm", "--engine trtllm", "1.0"),
    Package("nvidia-ml-py", "pynvml", "--engine trtllm: the check of the GPUs before the load", "12"),
    Package("etcd-sdk-python", "pyetcd", "rank 0: the worker record in etcd", "0.0.7"),
    Package("grpcio", "grpc", "etcd-sdk-python", "1.49"),
    Package("protobuf", "google.protobuf", "etcd-sdk-python", "5"),
    Package("nats-py", "nats", "rank 0: events over NATS", "2.6"),
    Package("pyyaml", "yaml", "rank 0, check and plan: engine configs", "6"),
    Package("numpy", "numpy", "--engine reference", "1.26"),
)


def check_python(context: Context) -> Iterator[Check]:
    """Check this interpreter."""
    version, needed = sys.version_info[:3], ".".join(map(str, OLDEST_PYTHON))
    found = f"{'.'.join(map(str, version))} ({sys.executable})"
    if version < OLDEST_PYTHON:
        yield error("python", found, f"Python {needed} or newer", "PYTHON=/path/to/python3 names another")
    else:
        yield ok("python", found)


def check_own(context: Context) -> Iterator[Check]:
    """Report which dynamo_mpi is used: a checkout on PYTHONPATH may hide the installed one."""
    yield ok("dynamo_mpi", f"{dynamo_mpi.__version__} ({Path(dynamo_mpi.__file__).parent})")


def check_packages(context: Context) -> Iterator[Check]:
    """Check each package."""
    found = {package.name: version_of(package.name, package.module) for package in PACKAGES}
    for package in PACKAGES:
        yield judge(package, found[package.name], in_rank=context.in_rank)
    yield from judge_dynamo(found["ai-dynamo"], found["ai-dynamo-runtime"])


def judge(package: Package, version: str | None, *, in_rank: bool) -> Check:
    """Evaluate one package.

    Args:
        package: the package.
        version: the installed version; None if it isn't installed.
        in_rank: whether ranks run here.
    """
    if version is None:
        if package.every_rank and in_rank:
            return error(package.name, "not installed", f"{package.name}, for {package.use}", _install(package))
        return skipped(package.name, f"not installed; for {package.use}", _install(package))
    if package.oldest and version != UNKNOWN_VERSION and parts(version) < parts(package.oldest):
        return error_or_warning(
            package.name,
            f"{version}; for {package.use}",
            f"{package.oldest} or newer",
            _install(package),
            fatal=package.every_rank and in_rank,
        )
    return ok(package.name, f"{version}; for {package.use}")


def judge_dynamo(package: str | None, runtime: str | None) -> Iterator[Check]:
    """ai-dynamo and its runtime are released together."""
    known = package and runtime and UNKNOWN_VERSION not in (package, runtime)
    if known and package is not None and runtime is not None and parts(package)[:2] != parts(runtime)[:2]:
        yield warning(
            "ai-dynamo-pair",
            f"ai-dynamo {package} over ai-dynamo-runtime {runtime}",
            "one release of both",
            f"pip install 'ai-dynamo-runtime=={package}'",
        )


def parts(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with: ``1.4.0rc1`` is (1, 4, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def _install(package: Package) -> str:
    if package.name == "tensorrt_llm":
        return "run inside Dynamo's TensorRT-LLM container"
    return f"pip install '{package.name}>={package.oldest}', or run inside Dynamo's container, which has it"


SECTION = Section(
    "python",
    (Probe("python", check_python), Probe("dynamo_mpi", check_own), Probe("packages", check_packages)),
)
