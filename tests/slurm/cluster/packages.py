# SPDX-License-Identifier: Apache-2.0
"""Debian packages that the cluster consists of, installed on demand and without starting any daemon."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.namespaces.errors import ClusterError

SLURM_PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
BUILD_PACKAGES = ("gcc", "libc6-dev", "libslurm-dev")
NETWORK_PACKAGES = ("iproute2",)
MPI_PACKAGES = ("openmpi-bin",)
ALL_PACKAGES = SLURM_PACKAGES + BUILD_PACKAGES + NETWORK_PACKAGES + MPI_PACKAGES
POLICY = Path("/usr/sbin/policy-rc.d")
DPKG_FOLDER = Path("/var/lib/dpkg")


def why_not_installable() -> str | None:
    """Return the reason why this system's packages are not ours to install, or None."""
    missing = [tool for tool in ("apt-get", "dpkg-query") if shutil.which(tool) is None]
    return f"not a Debian-like system (no {' nor '.join(missing)})" if missing else None


def missing_packages(wanted: Sequence[str] = ALL_PACKAGES) -> list[str]:
    """Packages of ``wanted`` that are not installed, in its order."""
    done = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Package} ${Status}\n", *wanted], capture_output=True, text=True
    )
    installed = {line.split()[0] for line in done.stdout.splitlines() if line.endswith(" install ok installed")}
    return [package for package in wanted if package not in installed]


@contextmanager
def no_daemon_starts() -> Iterator[None]:
    """Forbid maintainer scripts to start services (Debian policy 9.3.3), which without systemd they would do by init script."""
    if POLICY.exists():
        yield  # a container image that decided already
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Keep clusters that are built at the same moment from installing, and from removing the policy, under each other."""
    folder = os.open(DPKG_FOLDER, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def apt_get(*arguments: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    command = ["apt-get", "-o", "DPkg::Lock::Timeout=60", "--yes", "--no-install-recommends", *arguments]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
    )


def install(wanted: Sequence[str] = ALL_PACKAGES) -> list[str]:
    """Install what is missing; return its names.

    Raises:
        ClusterError: apt-get failed; its last lines.
    """
    if not missing_packages(wanted):
        return []
    with one_at_a_time(), no_daemon_starts():
        missing = missing_packages(wanted)
        if missing and apt_get("install", *missing).returncode:
            # package lists may be absent (fresh container) or out of date
            update = apt_get("update")
            done = apt_get("install", *missing)
            if done.returncode:
                last_lines = "\n".join((update.stderr + done.stderr).splitlines()[-5:])
                raise ClusterError(f"cannot install {' '.join(missing)}:\n{last_lines}")
    return missing
