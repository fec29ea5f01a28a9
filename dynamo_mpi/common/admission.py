# SPDX-License-Identifier: Apache-2.0
"""Decides which connections a listener keeps while their peers have not authenticated: the policy of all listeners, without I/O.

A client without credentials can open connections and send nothing. It must not keep others out, so the number of such connections is
limited, and a new one takes the place of an old one: of the address with the most connections, the one that has been silent for longest. A
flood from one address therefore only displaces itself. A connection whose request has begun is displaced only if no silent one is left, and
not in its first second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

Key = TypeVar("Key", bound="Hashable")

REQUEST_SECONDS = 1.0
"""How long a connection whose request has begun can't be displaced at all: a real peer sends its request in one packet."""


class Admission(Generic[Key]):
    """The connections of one listener whose peers have not authenticated, the oldest first. Not thread-safe.

    Args:
        places: the largest number of such connections.
        seconds: how long each may take to authenticate.
    """

    def __init__(self, places: int, seconds: float) -> None:
        self.places, self.seconds = places, seconds
        self._since: dict[Key, float] = {}
        self._request_since: dict[Key, float] = {}
        self._address: dict[Key, str] = {}
        self._at_address: dict[str, dict[Key, None]] = {}

    def __len__(self) -> int:
        return len(self._since)

    def __iter__(self) -> Iterator[Key]:
        return iter(list(self._since))

    def __contains__(self, key: object) -> bool:
        return key in self._since

    def enter(self, key: Key, address: str, now: float) -> list[Key]:
        """Add a connection.

        Args:
            key: identifies it.
            address: the peer's address, without its port.
            now: monotonic seconds.

        Returns:
            The connections to close, which have left: ``key`` itself if there is no room.
        """
        self._address[key], self._since[key] = address, now
        self._at_address.setdefault(address, {})[key] = None
        displaced: list[Key] = []
        while len(self._since) > self.places:
            displaced.append(self._next_displaced(key, now))
            self.leave(displaced[-1])
        return displaced

    def begin_request(self, key: Key, now: float) -> None:
        """Note that the peer has sent a part of its request."""
        if key in self._since:
            self._request_since.setdefault(key, now)

    def leave(self, key: Key) -> None:
        """Remove a connection: it has authenticated, or is closed. Unknown keys are ignored."""
        if self._since.pop(key, None) is None:
            return
        self._request_since.pop(key, None)
        address = self._address.pop(key)
        del self._at_address[address][key]
        if not self._at_address[address]:
            del self._at_address[address]

    def expired(self, now: float) -> list[Key]:
        """Remove and return the connections that took too long."""
        late = [key for key, since in self._since.items() if now - since > self.seconds]
        for key in late:
            self.leave(key)
        return late

    def _next_displaced(self, newest: Key, now: float) -> Key:
        addresses = sorted(self._at_address.values(), key=len, reverse=True)
        for keys in addresses:
            for key in keys:
                if key not in self._request_since and key != newest:
                    return key
        for keys in addresses:
            for key in keys:
                if now - self._request_since.get(key, now) >= REQUEST_SECONDS:
                    return key
        return newest


class Throttle:
    """Limits how often a message is logged.

    Args:
        seconds: the least time between two.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._last = -float("inf")
        self._suppressed = 0

    def permit(self, now: float) -> int | None:
        """Return how many messages were suppressed since the last one; None if this one must be suppressed too."""
        if now - self._last < self._seconds:
            self._suppressed += 1
            return None
        suppressed, self._suppressed, self._last = self._suppressed, 0, now
        return suppressed
