# SPDX-License-Identifier: Apache-2.0
"""etcd through its JSON gateway, with the standard library alone: for hosts without packages, and for processes that must start quickly."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from dynamo_mpi.common.errors import AuthorizationError, DiscoveryError, DynamoMpiError
from dynamo_mpi.common.waiting import call_with_timeout
from dynamo_mpi.discovery.endpoints import is_certificate_refusal, remaining, short_reason, strip_credentials
from dynamo_mpi.discovery.etcd import (
    DEFAULT_PORT,
    EtcdAuth,
    KeyValue,
    Lease,
    end_of_prefix,
    etcd_endpoints,
    lease_lost,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from dynamo_mpi.discovery.etcd import EtcdClient

T = TypeVar("T")
_MAX_BYTES, _CHUNK_BYTES = 64 << 20, 1 << 16
# gRPC's codes, which the gateway passes on
_NOT_FOUND = 5
_REFUSAL_CODES = (7, 16)
# texts of etcd's "invalid argument" errors
_REFUSAL_TEXTS = ("authentication failed", "user name is empty", "permission denied", "invalid auth token")
_NOT_ETCD = "something else than etcd answers there"


class ServerInfo(NamedTuple):
    """Facts that an endpoint reports without a password.

    Args:
        version: etcd's.
        clock: its time in whole seconds since 1970; None if it isn't known.
    """

    version: str
    clock: float | None


class HttpEtcdClient:
    """An `etcd.EtcdClient` of one endpoint, which connects with the first call. Use it in a ``with`` block.

    Args:
        endpoint: its URL; ``http://`` may be left out.
        auth: our credentials.
        deadline: of all calls together, as `time.monotonic` counts.

    Raises:
        UsageError: a text in ``auth`` is no PEM.
        DiscoveryError: the endpoint can't be read.
    """

    def __init__(self, endpoint: str, auth: EtcdAuth, deadline: float) -> None:
        self._name, self._auth, self._deadline = strip_credentials(endpoint), auth, deadline
        self._headers: dict[str, str] = {}
        self._clock: float | None = None
        try:
            parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
            host, port = parts.hostname or "", parts.port or DEFAULT_PORT
            self._connection = (
                http.client.HTTPSConnection(host, port, context=auth.tls())
                if parts.scheme == "https"
                else http.client.HTTPConnection(host, port)
            )
        except (ValueError, http.client.InvalidURL):
            raise self._error("can't be read") from None

    def __enter__(self) -> HttpEtcdClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def authenticate(self) -> None:
        """Log in with our user's password, if we have one.

        Raises:
            DiscoveryError: no answer in time.
            AuthorizationError: etcd rejects it.
        """
        if self._auth.username:
            request = {"name": self._auth.username, "password": self._auth.password}
            status, reply = self._request("/v3/auth/authenticate", request)
            if status == http.HTTPStatus.OK:
                self._headers = {"Authorization": str(reply.get("token", ""))}
            elif "authentication is not enabled" not in str(reply.get("message")):
                raise self._refusal(reply)

    def server_info(self) -> ServerInfo:
        """Return the endpoint's version and clock.

        Raises:
            DiscoveryError: no answer in time.
        """
        _, reply = self._request("/version", None)
        return ServerInfo(str(reply.get("etcdserver", "")), self._clock)

    def get_prefix(self, prefix: str) -> list[KeyValue]:
        """Return all keys that begin with ``prefix``."""
        reply = self._call("kv/range", {"key": _encode(prefix.encode()), "range_end": _encode(end_of_prefix(prefix))})
        try:
            # the gateway leaves out empty values and 0
            return [
                KeyValue(
                    base64.b64decode(entry.get("key", "")).decode(errors="backslashreplace"),
                    base64.b64decode(entry.get("value", "")),
                    int(entry.get("create_revision", 0)),
                    int(entry.get("lease", 0)),
                )
                for entry in reply.get("kvs", [])
            ]
        except (ValueError, TypeError, AttributeError):
            raise self._error(_NOT_ETCD) from None

    def put(self, key: str, value: bytes, lease: int) -> None:
        """Write a key under a lease.

        Raises:
            LeaseLostError: there is no such lease.
        """
        self._call("kv/put", _put(key, value, lease))

    def create(self, key: str, value: bytes, lease: int) -> bool:
        """Write a key as `put` does, unless it exists; return whether it was written."""
        put = _put(key, value, lease)
        compare = {"key": put["key"], "target": "CREATE", "result": "EQUAL", "create_revision": "0"}
        reply = self._call("kv/txn", {"compare": [compare], "success": [{"request_put": put}]})
        return reply.get("succeeded") is True

    def grant(self, seconds: int) -> Lease:
        """Return a new lease that lives at least ``seconds`` without being kept alive."""
        reply = self._call("lease/grant", {"TTL": str(seconds)})
        try:
            return Lease(int(reply["ID"]), int(reply["TTL"]))
        except (KeyError, ValueError, TypeError):
            raise self._error(_NOT_ETCD) from None

    def revoke(self, lease: int) -> bool:
        """End a lease and delete its keys; return whether it existed."""
        # a text, since JSON numbers as large as lease ids are rounded
        status, reply = self._request("/v3/lease/revoke", {"ID": str(lease)})
        if status != http.HTTPStatus.OK and reply.get("code") != _NOT_FOUND:
            raise self._refusal(reply)
        return status == http.HTTPStatus.OK

    def _call(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        status, reply = self._request(f"/v3/{path}", request)
        if status != http.HTTPStatus.OK:
            raise lease_lost() if reply.get("code") == _NOT_FOUND else self._refusal(reply)
        return reply

    def _request(self, path: str, request: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and the answer; without a request, those of a page."""
        try:
            self._connection.timeout = remaining(self._deadline)
            if self._connection.sock is not None:
                self._connection.sock.settimeout(remaining(self._deadline))
            if request is None:
                self._connection.request("GET", path, headers=self._headers)
            else:
                self._connection.request("POST", path, json.dumps(request), self._headers)
            reply = self._connection.getresponse()
            text = self._read(reply)
            self._clock = _read_date(reply.getheader("Date", ""))
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: the host's name is invalid
            # a closed connection is a BadStatusLine too, with a message of its own
            is_http = not isinstance(error, http.client.BadStatusLine) or isinstance(
                error, http.client.RemoteDisconnected
            )
            reason = short_reason(error) if is_http else _NOT_ETCD
            if is_certificate_refusal(error):
                raise _refused(f"{self._name}: {reason}") from None
            raise self._error(reason) from None
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise self._error(_NOT_ETCD)
        return reply.status, content

    def _read(self, reply: http.client.HTTPResponse) -> bytes:
        """Read an answer. A socket's own timeout restarts with every chunk, and an endless answer would fill the memory."""
        data = bytearray()
        while part := reply.read(_CHUNK_BYTES):
            data += part
            if len(data) > _MAX_BYTES:
                raise ValueError(f"an answer of more than {_MAX_BYTES >> 20} MiB")
            remaining(self._deadline)
        return bytes(data)

    def _refusal(self, reply: dict[str, Any]) -> DiscoveryError | AuthorizationError:
        message = str(reply.get("message") or reply.get("error"))
        found = f"{self._name}: etcd refuses: {message!a}"
        is_ours = reply.get("code") in _REFUSAL_CODES or any(text in message for text in _REFUSAL_TEXTS)
        return _refused(found) if is_ours else _unanswered(found)

    def _error(self, found: str) -> DiscoveryError:
        return _unanswered(f"{self._name}: {found}")


def query_etcd(
    environ: Mapping[str, str], seconds: float, query: Callable[[EtcdClient], T], *, or_grpc: bool = False
) -> T:
    """Query the first endpoint that answers.

    Args:
        environ: has etcd's endpoints and our credentials, in a worker's variables.
        seconds: time limit, including the look-up of names.
        query: called with a client that is logged in; once for each endpoint until one answers.
        or_grpc: if no gateway answers, try gRPC too, with the same time limit again.

    Raises:
        DiscoveryError: no endpoint has answered in time.
        AuthorizationError: they reject our credentials.
        UsageError: the settings for etcd can't be used.
    """
    deadline = time.monotonic() + seconds
    try:
        return call_with_timeout(seconds, lambda: _query_in_turn(environ, deadline, query), "etcd")
    except (TimeoutError, DiscoveryError) as error:
        if or_grpc:
            with contextlib.suppress(ImportError):
                from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient

                with contextlib.closing(GrpcEtcdClient.from_env(environ, seconds)) as client:
                    return query(client)
        if isinstance(error, DynamoMpiError):
            raise
        raise _unanswered("etcd: no answer in time") from None


def _query_in_turn(environ: Mapping[str, str], deadline: float, query: Callable[[EtcdClient], T]) -> T:
    auth, endpoints = EtcdAuth.from_env(environ), etcd_endpoints(environ)
    problems, refusals = [], 0
    for index, endpoint in enumerate(endpoints):
        now = time.monotonic()
        # a lost endpoint leaves time for the others
        share = (deadline - now) / (len(endpoints) - index)
        try:
            with HttpEtcdClient(endpoint, auth, now + share) as client:
                client.authenticate()
                return query(client)
        except (DiscoveryError, AuthorizationError) as error:
            problems.append(error.problem)
            refusals += isinstance(error, AuthorizationError)
    found = "; ".join(problems) or "ETCD_ENDPOINTS names no endpoint"
    raise _refused(found) if refusals else _unanswered(found)


def _unanswered(found: str) -> DiscoveryError:
    return DiscoveryError(
        found,
        expected="an etcd that answers this host",
        fix="check etcd, and its address and credentials in ETCD_ENDPOINTS and ETCD_AUTH_*",
    )


def _refused(found: str) -> AuthorizationError:
    return AuthorizationError(
        found,
        expected="credentials that etcd accepts",
        fix="--run-dir DIR of the deployment, whose services.json has them; or correct ETCD_AUTH_*",
    )


def _put(key: str, value: bytes, lease: int) -> dict[str, str]:
    return {"key": _encode(key.encode()), "value": _encode(value), "lease": str(lease)}


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _read_date(date: str) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError):
        return None
