# SPDX-License-Identifier: Apache-2.0
"""The few things that rank 0 asks of etcd, each with a deadline and an error of ours.

The calls are those of ``pyetcd`` (etcd-sdk-python); the connection is made here. Its client leaves an endpoint that failed alone for five
minutes, reads certificates from files only, and can't send a password's token where there is no TLS.
"""

from __future__ import annotations

import ssl
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from dynamo_mpi.control_plane.etcd_auth import EtcdAuth
from dynamo_mpi.errors import AuthorisationError, BootstrapError, DiscoveryError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# proxies are for the web; a lost connection is built anew by us
_CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
)
_TOKEN_ERRORS = ("invalid auth token", "revision of auth store is old")


class Entry(NamedTuple):
    """One key with its value.

    Args:
        key: its name.
        value: what stands there.
        create_revision: grows with every write to etcd, so of two keys the older has the smaller one.
        lease: ends with it; 0 for none.
    """

    key: str
    value: bytes
    create_revision: int
    lease: int


class Lease(NamedTuple):
    """A lease, and the seconds that it lives without being kept alive."""

    id: int
    seconds: int


class LeaseLostError(DiscoveryError):
    """The lease is no longer there, and neither is what was under it."""


class CredentialsError(AuthorisationError):
    """etcd does not know such a user with such a password."""


class Etcd:
    """A connection to etcd, made with the first call. Safe to use from several threads.

    Args:
        endpoints: URLs, the one to begin with first; one that fails is followed by the next.
        auth: who we are.
        timeout: seconds of each call.
    """

    def __init__(self, endpoints: Sequence[str], auth: EtcdAuth, timeout: float) -> None:
        self._endpoints, self._auth, self._timeout = list(endpoints), auth, timeout
        self._lock = threading.Lock()
        self._channel: Any = None
        self._token: str | None = None

    def entries(self, prefix: str) -> list[Entry]:
        """Return what stands under ``prefix``."""
        from pyetcd import etcdrpc

        start = prefix.encode()
        request = etcdrpc.RangeRequest(key=start, range_end=start[:-1] + bytes([start[-1] + 1]))
        reply = self._call(lambda channel: etcdrpc.KVStub(channel).Range, request)
        return [
            Entry(entry.key.decode(errors="replace"), entry.value, entry.create_revision, entry.lease)
            for entry in reply.kvs
        ]

    def put(self, key: str, value: bytes, lease: int) -> None:
        """Write ``value``, which goes when the lease ends.

        Raises:
            LeaseLostError: there is no such lease.
        """
        from pyetcd import etcdrpc

        request = etcdrpc.PutRequest(key=key.encode(), value=value, lease=lease)
        self._call(lambda channel: etcdrpc.KVStub(channel).Put, request)

    def create(self, key: str, value: bytes, lease: int) -> bool:
        """Write ``value`` as `put` does, unless something stands there; tell whether it was written.

        Raises:
            LeaseLostError: there is no such lease.
        """
        from pyetcd import etcdrpc

        put = etcdrpc.PutRequest(key=key.encode(), value=value, lease=lease)
        absent = etcdrpc.Compare(key=key.encode(), target=etcdrpc.Compare.CREATE, create_revision=0)
        request = etcdrpc.TxnRequest(compare=[absent], success=[etcdrpc.RequestOp(request_put=put)])
        reply = self._call(lambda channel: etcdrpc.KVStub(channel).Txn, request)
        return bool(reply.succeeded)

    def grant(self, seconds: int) -> Lease:
        """Get a lease that lives at least ``seconds`` without being kept alive."""
        from pyetcd import etcdrpc

        reply = self._call(
            lambda channel: etcdrpc.LeaseStub(channel).LeaseGrant, etcdrpc.LeaseGrantRequest(TTL=seconds)
        )
        return Lease(reply.ID, reply.TTL)

    def keep_alive(self, lease: int) -> None:
        """Begin the lease's time anew.

        Raises:
            LeaseLostError: there is no such lease.
        """
        from pyetcd import etcdrpc

        request = etcdrpc.LeaseKeepAliveRequest(ID=lease)

        def ask(channel: Any) -> Callable[..., Any]:
            def once(_: Any, **options: Any) -> Any:
                return next(etcdrpc.LeaseStub(channel).LeaseKeepAlive(iter([request]), **options), None)

            return once

        reply = self._call(ask, request)
        if reply is None or reply.TTL <= 0:
            raise _lease_lost()

    def granted(self, lease: int) -> int | None:
        """Return the seconds that a lease lives without being kept alive; None if there is no such lease."""
        from pyetcd import etcdrpc

        request = etcdrpc.LeaseTimeToLiveRequest(ID=lease)
        reply = self._call(lambda channel: etcdrpc.LeaseStub(channel).LeaseTimeToLive, request)
        return int(reply.grantedTTL) if reply.TTL >= 0 else None

    def revoke(self, lease: int, timeout: float) -> None:
        """End the lease and all that is under it.

        Args:
            lease: which.
            timeout: seconds that it may take.
        """
        from pyetcd import etcdrpc

        request = etcdrpc.LeaseRevokeRequest(ID=lease)
        self._call(lambda channel: etcdrpc.LeaseStub(channel).LeaseRevoke, request, timeout)

    @property
    def asks_nobody(self) -> bool:
        """Whether we have a password, and etcd has said that it asks nobody for one."""
        return bool(self._auth.username) and not self._token and self._token is not None

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._drop()

    def _call(self, method: Callable[[Any], Callable[..., Any]], request: Any, timeout: float | None = None) -> Any:
        """Call the endpoint in use; where nobody answers there, the others.

        Raises:
            DiscoveryError: none of them answers in time.
            AuthorisationError: etcd refuses who we are.
            LeaseLostError: the call names a lease that isn't there.
        """
        import grpc

        end = time.monotonic() + (self._timeout if timeout is None else timeout)
        renewed = False
        tries = len(self._endpoints)
        while True:
            channel = self._connected()
            try:
                metadata = self._metadata(channel, end)
                return method(channel)(request, timeout=max(0.0, end - time.monotonic()), metadata=metadata)
            except grpc.RpcError as error:
                if not renewed and _has_word(error, _TOKEN_ERRORS):
                    # etcd forgets tokens after a time, and with every change of its users
                    renewed, self._token = True, None
                    continue
                tries -= 1
                if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    self._turn_to_the_next(channel)
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

    def _turn_to_the_next(self, failed: Any) -> None:
        with self._lock:
            if self._channel is failed:
                self._drop()
                self._endpoints.append(self._endpoints.pop(0))

    def _drop(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel = self._token = None


def _open(endpoint: str, auth: EtcdAuth) -> Any:
    import grpc

    parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
    host = parts.hostname or ""
    target = f"{f'[{host}]' if ':' in host else host}:{parts.port or 2379}"
    if parts.scheme != "https":
        return grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)
    pem = [text.encode() or None for text in (auth.authority or _system_authorities(), auth.key, auth.certificate)]
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(*pem), options=_CHANNEL_OPTIONS)


def _system_authorities() -> str:
    """Return the system's authorities: gRPC has a list of its own, which may lack a site's."""
    return "".join(map(ssl.DER_cert_to_PEM_cert, ssl.create_default_context().get_ca_certs(binary_form=True)))


def _authenticate(channel: Any, auth: EtcdAuth, end: float) -> str:
    import grpc
    from pyetcd import etcdrpc

    request = etcdrpc.AuthenticateRequest(name=auth.username, password=auth.password)
    try:
        reply = etcdrpc.AuthStub(channel).Authenticate(request, timeout=max(0.0, end - time.monotonic()))
    except grpc.RpcError as error:
        if _has_word(error, ("authentication is not enabled",)):
            return ""
        raise
    token: str = reply.token
    return token


def _has_word(error: Any, words: Sequence[str]) -> bool:
    return any(word in (error.details() or "") for word in words)


def _lease_lost() -> LeaseLostError:
    return LeaseLostError("the lease in etcd is lost", needed="a lease that is kept alive", fix="look at etcd")


def _our_error(error: Any, auth: EtcdAuth) -> BootstrapError:
    import grpc

    text = " ".join((error.details() or error.code().name).split())
    if "lease not found" in text:
        return _lease_lost()
    if _has_word(error, ("authentication failed", "invalid user ID")):
        return CredentialsError(
            f"etcd refuses user {auth.username}: {text}",
            needed="a user of etcd's, and the password",
            fix="correct ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD",
        )
    if error.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED) or _has_word(
        error, ("user name is empty",)
    ):
        return AuthorisationError(
            f"etcd refuses us: {text}",
            needed=f"a user with the right to read and write under dynamo_mpi/{_named(auth)}",
            fix="etcdctl role grant-permission ROLE --prefix=true readwrite dynamo_mpi/, or correct ETCD_AUTH_*",
        )
    return DiscoveryError(
        f"etcd does not answer: {text}",
        needed="an etcd that answers",
        fix="look at etcd; ETCD_ENDPOINTS says where it is",
    )


def _named(auth: EtcdAuth) -> str:
    if auth.username:
        return f"; this worker is {auth.username}"
    return "; this worker is who its certificate names" if auth.certificate else "; this worker names none"
