# SPDX-License-Identifier: Apache-2.0
"""etcd through its JSON gateway, which the standard library is enough for: a login node has no client of etcd."""

from __future__ import annotations

import base64
import http.client
import json
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from dynamo_mpi.control_plane.asking import is_refusal
from dynamo_mpi.errors import AuthorisationError, DiscoveryError

if TYPE_CHECKING:
    from types import TracebackType

    from dynamo_mpi.control_plane.etcd_auth import EtcdAuth

_PORT = 2379
_MOST_BYTES, _PIECE_BYTES = 64 << 20, 1 << 16
# gRPC's codes, which the gateway hands on
_NOT_FOUND = 5
_REFUSALS = (7, 16)
# what etcd calls an invalid argument
_REFUSING = ("authentication failed", "user name is empty", "permission denied", "invalid auth token")


class Value(NamedTuple):
    """What stands under one key.

    Args:
        data: it.
        lease: that it ends with; 0 for none.
        key: where it stands.
    """

    data: bytes
    lease: int
    key: str


class Server(NamedTuple):
    """What an endpoint tells everybody.

    Args:
        version: etcd's.
        clock: seconds since 1970 as it counts them, whole ones; None where it doesn't say.
    """

    version: str
    clock: float | None


class EtcdGateway:
    """A connection to one of etcd's endpoints, made with the first call. Use it in a ``with`` block.

    Args:
        endpoint: its URL; ``http://`` may be left out.
        auth: who we are.
        end: when all is to be over, as `time.monotonic` counts.

    Raises:
        UsageError: a text in ``auth`` is no PEM.
        DiscoveryError: the endpoint can't be read.
    """

    def __init__(self, endpoint: str, auth: EtcdAuth, end: float) -> None:
        self._shown, self._auth, self._end = endpoint.rpartition("@")[2], auth, end
        self._headers: dict[str, str] = {}
        self._clock: float | None = None
        try:
            parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
            host, port = parts.hostname or "", parts.port or _PORT
        except ValueError:
            raise self._error("can't be read") from None
        self._connection = (
            http.client.HTTPSConnection(host, port, context=auth.tls())
            if parts.scheme == "https"
            else http.client.HTTPConnection(host, port)
        )

    def __enter__(self) -> EtcdGateway:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def log_in(self) -> None:
        """Show etcd our user's password, if we have one.

        Raises:
            DiscoveryError: no answer in time.
            AuthorisationError: a refusal.
        """
        if self._auth.username:
            question = {"name": self._auth.username, "password": self._auth.password}
            status, reply = self._ask("/v3/auth/authenticate", question)
            if status == http.HTTPStatus.OK:
                self._headers = {"Authorization": str(reply.get("token", ""))}
            elif "authentication is not enabled" not in str(reply.get("message")):
                raise self._refusal(reply)

    def server(self) -> Server:
        """Return what the endpoint is.

        Raises:
            DiscoveryError: no answer in time.
        """
        _, reply = self._ask("/version", None)
        return Server(str(reply.get("etcdserver", "")), self._clock)

    def put(self, key: str, value: str, lease: int) -> None:
        """Write a key under a lease.

        Raises:
            DiscoveryError: no answer in time, or a refusal.
        """
        question = {"key": _text(key.encode()), "value": _text(value.encode()), "lease": str(lease)}
        status, reply = self._ask("/v3/kv/put", question)
        if status != http.HTTPStatus.OK:
            raise self._refusal(reply)

    def create(self, key: str, value: bytes, lease: int) -> bool:
        """Write a key under a lease unless it is there already, and tell whether it was written.

        Raises:
            DiscoveryError: no answer in time, or a refusal.
        """
        name = _text(key.encode())
        put = {"request_put": {"key": name, "value": _text(value), "lease": str(lease)}}
        compare = {"key": name, "target": "CREATE", "result": "EQUAL", "create_revision": "0"}
        status, reply = self._ask("/v3/kv/txn", {"compare": [compare], "success": [put]})
        if status != http.HTTPStatus.OK:
            raise self._refusal(reply)
        return reply.get("succeeded") is True

    def grant(self, seconds: int) -> int:
        """Return a new lease that lives for ``seconds``.

        Raises:
            DiscoveryError: no answer in time, or a refusal.
        """
        status, reply = self._ask("/v3/lease/grant", {"TTL": str(seconds)})
        if status != http.HTTPStatus.OK:
            raise self._refusal(reply)
        try:
            return int(reply["ID"])
        except (KeyError, ValueError, TypeError):
            raise self._error("something else than etcd answers there") from None

    def values(self, prefix: str) -> list[Value]:
        """Return what stands under ``prefix``.

        Raises:
            DiscoveryError: no answer in time.
            AuthorisationError: a refusal.
        """
        start = prefix.encode()
        stop = start[:-1] + bytes([start[-1] + 1])
        status, reply = self._ask("/v3/kv/range", {"key": _text(start), "range_end": _text(stop)})
        if status != http.HTTPStatus.OK:
            raise self._refusal(reply)
        try:
            # what is empty or 0 is left out
            return [
                Value(
                    base64.b64decode(entry.get("value", "")),
                    int(entry.get("lease", 0)),
                    base64.b64decode(entry.get("key", "")).decode(errors="backslashreplace"),
                )
                for entry in reply.get("kvs", [])
            ]
        except (ValueError, TypeError, AttributeError):
            raise self._error("something else than etcd answers there") from None

    def revoke(self, lease: int) -> bool:
        """End a lease and all that is under it, and tell whether it was still there.

        Raises:
            DiscoveryError: no answer in time.
            AuthorisationError: a refusal.
        """
        # as JSON has it: numbers as large would be rounded on their way
        status, reply = self._ask("/v3/lease/revoke", {"ID": str(lease)})
        if status != http.HTTPStatus.OK and reply.get("code") != _NOT_FOUND:
            raise self._refusal(reply)
        return status == http.HTTPStatus.OK

    def _ask(self, path: str, question: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and the answer; without a question, of a page."""
        try:
            self._connection.timeout = self._left()
            if self._connection.sock is not None:
                self._connection.sock.settimeout(self._left())
            if question is None:
                self._connection.request("GET", path, headers=self._headers)
            else:
                self._connection.request("POST", path, json.dumps(question), self._headers)
            reply = self._connection.getresponse()
            text = self._read(reply)
            self._clock = _seconds_of(reply.getheader("Date", ""))
        except (OSError, http.client.HTTPException, ValueError) as error:  # a ValueError: the host's name is none
            if is_refusal(error):
                raise refused(f"{self._shown}: {_reason(error)}") from None
            raise self._error(_reason(error)) from None
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise self._error("something else than etcd answers there")
        return reply.status, content

    def _read(self, reply: http.client.HTTPResponse) -> bytes:
        """Read an answer. A socket's own timeout begins anew with every piece, and one without an end would fill the memory."""
        data = bytearray()
        while part := reply.read(_PIECE_BYTES):
            data += part
            if len(data) > _MOST_BYTES:
                raise ValueError(f"an answer of more than {_MOST_BYTES >> 20} MiB")
            self._left()
        return bytes(data)

    def _left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _refusal(self, reply: dict[str, Any]) -> DiscoveryError | AuthorisationError:
        message = str(reply.get("message") or reply.get("error"))
        found = f"{self._shown}: etcd refuses: {message!a}"
        is_ours = reply.get("code") in _REFUSALS or any(words in message for words in _REFUSING)
        return refused(found) if is_ours else gateway_error(found)

    def _error(self, found: str) -> DiscoveryError:
        return gateway_error(f"{self._shown}: {found}")


def gateway_error(found: str) -> DiscoveryError:
    """Return the error of an etcd that doesn't do what it was asked for."""
    return DiscoveryError(
        found,
        needed="an etcd that answers this host",
        fix="look at etcd; ETCD_ENDPOINTS and ETCD_AUTH_* say where it is and who we are",
    )


def refused(found: str) -> AuthorisationError:
    """Return the error of an etcd that doesn't let us in."""
    return AuthorisationError(
        found,
        needed="credentials that etcd takes",
        fix="--run-dir DIR of the deployment, whose services.json has them; or correct ETCD_AUTH_*",
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _seconds_of(date: str) -> float | None:
    """Read HTTP's date."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError):
        return None


def _reason(error: Exception) -> str:
    # a hang-up is one too, and says so itself
    if isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected):
        return "something else than etcd answers there"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
