# SPDX-License-Identifier: Apache-2.0
"""Our credentials for NATS: the ``NATS_AUTH_*`` and ``NATS_TLS_*`` variables of Dynamo's runtime, in its order of precedence."""

from __future__ import annotations

import base64
import json
import re
import ssl
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

# the runtime's user and password if nothing is set
_USUAL = "user"
_NKEY_SEED = re.compile(r"SU[A-Z2-7]{56}")
_JWT = re.compile(r"-----BEGIN NATS USER JWT-----\s*(\S+)")
_SEED = re.compile(r"-----BEGIN USER NKEY SEED-----\s*(SU[A-Z2-7]{56})")
_TLS = ("CA_CERT_PATH", "CLIENT_CERT_PATH", "CLIENT_KEY_PATH")
_YES = ("1", "true", "yes", "on")


@dataclass(frozen=True, repr=False)
class NatsAuth:
    """Credentials: the first kind that is set is used. Empty texts: not given.

    Args:
        username: of a NATS user.
        password: that user's.
        token: instead of username and password.
        nkey: the seed of a user's nkey (``SU…``).
        credentials_file: path of a ``.creds`` file, a JWT with its nkey.
        authority: path of the PEM certificates that sign NATS's own; the system's if none is given.
        certificate: path of this client's, PEM.
        key: path of its private key, PEM.
        insecure: accept any server certificate.
    """

    username: str = ""
    password: str = ""
    token: str = ""
    nkey: str = ""
    credentials_file: str = ""
    authority: str = ""
    certificate: str = ""
    key: str = ""
    _: KW_ONLY
    insecure: bool = False

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> NatsAuth:
        """Read them from the environment.

        Raises:
            UsageError: half of a pair is missing, a file can't be read, a seed is invalid, or the address contains credentials.
        """
        names = ("USERNAME", "PASSWORD", "TOKEN", "NKEY", "CREDENTIALS_FILE")
        given = {f"NATS_AUTH_{name}": environ.get(f"NATS_AUTH_{name}", "") for name in names}
        given |= {f"NATS_TLS_{name}": environ.get(f"NATS_TLS_{name}", "") for name in _TLS}
        for one, other in (("AUTH_USERNAME", "AUTH_PASSWORD"), ("TLS_CLIENT_CERT_PATH", "TLS_CLIENT_KEY_PATH")):
            _require_both(given, f"NATS_{one}", f"NATS_{other}")
        if "@" in environ.get("NATS_SERVER", ""):
            raise UsageError(
                "NATS_SERVER holds credentials, which Dynamo's runtime does not read there",
                expected="an address alone, nats://HOST:PORT",
                fix="set NATS_AUTH_USERNAME and NATS_AUTH_PASSWORD, or NATS_AUTH_TOKEN",
            )
        for name in ("NATS_AUTH_CREDENTIALS_FILE", *(f"NATS_TLS_{name}" for name in _TLS)):
            _require_readable(name, given[name])
        if given["NATS_AUTH_NKEY"] and not _NKEY_SEED.fullmatch(given["NATS_AUTH_NKEY"]):
            raise UsageError(
                "NATS_AUTH_NKEY is no seed of a user's nkey",
                expected="the seed itself: SU and 56 letters and digits",
                fix="nk -gen user makes one; a file with a JWT belongs in NATS_AUTH_CREDENTIALS_FILE",
            )
        insecure = environ.get("NATS_TLS_INSECURE", "").lower() in _YES
        return cls(*given.values(), insecure=insecure)

    @property
    def kind(self) -> str:
        """The variables that are used; empty if none is set."""
        kinds = {
            "NATS_AUTH_USERNAME and NATS_AUTH_PASSWORD": self.username,
            "NATS_AUTH_TOKEN": self.token,
            "NATS_AUTH_NKEY": self.nkey,
            "NATS_AUTH_CREDENTIALS_FILE": self.credentials_file,
        }
        return next((name for name, value in kinds.items() if value), "")

    @property
    def has_tls(self) -> bool:
        """Whether a setting needs TLS."""
        return bool(self.authority or self.certificate or self.insecure)

    @property
    def uses_nkey(self) -> bool:
        """Whether NATS's challenge must be signed, which needs a library."""
        return not (self.username or self.token) and bool(self.nkey or self.credentials_file)

    def connect_options(self) -> dict[str, str]:
        """Return our part of the handshake: if nothing is set, the runtime's default user."""
        if self.username:
            return {"user": self.username, "pass": self.password}
        if self.token:
            return {"auth_token": self.token}
        return {} if self.uses_nkey else {"user": _USUAL, "pass": _USUAL}

    def sign_nonce(self, nonce: str) -> dict[str, str]:
        """Return our answer to NATS's challenge.

        Raises:
            ValueError: the seed is no key.
            ImportError: nkeys isn't installed.
        """
        import nkeys

        jwt, seed = self._signer()
        try:
            pair = nkeys.from_seed(bytearray(seed.encode()))
            signature = base64.b64encode(pair.sign(nonce.encode())).decode()
            return {"sig": signature, **({"jwt": jwt} if jwt else {"nkey": pair.public_key.decode()})}
        except Exception:  # errors of the library, of base64 and of libsodium
            raise ValueError("it holds no key") from None

    def _signer(self) -> tuple[str, str]:
        """Return the JWT, empty with an nkey alone, and the seed to sign with."""
        if self.nkey or not self.credentials_file:
            return "", self.nkey
        with open(self.credentials_file, encoding="utf-8", errors="replace") as file:
            text = file.read(1 << 16)
        jwt, seed = _JWT.search(text), _SEED.search(text)
        return (jwt[1] if jwt else ""), (seed[1] if seed else "")

    def expiry(self) -> float | None:
        """Return when the credentials file expires, in seconds since 1970; None if it doesn't, or isn't used."""
        if not self.uses_nkey or self.nkey:
            return None
        try:
            claims: Any = json.loads(_decoded(self._signer()[0].split(".")[1]))
            return float(claims["exp"]) if claims.get("exp") else None
        except (OSError, ValueError, IndexError, TypeError, AttributeError):
            return None  # NATS itself reports a bad file

    def tls(self) -> ssl.SSLContext:
        """Return the context for a connection to NATS.

        Raises:
            UsageError: a file is no certificate or key.
        """
        try:
            # with an authority of its own, the system's authorities are not trusted
            context = ssl.create_default_context(cafile=self.authority or None)
        except (OSError, ValueError):
            raise _no_pem("NATS_TLS_CA_CERT_PATH names a file that holds no certificate") from None
        if self.insecure:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            if self.certificate:
                # for a key with a passphrase, OpenSSL would ask on the terminal
                context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except (OSError, ValueError):
            found = "NATS_TLS_CLIENT_CERT_PATH and NATS_TLS_CLIENT_KEY_PATH name no certificate and its key"
            raise _no_pem(found) from None
        return context


def _require_both(given: Mapping[str, str], one: str, other: str) -> None:
    if bool(given[one]) != bool(given[other]):
        there, missing = (one, other) if given[one] else (other, one)
        raise UsageError(
            f"{there} is set and {missing} isn't", expected="both, or neither", fix=f"set {missing}, or unset {there}"
        )


def _require_readable(name: str, path: str) -> None:
    if not path:
        return
    try:
        with open(path, "rb") as file:
            file.read(1)
    except (OSError, ValueError) as error:
        why = (
            "is the text itself" if "-----BEGIN" in path else (getattr(error, "strerror", None) or "is no path").lower()
        )
        raise UsageError(
            f"{name} can't be read on rank 0's node: {why}", expected="the path of a file there", fix=f"correct {name}"
        ) from None


def _decoded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def _no_pem(found: str) -> UsageError:
    return UsageError(found, expected="the paths of PEM files, the key without a passphrase", fix="correct NATS_TLS_*")
