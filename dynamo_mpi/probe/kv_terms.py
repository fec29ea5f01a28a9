# SPDX-License-Identifier: Apache-2.0
"""What every rank has to know for the KV probe, and what a world publishes of it, so that a partner can ask its ranks. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.parallelism.contract import Contract

TOKEN_BYTES = 32
LOAD_SECONDS = 15.0
"""How long a rank may take to load NIXL or UCX."""
PARTNER = {"prefill": "decode", "decode": "prefill"}
"""The role that a role hands KV over to, or takes it from."""
TCP, NIXL, UCX = "tcp", "nixl", "ucx"
_MOST_STATIONS = 1 << 14
_MOST_TEXT = 300
_HIGHEST_PORT = 65535
# TensorRT-LLM's order (I6): the first that is set decides about DEFAULT
_CHOICES = ("NIXL", "UCX", "MOONCAKE", "MPI")


class KvTerms(NamedTuple):
    """What rank 0 tells the others along with the plan.

    Args:
        role: ``prefill`` or ``decode``.
        seconds: how long a rank can be asked.
        token: who knows it may ask, hexadecimal; made anew for each world.
        network: where ranks listen, as ``--kv-network`` has it; empty for the host's own address.
    """

    role: str
    seconds: float
    token: str
    network: str = ""

    def pack(self) -> str:
        """Write it as one text."""
        return ",".join((self.role, repr(self.seconds), self.token, self.network))

    @classmethod
    def unpack(cls, text: str) -> KvTerms:
        """Read what `pack` wrote."""
        role, seconds, token, network = text.split(",", 3)
        return cls(role, float(seconds), token, network)


class Station(NamedTuple):
    """Where one rank can be asked.

    Args:
        node: its host's name.
        address: of that host.
        port: of it.
    """

    node: str
    address: str
    port: int


class Offer(NamedTuple):
    """What a world publishes.

    Args:
        token: who knows it may ask.
        transport: that the engine's configuration names, in lower case.
        able: what is installed in all ranks, of ``nixl`` and ``ucx``.
        stations: by rank.
    """

    token: str
    transport: str
    able: tuple[str, ...]
    stations: tuple[Station, ...]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data for the world record."""
        return {**self._asdict(), "able": list(self.able), "stations": [list(one) for one in self.stations]}

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Offer:
        """Read what `as_json` made, here or elsewhere.

        Raises:
            ValueError: it is something else.
        """
        token, transport, able, stations = (content.get(name) for name in cls._fields)
        if not (isinstance(token, str) and isinstance(transport, str)):
            raise ValueError("its fields have other types")
        if not (isinstance(able, list) and isinstance(stations, list)):
            raise ValueError("its fields have other types")
        if len(bytes.fromhex(token)) != TOKEN_BYTES or len(stations) > _MOST_STATIONS:
            raise ValueError("its fields have other sizes")
        return cls(
            token, plain(transport), tuple(name for name in (NIXL, UCX) if name in able), tuple(map(_station, stations))
        )


def _station(content: Any) -> Station:
    if not isinstance(content, list) or [type(part) for part in content] != [str, str, int]:
        raise ValueError("a station is a node, an address and a port")
    node, address, port = content
    if not 0 < port <= _HIGHEST_PORT:
        raise ValueError(f"there is no port {port}")
    return Station(plain(node), plain(address), port)


def plain(text: str) -> str:
    """Return a text of somebody else's so that it can be shown: printable, and not too long."""
    return "".join(c if c.isprintable() else "?" for c in text[:_MOST_TEXT])


def transport_of(engine: str, kv_transport: str, contract: Contract | None, environ: Mapping[str, str]) -> str:
    """Return what carries the KV, in lower case.

    Args:
        engine: ``trtllm`` or ``reference``.
        kv_transport: ``--kv-transport``, of the reference engine.
        contract: of this world.
        environ: may decide for TensorRT-LLM's ``DEFAULT`` (I6).
    """
    if engine != "trtllm":
        return kv_transport
    backend = (contract.backend if contract is not None else None) or "DEFAULT"
    if backend == "DEFAULT":
        backend = next((name for name in _CHOICES if environ.get(f"TRTLLM_USE_{name}_KVCACHE") == "1"), "NIXL")
    return backend.lower()
