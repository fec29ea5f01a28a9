# SPDX-License-Identifier: Apache-2.0
"""Classifies errors of the Dynamo runtime by their text: it has no finer exception types. Pure."""

from __future__ import annotations

from dynamo_mpi.common.errors import AuthorizationError, DiscoveryError, DynamoMpiError, UsageError


def runtime_error(error: BaseException) -> DynamoMpiError:
    """Return the `DynamoMpiError` for an error of the runtime."""
    text = " ".join(str(error).split())
    if "environment variable" in text:
        return UsageError(f"the Dynamo runtime can't read its environment: {text}", fix="correct that DYN_* variable")
    if "address already in use" in text.lower():
        return UsageError(
            f"the Dynamo runtime can't bind its port: {text}",
            expected="a free port on this node",
            fix="free it, or choose another (DYN_TCP_RPC_PORT, DYN_SYSTEM_PORT)",
        )
    if any(
        word in text.lower()
        for word in (
            "user name is empty",
            "authentication failed",
            "permission denied",
            "invalid auth",
            "authorization violation",
        )
    ):
        return AuthorizationError(
            f"the Dynamo runtime was refused: {text}",
            expected="credentials that etcd (and NATS, if it is used) accept",
            fix="correct ETCD_AUTH_* or NATS_AUTH_*",
        )
    return DiscoveryError(
        f"the Dynamo runtime could not register the worker: {text}",
        expected="etcd (and NATS, if it is used) must answer and accept the credentials",
        fix="check etcd; the runtime uses ETCD_ENDPOINTS and ETCD_AUTH_*",
    )
