# SPDX-License-Identifier: Apache-2.0
"""What the hosts are called, how they are joined, and where their files lie."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.namespaces.errors import ClusterError

NETWORKS = ("10.213.78", "10.213.79")
"""First three numbers of the addresses in the first and the second network. They exist only inside the hosts' own network namespaces."""


@dataclass(frozen=True)
class HostsSettings:
    """Some hosts.

    Attributes:
        state: private folder of these hosts; identifies them, and is visible on each.
        count: of hosts, named h1, h2, ...
        visible: folders of this machine under /tmp that every host has, too; all else in a host's /tmp is its own.
        resolvable: whether the hosts' names resolve to their addresses; none of them ever has a default route.
        second_rate: of a second network (``eth1``), as tc writes it: ``100mbit``; empty for no second network.

    Raises:
        ClusterError: a value that cannot work.
    """

    state: Path
    count: int
    visible: tuple[Path, ...] = ()
    resolvable: bool = True
    second_rate: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 32:
            raise ClusterError(f"{self.count} hosts asked for: 1 to 32 are possible")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"h{number}" for number in range(1, self.count + 1))

    @property
    def networks(self) -> tuple[str, ...]:
        return NETWORKS if self.second_rate else NETWORKS[:1]

    def address(self, host: str, network: int = 0) -> str:
        """Return a host's IPv4 address in a network.

        Raises:
            ClusterError: there is no such host.
        """
        if host not in self.names:
            raise ClusterError(f"no host {host}: there are {', '.join(self.names)}")
        return f"{NETWORKS[network]}.{self.names.index(host) + 1}"

    def cable(self, host: str, network: int) -> str:
        """Return the interface that is the bridge's end of a host's cable."""
        return f"{host}-{network}"

    def render_hosts(self) -> str:
        """Return /etc/hosts."""
        lines = ["127.0.0.1 localhost"]
        if self.resolvable:
            lines += [f"{self.address(name)} {name}" for name in self.names]
        return "\n".join(lines) + "\n"

    @property
    def hosts(self) -> Path:
        return self.state / "hosts"

    @property
    def resolv_conf(self) -> Path:
        """Names no server: there is none that could be reached."""
        return self.state / "resolv.conf"

    @property
    def log(self) -> Path:
        return self.state / "log"

    @property
    def anchor(self) -> Path:
        """Which process holds the hosts."""
        return self.state / "anchor.json"

    @property
    def socket(self) -> Path:
        """Where the agent asks for a command on another host."""
        return self.state / "agent.sock"

    @property
    def agent(self) -> Path:
        """The program that launchers call in ssh's place."""
        return self.state / "agent"

    @property
    def file(self) -> Path:
        return self.state / "settings.json"

    def save(self) -> None:
        self.file.write_text(json.dumps(asdict(self), default=str))

    @classmethod
    def load(cls, state: Path) -> HostsSettings:
        """Read what was saved."""
        values = json.loads((state / "settings.json").read_text())
        visible = tuple(map(Path, values.pop("visible")))
        return cls(**{**values, "state": state, "visible": visible})
