# SPDX-License-Identifier: Apache-2.0
"""Nkeys, and the JWTs of an operator, an account and a user, for a test's own NATS."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from typing import Any, NamedTuple

import pytest

_OPERATOR, _ACCOUNT, _USER = 14 << 3, 0, 20 << 3


class Identity(NamedTuple):
    """A seed and the public key that belongs to it."""

    seed: str
    public: str


def identity(prefix: int = _USER) -> Identity:
    """Make a new one, where the library for it is installed."""
    nkeys = pytest.importorskip("nkeys", reason="it signs for nkeys and creds")
    seed = nkeys.encode_seed(os.urandom(32), prefix).decode()
    return Identity(seed, nkeys.from_seed(bytearray(seed.encode())).public_key.decode())


class Operator:
    """An operator with one account, as a configuration of NATS, that makes credentials."""

    def __init__(self) -> None:
        self._operator, self._account, self._system = identity(_OPERATOR), identity(_ACCOUNT), identity(_ACCOUNT)

    def config(self) -> str:
        """Return the configuration that lets in the users of the operator's account."""
        operator = _signed(self._operator, self._operator.public, {"type": "operator", "version": 2})
        limits = {
            "subs": -1,
            "data": -1,
            "payload": -1,
            "imports": -1,
            "exports": -1,
            "conn": -1,
            "leaf": -1,
            "wildcards": True,
        }
        claims = {"type": "account", "version": 2, "limits": limits}
        accounts = [
            f"{each.public}: {_signed(self._operator, each.public, claims)}" for each in (self._account, self._system)
        ]
        # JetStream needs a system account
        return (
            f"operator: {operator}\nsystem_account: {self._system.public}\nresolver: MEMORY\n"
            f"resolver_preload: {{ {', '.join(accounts)} }}\n"
        )

    def credentials(self, expires: float | None = None) -> str:
        """Return a new user's credentials file."""
        user = identity()
        claims = {"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1}
        jwt = _signed(self._account, user.public, claims, expires)
        return (
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
        )


def _signed(issuer: Identity, subject: str, nats: dict[str, Any], expires: float | None = None) -> str:
    nkeys = pytest.importorskip("nkeys")
    claims: dict[str, Any] = {
        "iat": int(time.time()),
        "iss": issuer.public,
        "name": "test",
        "nats": nats,
        "sub": subject,
    }
    if expires is not None:
        claims["exp"] = int(expires)
    digest = hashlib.sha512(json.dumps(claims).encode()).digest()[:32]
    claims["jti"] = base64.b32encode(digest).decode().rstrip("=")
    text = ".".join(_encoded(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, claims))
    signature = nkeys.from_seed(bytearray(issuer.seed.encode())).sign(text.encode())
    return f"{text}.{_encoded(signature)}"


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
