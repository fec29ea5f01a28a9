# SPDX-License-Identifier: Apache-2.0
"""etcd over gRPC, for ranks: the calls are those of ``pyetcd`` (etcd-sdk-python), the connection is made here.

pyetcd's own client leaves an endpoint that failed alone for five minutes, reads certificates from files only, and can't send a password's
token without TLS.
"""

from __future__ import annotations

import ssl
import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dynamo_mpi.common.errors import AuthorizationError, DiscoveryError, DynamoMpiError
from dynamo_mpi.discovery.etcd import (
    DEFAULT_PORT,
    CredentialsError,
    EtcdAuth,
    KeyValue,
    Lease,
    LeaseLostError,
    end_of_prefix,
    etcd_endpoints,
    lease_lost,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# no proxies, which are for the web; this client reconnects itself
_CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
)
_TOKEN_ERRORS = ("invalid auth token", "revision of auth store is old")


class GrpcEtcdClient:
    """An `etcd.EtcdClient` that connects with the first call. Safe to use from several threads.

    Args:
        endpoints: URLs, the preferred one first; if one fails, the next is used.
        auth: our credentials.
        timeout: seconds of each call.
    """

    def __init__(self, endpoints: Sequence[str], auth: EtcdAuth, timeout: float) -> None:
        self._endpoints, self._auth, self._timeout = list(endpoints), auth, timeout
        self._lock = threading.Lock()
        self._channel: Any = None
        self._token: str | None = None

    @classmethod
    def from_env(cls, environ: Mapping[str, str], timeout: float) -> GrpcEtcdClient:
        """Return a client for the endpoints and credentials in the environment.

        Raises:
            UsageError: half of a pair of credentials is missing.
        """
        return cls(etcd_endpoints(environ), EtcdAuth.from_env(environ), timeout)

    def get_prefix(self, prefix: str) -> list[KeyValue]:
        """Return all keys that begin with ``prefix``."""
        from pyetcd import etcdrpc

        request = etcdrpc.RangeRequest(key=prefix.encode(), range_end=end_of_prefix(prefix))
        return [
            KeyValue(entry.key.decode(errors="backslashreplace"), entry.value, entry.create_revision, entry.lease)
            for entry in self._call("KV", "Range", request).kvs
        ]

    def put(self, key: str, value: bytes, lease: int) -> None:
        """Write a key under a lease.

        Raises:
            LeaseLostError: there is no such lease.
        """
        from pyetcd import etcdrpc

        self._call("KV", "Put", etcdrpc.PutRequest(key=key.encode(), value=value, lease=lease))

    def create(self, key: str, value: bytes, lease: int) -> bool:
        """Write a key as `put` does, unless it exists; return whether it was written."""
        from pyetcd import etcdrpc

        put = etcdrpc.PutRequest(key=key.encode(), value=value, lease=lease)
        absent = etcdrpc.Compare(key=key.encode(), target=etcdrpc.Compare.CREATE, create_revision=0)
        request = etcdrpc.TxnRequest(compare=[absent], success=[etcdrpc.RequestOp(request_put=put)])
        return bool(self._call("KV", "Txn", request).succeeded)

    def grant(self, seconds: int) -> Lease:
        """Return a new lease that lives at least ``seconds`` without being kept alive."""
        from pyetcd import etcdrpc

        reply = self._call("Lease", "LeaseGrant", etcdrpc.LeaseGrantRequest(TTL=seconds))
        return Lease(reply.ID, reply.TTL)

    def keep_alive(self, lease: int) -> None:
        """Restart the lease's time.

        Raises:
            LeaseLostError: there is no such lease.
        """
        from pyetcd import etcdrpc

        reply = self._call("Lease", "LeaseKeepAlive", etcdrpc.LeaseKeepAliveRequest(ID=lease))
        if reply is None or reply.TTL <= 0:
            raise lease_lost()

    def lease_ttl(self, lease: int) -> int | None:
        """Return the seconds that a lease lives without being kept alive; None if there is no such lease."""
        from pyetcd import etcdrpc

        reply = self._call("Lease", "LeaseTimeToLive", etcdrpc.LeaseTimeToLiveRequest(ID=lease))
        return int(reply.grantedTTL) if reply.TTL >= 0 else None

    def revoke(self, lease: int, timeout: float | None = None) -> bool:
        """End a lease and delete its keys; return whether it existed.

        Args:
            lease: its id.
            timeout: seconds for this call, if not those of every call.
        """
        from pyetcd import etcdrpc

        try:
            self._call("Lease", "LeaseRevoke", etcdrpc.LeaseRevokeRequest(ID=lease), timeout)
        except LeaseLostError:
            return False
        return True

    @property
    def auth_is_disabled(self) -> bool:
        """Return whether a password is set although etcd has no users."""
        return bool(self._auth.username) and not self._token and self._token is not None

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        with self._lock:
            self._drop()

    def _call(self, service: str, method: str, request: Any, timeout: float | None = None) -> Any:
        """Call the endpoint in use; if it does not answer, the others.

        Raises:
            DiscoveryError: none of them answers in time.
            AuthorizationError: etcd refuses our credentials.
            LeaseLostError: the call names a lease that does not exist.
        """
        import grpc

        end = time.monotonic() + (self._timeout if timeout is None else timeout)
        renewed = False
        tries = len(self._endpoints)
        while True:
            channel = self._connected()
            try:
                metadata = self._metadata(channel, end)
                return _invoke(channel, service, method, request, end, metadata)
            except grpc.RpcError as error:
                if not renewed and _mentions(error, *_TOKEN_ERRORS):
                    # etcd drops tokens after some time, and when its users change
                    renewed, self._token = True, None
                    continue
                tries -= 1
                if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    self._fail_over(channel)
                    if tries > 0 and time.monotonic() < end:
                        continue
                raise _our_error(error, self._auth) from None

    def _connected(self) -> Any:
        with self._lock:
            if self._channel is None:
                self._channel = _open(self._endpoints[0], self._auth)
            return self._channel

    def _metadata(self, channel: Any, end: float) -> tuple[tuple[str, str], ...]:
        if not self._auth.username:
            return ()
        with self._lock:
            if self._token is None:
                self._token = _authenticate(channel, self._auth, end)
            return (("token", self._token),) if self._token else ()

    def _fail_over(self, failed: Any) -> None:
        with self._lock:
            if self._channel is failed:
                self._drop()
                self._endpoints.append(self._endpoints.pop(0))

    def _drop(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel = self._token = None


def missing_client() -> str:
    """Return why pyetcd can't be used on this host; empty if it can."""
    try:
        import pyetcd  # noqa: F401 - whether it can be imported is the question
    except Exception as error:  # an incompatible protobuf raises errors of its own
        return f"etcd-sdk-python can't be used ({' '.join(str(error).split())}); pip install 'etcd-sdk-python' 'protobuf>=5'"
    return ""


def _open(endpoint: str, auth: EtcdAuth) -> Any:
    import grpc

    parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
    host = parts.hostname or ""
    target = f"{f'[{host}]' if ':' in host else host}:{parts.port or DEFAULT_PORT}"
    if parts.scheme != "https":
        return grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)
    pem = [text.encode() or None for text in (auth.authority or _system_authorities(), auth.key, auth.certificate)]
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(*pem), options=_CHANNEL_OPTIONS)


def _system_authorities() -> str:
    """Return the system's authorities: gRPC has its own list, which may lack those of a site."""
    return "".join(map(ssl.DER_cert_to_PEM_cert, ssl.create_default_context().get_ca_certs(binary_form=True)))


def _invoke(
    channel: Any, service: str, method: str, request: Any, end: float, metadata: tuple[tuple[str, str], ...] = ()
) -> Any:
    from pyetcd import etcdrpc

    call = getattr(getattr(etcdrpc, f"{service}Stub")(channel), method)
    seconds = max(0.0, end - time.monotonic())
    if method == "LeaseKeepAlive":  # a stream in both directions
        return next(call(iter([request]), timeout=seconds, metadata=metadata), None)
    return call(request, timeout=seconds, metadata=metadata)


def _authenticate(channel: Any, auth: EtcdAuth, end: float) -> str:
    """Return a token; an empty one if etcd has no users."""
    import grpc
    from pyetcd import etcdrpc

    request = etcdrpc.AuthenticateRequest(name=auth.username, password=auth.password)
    try:
        return str(_invoke(channel, "Auth", "Authenticate", request, end).token)
    except grpc.RpcError as error:
        if _mentions(error, "authentication is not enabled"):
            return ""
        raise


def _mentions(error: Any, *texts: str) -> bool:
    return any(text in (error.details() or "") for text in texts)


def _our_error(error: Any, auth: EtcdAuth) -> DynamoMpiError:
    import grpc

    text = " ".join((error.details() or error.code().name).split())
    if "lease not found" in text:
        return lease_lost()
    if _mentions(error, "authentication failed", "invalid user ID"):
        return CredentialsError(
            f"etcd refuses user {auth.username}: {text}",
            expected="a user of etcd and the right password",
            fix="correct ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD",
        )
    codes = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
    if error.code() in codes or _mentions(error, "user name is empty"):
        return AuthorizationError(
            f"etcd refuses us: {text}",
            expected=f"a user with the right to read and write under v1/ and dynamo_mpi/; {_who(auth)}",
            fix="etcdctl role grant-permission ROLE --prefix=true readwrite dynamo_mpi/, also for v1/; or correct ETCD_AUTH_*",
        )
    return DiscoveryError(
        f"etcd does not answer: {text}",
        expected="an etcd that answers",
        fix="look at etcd; ETCD_ENDPOINTS says where it is",
    )


def _who(auth: EtcdAuth) -> str:
    if auth.username:
        return f"this worker is {auth.username}"
    return "this worker is the one that its certificate names" if auth.certificate else "this worker names no user"
