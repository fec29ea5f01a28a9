# SPDX-License-Identifier: Apache-2.0
"""The services of the stack: each one's command line, environment and readiness probe.

Nothing is started here. A probe asks the service itself, once, and answers within a second.
"""

from __future__ import annotations

import http.client
import json
import site
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dynamo_mpi.local.ports import LOOPBACK

RequestPlane = Literal["tcp", "nats"]
NAMESPACE = "local"
PROBE_SECONDS = 1.0

# What belongs to another deployment, or to the launcher this command itself runs under, must not leak into the stack.
_FOREIGN = ("ETCD_", "NATS_", "DYN_", "SLURM", "PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDI_", "HYDRA_")
_KEPT = ("DYN_LOG", "DYN_MPI_", "OMPI_MCA_", "PMIX_MCA_", "PRTE_MCA_")


@dataclass(frozen=True)
class Etcd:
    """Discovery. Its data is worth nothing after the run, so it skips fsync."""

    binary: Path
    port: int
    data: Path
    name: str = "etcd"

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def command(self) -> tuple[str, ...]:
        # Port 0: nobody joins a cluster of one, so its peer port may be any.
        peer = f"http://{LOOPBACK}:0"
        return (
            *(str(self.binary), "--data-dir", str(self.data), "--log-level", "warn", "--unsafe-no-fsync"),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"default={peer}"),
            *("--heartbeat-interval", "20", "--election-timeout", "100"),  # it elects itself: no second to wait
        )

    def environment(self) -> dict[str, str]:
        return {}

    def answers(self) -> bool:
        status, body = get_json(self.port, "/health")
        return status == 200 and str(body.get("health")) == "true"


@dataclass(frozen=True)
class Nats:
    """Events, and requests with ``--request-plane nats``."""

    binary: Path
    port: int
    data: Path
    name: str = "nats"

    @property
    def url(self) -> str:
        return f"nats://{LOOPBACK}:{self.port}"

    def command(self) -> tuple[str, ...]:
        return (str(self.binary), "-a", LOOPBACK, "-p", str(self.port), "-js", "-sd", str(self.data))

    def environment(self) -> dict[str, str]:
        return {}

    def answers(self) -> bool:
        try:
            with socket.create_connection((LOOPBACK, self.port), timeout=PROBE_SECONDS) as connection:
                return connection.recv(5) == b"INFO "
        except OSError:
            return False


@dataclass(frozen=True)
class Frontend:
    """Dynamo's OpenAI-compatible HTTP server.

    It copies every model's tokenizer to ``~/.cache/dynamo``; ``home`` is where that goes, None the user's own.
    """

    port: int
    discovery: Mapping[str, str]
    home: Path | None = None
    name: str = "frontend"

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def command(self) -> tuple[str, ...]:
        return (sys.executable, "-m", "dynamo.frontend", "--http-host", LOOPBACK, "--http-port", str(self.port))

    def environment(self) -> dict[str, str]:
        if self.home is None:
            return dict(self.discovery)
        # Packages installed with pip's --user are found by way of HOME as well.
        return {**self.discovery, "HOME": str(self.home), "PYTHONUSERBASE": site.getuserbase()}

    def answers(self) -> bool:
        return get_json(self.port, "/live")[0] == 200

    def models(self) -> list[str]:
        """Return the names of the models it serves now."""
        status, body = get_json(self.port, "/v1/models")
        return [str(entry.get("id")) for entry in body.get("data") or []] if status == 200 else []


def discovery_environment(etcd: Etcd, nats: Nats, request_plane: RequestPlane) -> dict[str, str]:
    """Return how frontend and worker find each other.

    ``NATS_SERVER`` is set for the nats plane only: Dynamo's runtime connects wherever it is set, needed or not.
    """
    variables = {"ETCD_ENDPOINTS": etcd.url, "DYN_NAMESPACE": NAMESPACE, "DYN_REQUEST_PLANE": request_plane}
    return variables | ({"NATS_SERVER": nats.url} if request_plane == "nats" else {})


def base_environment(own: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """Return the environment every part starts from: ours, less what belongs to another deployment.

    Args:
        own: this process's environment.
        scratch: folder for temporary files, removed with the run's folder.
    """
    variables = {name: value for name, value in own.items() if not name.startswith(_FOREIGN) or name.startswith(_KEPT)}
    variables.setdefault("DYN_LOG", "warn")
    variables["DYN_SDK_DISABLE_ANSI_LOGGING"] = "1"
    variables["TMPDIR"] = str(scratch)
    for name in ("no_proxy", "NO_PROXY"):  # gRPC would take a proxy even to loopback
        variables[name] = ",".join(filter(None, (variables.get(name), LOOPBACK, "localhost")))
    return variables


def get_json(port: int, path: str) -> tuple[int, dict[str, Any]]:
    """GET from a service on loopback; status 0 when it doesn't answer."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=PROBE_SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = json.loads(response.read() or b"{}")
        return response.status, body if isinstance(body, dict) else {}
    except (OSError, http.client.HTTPException, ValueError):
        return 0, {}
    finally:
        connection.close()
