# SPDX-License-Identifier: Apache-2.0
"""One visit to etcd, at whichever of its endpoints answers, that takes no longer than it may. For hosts with nothing but Python."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from dynamo_mpi.control_plane.etcd_auth import EtcdAuth
from dynamo_mpi.control_plane.etcd_gateway import EtcdGateway, gateway_error, refused
from dynamo_mpi.control_plane.probe import etcd_endpoints
from dynamo_mpi.errors import AuthorisationError, DiscoveryError
from dynamo_mpi.services.bounded import within

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")


def ask_etcd(environ: Mapping[str, str], seconds: float, question: Callable[[EtcdGateway], T]) -> T:
    """Ask the first endpoint that answers.

    Args:
        environ: where etcd and our credentials stand, as the worker has it.
        seconds: that all of it may take.
        question: asked of a gateway that we are logged in at.

    Raises:
        DiscoveryError: no endpoint has answered in time.
        AuthorisationError: they refuse us.
        UsageError: what is set for etcd can't be used.
    """
    end = time.monotonic() + seconds
    try:
        return within(seconds, lambda: _visit(environ, end, question), "etcd")
    except TimeoutError:
        raise gateway_error("etcd: no answer in time") from None


def _visit(environ: Mapping[str, str], end: float, question: Callable[[EtcdGateway], T]) -> T:
    auth, endpoints = EtcdAuth.of(environ), etcd_endpoints(environ)
    troubles, refusals = [], 0
    for index, endpoint in enumerate(endpoints):
        now = time.monotonic()
        # one that is lost leaves time for the others
        share = (end - now) / (len(endpoints) - index)
        try:
            with EtcdGateway(endpoint, auth, now + share) as gateway:
                gateway.log_in()
                return question(gateway)
        except (DiscoveryError, AuthorisationError) as error:
            troubles.append(error.found)
            refusals += isinstance(error, AuthorisationError)
    found = "; ".join(troubles) or "ETCD_ENDPOINTS names no endpoint"
    raise refused(found) if refusals else gateway_error(found)
