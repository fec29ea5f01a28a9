# SPDX-License-Identifier: Apache-2.0
"""Where a deployment is: its run folder's word on etcd, the frontend and its workers, or else what the environment says, as for a worker."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_mpi.errors import AuthorisationError, UsageError
from dynamo_mpi.operating.untrusted import Fields, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

_OURS = ("ETCD_ENDPOINTS", "ETCD_AUTH_", "NATS_SERVER", "NATS_AUTH_")
_SAY_WHERE = ("ETCD_ENDPOINTS", "HEAD_NODE", "HEAD_NODE_IP")


@dataclass(frozen=True)
class Expected:
    """One worker that `dynamo-mpi launch` has started, or will.

    Args:
        name: such as ``prefill-0``.
        role: its role.
        nodes: where.
        ranks: how many.
        launch: what its world record calls its launch.
    """

    name: str
    role: str
    nodes: tuple[str, ...]
    ranks: int
    launch: str


@dataclass(frozen=True)
class Deployment:
    """What ``deployment.json`` says, as long as it runs.

    Args:
        workers: all of them.
        job: Slurm's; empty outside it.
        host: where the launcher is.
        pid: its process.
    """

    workers: tuple[Expected, ...]
    job: str
    host: str
    pid: int


@dataclass(frozen=True)
class Ended:
    """How the last deployment of a folder has ended.

    Args:
        exit_code: the launcher's.
        report: why.
        time: when, in seconds since 1970.
    """

    exit_code: int
    report: str
    time: float


@dataclass(frozen=True, repr=False)
class Place:
    """What is known before etcd is asked.

    Args:
        run_dir: the folder; None where there is none.
        environ: where etcd and our credentials stand; None where the folder's services aren't up.
        frontend: its URL; empty where it isn't known.
        deployment: of `launch`, while it runs.
        ended: of `launch`, when it has ended and nothing runs there since.
    """

    run_dir: Path | None
    environ: Mapping[str, str] | None
    frontend: str = ""
    deployment: Deployment | None = None
    ended: Ended | None = None

    @property
    def has_services(self) -> bool:
        """Does a run folder say which services there are?"""
        return self.run_dir is not None and self.environ is not None

    @property
    def is_orphaned(self) -> bool:
        """Was the launcher killed? From another host than its own that can't be seen, and counts as no."""
        launcher = self.deployment
        if self.run_dir is None or launcher is None or launcher.host != os.uname().nodename:
            return False
        # the process first: whoever tries the lock of one that lives could be in the way of one that begins
        return not os.path.exists(f"/proc/{launcher.pid}") and _is_free(self.run_dir / "lock")


def find_run_dir(environ: Mapping[str, str]) -> Path | None:
    """Return the folder that `launch` takes in this job, or else the only one here in which a deployment runs.

    Raises:
        UsageError: there are several.
    """
    if job := environ.get("SLURM_JOB_ID"):
        return Path(f"dynamo_mpi-{job}")
    found = sorted(path.parent for path in Path().glob("dynamo_mpi-*/deployment.json"))
    if len(found) > 1:
        raise UsageError(
            f"{len(found)} deployments run in folders of {Path.cwd()}: {', '.join(path.name for path in found)}",
            needed="one of them",
            fix="--run-dir DIR",
        )
    return found[0] if found else None


def locate(run_dir: Path | None, environ: Mapping[str, str]) -> Place:
    """Find out where the deployment is. Files that aren't there yet are no error.

    Args:
        run_dir: the folder that was named.
        environ: this process's.

    Raises:
        UsageError: several deployments could be meant.
        AuthorisationError: the folder is another user's.
    """
    if run_dir is None:
        if any(environ.get(name) for name in _SAY_WHERE) and not environ.get("SLURM_JOB_ID"):
            return Place(None, environ)
        found = find_run_dir(environ)
        if found is None or not found.is_dir():
            return Place(None, environ)
        run_dir = found
    run_dir = Path(os.path.abspath(run_dir))
    services = read_object(run_dir / "services.json")
    variables = services.get("environment")
    found_environ = None
    if isinstance(variables, dict):
        own = {name: value for name, value in environ.items() if not name.startswith(_OURS)}
        found_environ = own | {str(name): str(value) for name, value in variables.items()}
    deployment = _deployment(read_object(run_dir / "deployment.json"))
    # services that somebody has started there later are another deployment's
    is_over = deployment is None and found_environ is None
    ended = _ended(read_object(run_dir / "ended.json")) if is_over else None
    return Place(run_dir, found_environ, str(services.get("url") or ""), deployment, ended)


def read_object(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing where it isn't there, or no object.

    Raises:
        AuthorisationError: we may not read it.
    """
    try:
        # listed, and not asked for by its name: a network file system remembers for a while that something wasn't there
        if path.name not in os.listdir(path.parent):
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError:
        raise AuthorisationError(
            f"{path} can't be read", needed="a run folder of this user's", fix="ask whoever launched it"
        ) from None
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_free(lock: Path) -> bool:
    """Does nobody hold it? Its holder may be in a container, and its process be called otherwise here."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _deployment(content: dict[str, Any]) -> Deployment | None:
    if not content:
        return None
    workers = content.get("workers")
    return Deployment(
        tuple(_expected(worker) for worker in _list(workers) if isinstance(worker, dict)),
        str(content.get("job_id") or ""),
        str(content.get("host") or ""),
        _int(content.get("pid")),
    )


def _expected(content: dict[str, Any]) -> Expected:
    return Expected(
        shown(str(content.get("name"))),
        shown(str(content.get("role"))),
        tuple(shown(str(node)) for node in _list(content.get("nodes"))),
        _int(content.get("ranks")),
        str(content.get("launch") or content.get("step")),
    )


def _ended(content: dict[str, Any]) -> Ended | None:
    at, code = Fields(content).number("time"), _int(content.get("exit_code"))
    if at is None:
        return None
    # what a process can't end with would wrap around, to 0 even
    return Ended(code if 0 <= code < 256 else 1, str(content.get("report") or ""), at)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _int(value: object) -> int:
    return value if isinstance(value, int) else 0
