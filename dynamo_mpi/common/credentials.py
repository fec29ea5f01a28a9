# SPDX-License-Identifier: Apache-2.0
"""The secrets of etcd's and NATS's clients, and the file that has them: kept out of this process's environment.

``/proc/PID/environ`` shows the variables that a process was started with, and every child inherits them. So a deployment gives its processes
the path of a file (``DYN_MPI_SERVICES_FILE``), and only those that talk to etcd or NATS read it. Variables that a user has set work too: a
rank takes the secrets out of its environment at its start. Every rank imports this module before the preflight result.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections import ChainMap
from functools import cache

from dynamo_mpi.common.errors import AuthorizationError, UsageError
from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

SERVICES_FILE = "DYN_MPI_SERVICES_FILE"
SECRETS = (
    "ETCD_AUTH_CLIENT_KEY",
    "ETCD_AUTH_PASSWORD",
    "NATS_AUTH_PASSWORD",
    "NATS_AUTH_TOKEN",
    "NATS_AUTH_NKEY",
    # of TensorRT-LLM's session, from rank 0 to dynamo.trtllm
    "TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY",
)
NATS_CA = "NATS_TLS_CA"
"""PEM text, in services files only: the runtime's own variable, ``NATS_TLS_CA_CERT_PATH``, takes a path."""
CLIENT_VARIABLES = (
    *("ETCD_ENDPOINTS", "ETCD_AUTH_CA", "ETCD_AUTH_CLIENT_CERT", "ETCD_AUTH_USERNAME"),
    *("NATS_SERVER", "NATS_AUTH_USERNAME", "NATS_AUTH_CREDENTIALS_FILE"),
    *(NATS_CA, "NATS_TLS_CA_CERT_PATH", "NATS_TLS_CLIENT_CERT_PATH", "NATS_TLS_CLIENT_KEY_PATH", "NATS_TLS_INSECURE"),
    *SECRETS,
)
"""All that a services file may set."""
DESCRIPTORS = "/proc/self/fd/"
_MOST_BYTES = 1 << 20

_held: dict[str, str] = {}
_loaded = ""


def hide_secrets() -> None:
    """Take the secrets out of this process's environment, and out of ``/proc/self/environ``. Call it before any thread is started."""
    for name in SECRETS:
        if value := os.environ.get(name):
            _held[name] = value
            getenv = ctypes.CDLL(None).getenv
            getenv.restype = ctypes.c_void_p
            if place := getenv(name.encode()):
                ctypes.memset(place, 0, len(os.fsencode(value)))
            del os.environ[name]


def held() -> dict[str, str]:
    """Return the secrets that this process holds outside of its environment, by the names of their variables."""
    return dict(_held)


def hold(secrets: Mapping[str, str]) -> None:
    """Hold these secrets instead; none lets go of all."""
    _held.clear()
    _held.update(secrets)


def clients_environ() -> Mapping[str, str]:
    """Return a live view of the environment with the secrets, for clients of etcd and NATS in this process."""
    return ChainMap(_held, os.environ)


def export_secrets() -> None:
    """Set the secrets as variables, right before Dynamo's runtime starts in this process: it reads them nowhere else.

    ``/proc/self/environ`` doesn't show variables that are set after the start.
    """
    os.environ.update(_held)


def load_services() -> None:
    """Read the services file, if the environment names one: its variables replace all of `CLIENT_VARIABLES`. Idempotent.

    Raises:
        UsageError, AuthorizationError: it can't be read, see `read_services_file`.
    """
    global _loaded
    path = os.environ.get(SERVICES_FILE, "")
    if not path or path == _loaded:
        return
    found = read_services_file(path)
    for name in CLIENT_VARIABLES:
        os.environ.pop(name, None)
    hold({name: value for name, value in found.items() if name in SECRETS})
    os.environ.update({name: value for name, value in found.items() if name not in SECRETS})
    _loaded = path


def read_services_file(path: str) -> dict[str, str]:
    """Return the variables of a services file: JSON, ``{"environment": {NAME: VALUE}}`` as in a run folder's ``services.json``.

    Raises:
        UsageError: it can't be read, is no regular file, or makes no sense.
        AuthorizationError: it is another user's, or this user may not read it.
    """
    import json

    try:
        descriptor = _open(path)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            if status.st_uid not in (0, os.geteuid()):
                raise _refused(path, f"belongs to user {status.st_uid}")
            data = file.read(_MOST_BYTES)
        return variables_in(json.loads(data))
    except PermissionError as error:
        raise _refused(path, f"can't be read: {error.strerror}") from None
    except OSError as error:
        raise _unusable(path, f"can't be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise _unusable(path, "is no services file") from None


def variables_in(content: object) -> dict[str, str]:
    """Return the variables in a services file's content, those of `CLIENT_VARIABLES` alone, as `usable` returns them.

    Raises:
        ValueError: it makes no sense.
        OSError: there is no memory for a file.
    """
    environment = content.get("environment") if isinstance(content, dict) else None
    if not isinstance(environment, dict):
        raise ValueError("it has no environment")
    given = {name: environment[name] for name in CLIENT_VARIABLES if name in environment}
    # no C string holds a zero byte
    if not all(isinstance(value, str) and "\0" not in value for value in given.values()):
        raise ValueError("a variable's value is no text")
    return usable({name: value for name, value in given.items() if value})


def usable(given: dict[str, str]) -> dict[str, str]:
    """Return a services file's variables as this process, and Dynamo's runtime in it, can use them: `NATS_CA` as a file in memory, too."""
    if text := given.get(NATS_CA):
        return {**given, "NATS_TLS_CA_CERT_PATH": f"{DESCRIPTORS}{_file_of(text)}"}
    return given


@cache
def _file_of(text: str) -> int:
    """Return the descriptor of a file with this text, open as long as this process runs."""
    return _in_memory(text.encode())


def _open(path: str) -> int:
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        # a network file system caches for some time that a file didn't exist
        os.listdir(os.path.dirname(path) or ".")
        return os.open(path, flags)


def clients_of(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment with the variables of its services file, if it names one, in place of its own. For commands.

    Raises:
        UsageError, AuthorizationError: the file can't be read, see `read_services_file`.
    """
    if not environ.get(SERVICES_FILE):
        return dict(environ)
    others = {name: value for name, value in environ.items() if name not in CLIENT_VARIABLES}
    return others | read_services_file(environ[SERVICES_FILE])


def split_clients(environ: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return an environment without `CLIENT_VARIABLES`, and these."""
    clients = {name: environ[name] for name in CLIENT_VARIABLES if name in environ}
    return {name: value for name, value in environ.items() if name not in clients}, clients


def memory_file(environment: Mapping[str, str]) -> int:
    """Return the descriptor of a services file that exists only in memory, for a child process; its path there is in `DESCRIPTORS`."""
    import json

    return _in_memory(json.dumps({"environment": dict(environment)}).encode())


def _in_memory(data: bytes) -> int:
    descriptor = os.memfd_create("services", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, data)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _refused(path: str, problem: str) -> AuthorizationError:
    return AuthorizationError(
        f"{SERVICES_FILE}={path} {problem}",
        expected="a file of this user's or root's: it holds credentials",
        fix=f"correct {SERVICES_FILE}",
    )


def _unusable(path: str, problem: str) -> UsageError:
    return UsageError(
        f"{SERVICES_FILE}={path} {problem}",
        expected='services.json of a run folder, or JSON like {"environment": {"ETCD_ENDPOINTS": "https://HOST:2379"}}',
        fix=f"correct {SERVICES_FILE}; where the services have ended, start them again",
    )
