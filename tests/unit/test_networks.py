# SPDX-License-Identifier: Apache-2.0
"""Which network hosts share, and how a host's networks are read."""

from __future__ import annotations

import sys
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.checks.rank_report import RankReport
from dynamo_mpi.common import interfaces
from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.interfaces import host_networks
from dynamo_mpi.common.networks import (
    BRIDGE,
    LOOPBACK,
    TUNNEL,
    HostNetworks,
    Interface,
    best_address,
    choose,
    distinct,
    kind_of,
    shared_networks,
    usable,
)
from dynamo_mpi.runtime import reach
from dynamo_mpi.runtime.reach import choose_rank0_address, set_runtime_address

LO = Interface("lo", ("127.0.0.1/8", "::1/128"), kind=LOOPBACK)
DEFAULT = ("0.0.0.0/0",)


def host(name: str, *links: Interface, routes: tuple[str, ...] = ()) -> HostNetworks:
    return HostNetworks(name, f"boot {name}", (LO, *links), routes)


def eth(number: int, speed: int = 1000, third: int = 1) -> Interface:
    return Interface("eth0", (f"10.{third}.0.{number}/24", f"fe80::{number}/64"), speed)


def ib(number: int, speed: int = 200_000) -> Interface:
    return Interface("ib0", (f"10.9.0.{number}/16",), speed)


def docker(number: int = 1, name: str = "docker0") -> Interface:
    kind = kind_of(name, loopback=False, bridge=True, tunnel=False)
    return Interface(name, (f"172.17.0.{number}/16",), kind=kind)


def test_the_only_shared_network_is_chosen() -> None:
    choice = choose([host("n1", eth(1)), host("n2", eth(2))], "")
    assert (choice.address, choice.network) == ("10.1.0.1", "10.1.0.0/24")
    assert choice.line == (
        "network: 10.1.0.0/24 (eth0, 1 Gb/s), which all hosts share; --liveness-network chooses another"
    )


def test_of_several_the_one_whose_slowest_link_is_the_fastest() -> None:
    hosts = [host("n1", eth(1), ib(1)), host("n2", eth(2), ib(2))]
    assert choose(hosts, "10.1.0.1").line == (
        "network: 10.9.0.0/16 (ib0, 200 Gb/s) of 2 that all hosts share; --liveness-network chooses another"
    )
    slow = [*hosts, host("n3", eth(3), ib(3, speed=100))]
    assert [found.interface for found in shared_networks(slow)] == ["eth0", "ib0"]


def test_of_equally_fast_ones_the_preferred_one_then_ipv4_then_the_first() -> None:
    def two(number: int) -> HostNetworks:
        links = [Interface(name, (f"10.{at}.0.{number}/24", f"fd0{at}::{number}/64")) for at, name in enumerate("abc")]
        return host(f"n{number}", *links)

    hosts = [two(1), two(2)]
    networks = ["10.0.0.0/24", "10.1.0.0/24", "10.2.0.0/24", "fd00::/64", "fd01::/64", "fd02::/64"]
    assert [found.network for found in shared_networks(hosts)] == networks
    assert choose(hosts, "10.2.0.1").network == "10.2.0.0/24"
    assert choose(hosts, "fd01::1").network == "fd01::/64"
    # not one of this host's
    assert choose(hosts, "192.0.2.1").network == "10.0.0.0/24"


@pytest.mark.parametrize("name", ["docker0", "br-0123456789ab", "virbr0", "cni0", "podman0"])
def test_bridges_of_containers_are_never_chosen(name: str) -> None:
    hosts = [host("n1", docker(1, name), eth(1)), host("n2", docker(2, name), eth(2))]
    assert [found.interface for found in shared_networks(hosts)] == ["eth0"]


def test_a_bridge_that_is_a_hosts_own_way_out_is_one_like_any() -> None:
    assert kind_of("br0", loopback=False, bridge=True, tunnel=False) == ""


def test_the_same_address_on_two_hosts_shows_that_it_is_not_one_network() -> None:
    links = [Interface("net0", (f"192.168.0.{number}/24",), 400_000) for number in (1, 1, 2)]
    hosts = [host(f"n{at}", link, eth(at + 1)) for at, link in enumerate(links)]
    assert [found.interface for found in shared_networks(hosts)] == ["eth0"]
    # as it is without the two that have it alike
    assert [found.interface for found in shared_networks(hosts[1:])] == ["net0", "eth0"]


@pytest.mark.parametrize(
    "link",
    [
        eth(1)._replace(up=False),
        Interface("eth0", ("169.254.0.1/16", "fe80::1/64")),
        docker(),
        Interface("eth0", ("10.1.0.1/32",)),
    ],
)
def test_what_is_down_link_local_or_a_network_of_its_own_is_not_shared(link: Interface) -> None:
    with pytest.raises(UsageError, match="share no network"):
        choose([host("n1", link), host("n2", eth(2))], "")


def test_a_tunnel_is_taken_where_nothing_else_is_shared() -> None:
    tunnels = [Interface("wg0", (f"10.8.0.{number}/24",), 100_000, kind=TUNNEL) for number in (1, 2)]
    hosts = [host("n1", tunnels[0], eth(1, speed=0)), host("n2", tunnels[1], eth(2, speed=0))]
    assert [found.interface for found in shared_networks(hosts)] == ["eth0", "wg0"]
    assert choose([host("n1", tunnels[0]), host("n2", tunnels[1])], "").address == "10.8.0.1"


def test_networks_of_unlike_length_are_one_where_each_sees_the_other() -> None:
    def at(address: str) -> HostNetworks:
        return host(address, Interface("eth0", (address,)))

    assert choose([at("10.1.0.1/16"), at("10.1.0.2/24")], "").network == "10.1.0.0/16"
    assert not shared_networks([at("10.1.5.1/16"), at("10.1.0.2/24")])


def test_hosts_that_route_to_each_other_need_no_shared_network() -> None:
    hosts = [host("n1", eth(1), routes=DEFAULT), host("n2", eth(2, third=2), routes=DEFAULT)]
    choice = choose(hosts, "10.1.0.1")
    assert (choice.address, choice.network) == ("10.1.0.1", "")
    assert "by the hosts' routes" in choice.line
    with pytest.raises(UsageError, match="share no network"):
        choose([hosts[0], hosts[1]._replace(routes=("10.2.0.0/24",))], "10.1.0.1")


def test_no_shared_network_is_an_error_that_lists_them() -> None:
    hosts = [host("n1", eth(1), docker()), host("n2", eth(2, third=2)._replace(up=False), docker())]
    with pytest.raises(UsageError) as raised:
        choose(hosts, "")
    assert str(raised.value).splitlines()[:3] == [
        "the hosts of this worker share no network",
        "  n1: eth0 10.1.0.1/24 fe80::1/64, docker0 172.17.0.1/16 (bridge)",
        "  n2: eth0 10.2.0.2/24 fe80::2/64 (down), docker0 172.17.0.1/16 (bridge)",
    ]
    assert raised.value.expected
    assert "--liveness-network" in raised.value.fix


@pytest.mark.parametrize(
    ("setting", "address", "network"),
    [
        ("ib0", "10.9.0.1", "10.9.0.0/16"),
        ("10.1.0.0/24", "10.1.0.1", "10.1.0.0/24"),
        ("10.0.0.0/8", "10.1.0.1", "10.0.0.0/8"),
        ("10.9.0.1", "10.9.0.1", "10.9.0.0/16"),
    ],
)
def test_the_user_chooses(setting: str, address: str, network: str) -> None:
    choice = choose([host("n1", eth(1), ib(1)), host("n2", eth(2), ib(2))], "", setting)
    assert (choice.address, choice.network) == (address, network)
    assert choice.line == f"network: {setting}, rank 0 at {address}"


@pytest.mark.parametrize("setting", ["ib0", "10.9.0.0/16", "10.9.0.1"])
def test_a_choice_that_a_host_lacks_is_refused_with_its_name(setting: str) -> None:
    hosts = [host("n1", eth(1), ib(1)), host("n2", eth(2), ib(2)), host("n3", eth(3))]
    with pytest.raises(UsageError, match=f"1 of 3 hosts have no address by {setting}: n3") as raised:
        choose(hosts, "", setting)
    assert "n3: eth0 10.1.0.3/24" in str(raised.value)
    # a way to all addresses is no reason to believe in one to this
    routed = [*hosts[:2], hosts[2]._replace(routes=DEFAULT)]
    if setting != "10.9.0.1":
        with pytest.raises(UsageError):
            choose(routed, "", setting)
    assert choose([*hosts[:2], hosts[2]._replace(routes=("10.9.0.0/16",))], "", setting).network == ""


@pytest.mark.parametrize("setting", ["lo", "127.0.0.1", "127.0.0.0/8", "ib7", "fe80::/10", "nonsense/", "10.77.0.0/16"])
def test_a_choice_that_rank_0_lacks_is_refused(setting: str) -> None:
    with pytest.raises(UsageError, match="rank 0's host n1 has no address by"):
        choose([host("n1", eth(1)), host("n2", eth(2))], "", setting)


def test_a_choice_that_is_each_hosts_own_network_is_refused() -> None:
    with pytest.raises(UsageError, match=r"docker0 is not one network: n1 and n2 both have 172\.17\.0\.1"):
        choose([host("n1", docker(), eth(1)), host("n2", docker(), eth(2))], "", "docker0")


def test_hosts_of_one_network_namespace_are_one() -> None:
    hosts = [host("n1", eth(1)), host("n2", eth(1))._replace(namespace="boot n1"), host("n3", eth(3))]
    assert [one.host for one in distinct(hosts)] == ["n1", "n3"]
    unknown = [one._replace(namespace="") for one in hosts]
    assert [one.host for one in distinct(unknown)] == ["n1", "n2", "n3"]


def test_the_address_of_a_host_that_has_no_name() -> None:
    tunnel = Interface("wg0", ("10.8.0.1/24",), 400_000, kind=TUNNEL)
    assert best_address(host("n1", docker(), tunnel, eth(1), ib(1))) == "10.9.0.1"
    assert best_address(host("n1", docker())) == ""


ADDRESSES = st.builds(
    "10.{}.{}.{}/{}".format, st.integers(0, 1), st.integers(0, 1), st.integers(1, 5), st.sampled_from([16, 24, 32])
)
LINKS = st.builds(
    Interface,
    st.sampled_from(["eth0", "eth1", "ib0"]),
    st.lists(ADDRESSES | st.sampled_from(["fd00::1/64", "fd00::2/64", "fe80::1/64"]), max_size=3).map(tuple),
    st.sampled_from([0, 1000, 200_000]),
    st.booleans(),
    st.sampled_from(["", "", "", LOOPBACK, BRIDGE, TUNNEL]),
)
HOSTS = st.lists(st.lists(LINKS, max_size=3), min_size=2, max_size=4).map(
    lambda all_links: [host(f"n{at}", *links) for at, links in enumerate(all_links)]
)


@given(HOSTS)
def test_whatever_is_shared_is_shared_by_all(hosts: list[HostNetworks]) -> None:
    for shared in shared_networks(hosts):
        network = ip_network(shared.network)
        members = [{str(found.ip) for _, found in usable(one) if found.ip in network} for one in hosts]
        assert all(members)
        assert shared.address in members[0]
        everything = [{text.partition("/")[0] for link in one.interfaces for text in link.addresses} for one in hosts]
        inside = [{text for text in some if ip_address(text) in network} for some in everything]
        assert len(set().union(*inside)) == sum(map(len, inside))


@given(HOSTS, st.sampled_from(["", "10.0.0.1", "10.1.1.2", "fd00::1"]))
def test_a_choice_is_never_loopback_and_always_an_address_of_rank_0(hosts: list[HostNetworks], preferred: str) -> None:
    try:
        choice = choose(hosts, preferred)
    except UsageError:
        return
    assert choice.address in {str(found.ip) for _, found in usable(hosts[0])}
    assert not ip_address(choice.address).is_loopback
    assert choice == choose([hosts[0], *reversed(hosts[1:])], preferred)


@given(HOSTS)
def test_all_hosts_come_to_the_same_network_where_their_masks_agree(hosts: list[HostNetworks]) -> None:
    masks = {ip_interface(text).network.prefixlen for one in hosts for _, found in usable(one) for text in [str(found)]}
    if len(masks) == 1:
        mine, theirs = (
            {found.network for found in shared_networks(order)} for order in (hosts, [*hosts[1:], hosts[0]])
        )
        assert mine == theirs


@given(HOSTS)
def test_networks_travel(hosts: list[HostNetworks]) -> None:
    for one in hosts:
        assert HostNetworks.unpack(one.host, one.pack()) == one


@pytest.mark.parametrize("values", [(), ("a",), ("a", "2", "10.0.0.0/8"), ("a", "x"), ("a", "0", "eth0", "1")])
def test_what_are_no_networks_is_refused(values: tuple[str, ...]) -> None:
    with pytest.raises(ValueError):
        HostNetworks.unpack("n1", values)


# -- this host ------------------------------------------------------------------------------------------------------------


def test_the_networks_of_this_host() -> None:
    own = host_networks("me")
    assert own.host == "me"
    assert own.namespace.endswith(f" {Path('/proc/self/ns/net').stat().st_ino}")
    loopback = next(link for link in own.interfaces if link.name == "lo")
    assert (loopback.kind, loopback.up, loopback.addresses[0]) == (LOOPBACK, True, "127.0.0.1/8")
    assert HostNetworks.unpack("me", own.pack()) == own


@pytest.mark.parametrize(("text", "speed"), [("200000\n", 200_000), ("-1\n", 0), ("4294967295\n", 0), ("", 0)])
def test_the_speed_of_a_link(tmp_path: Path, text: str, speed: int) -> None:
    folder = tmp_path / "class/net/lo"
    folder.mkdir(parents=True)
    (folder / "ifindex").write_text("1\n")
    (folder / "speed").write_text(text)
    assert next(link for link in host_networks(sys=str(tmp_path)).interfaces if link.name == "lo").speed == speed
    # /sys of another network namespace
    (folder / "ifindex").write_text("77\n")
    assert next(link for link in host_networks(sys=str(tmp_path)).interfaces if link.name == "lo").speed == 0


ROUTE = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t0000010A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
eth0\t00000000\t0100010A\t0003\t0\t0\t0\t00000000\t0\t0\t0
*\t00004D0A\t00000000\t0201\t0\t0\t0\t0000FFFF\t0\t0\t0
eth0\t0000FEA9\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
"""
NONE = "0" * 32
ROUTE_6 = (
    f"fd{'0' * 30} 40 {NONE} 00 {NONE} 00000100 00000003 00000000 00000001     eth0\n"
    f"{NONE} 00 {NONE} 00 {NONE} ffffffff 00000001 00000000 00200200       lo\n"
)


@pytest.mark.skipif(sys.byteorder != "little", reason="written by a little-endian kernel")
def test_routes(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net/route").write_text(ROUTE)
    (tmp_path / "net/ipv6_route").write_text(ROUTE_6)
    assert host_networks(proc=str(tmp_path)).routes == ("0.0.0.0/0", "10.1.0.0/24", "fd00::/64")
    assert host_networks(proc=str(tmp_path)).namespace == ""


def test_a_kernel_without_the_information_gives_an_empty_list(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(question: int) -> None:
        raise OSError(question)

    monkeypatch.setattr(interfaces, "_dump", refuse)
    assert host_networks().interfaces == ()


# -- rank 0 -----------------------------------------------------------------------------------------------------------------


def card(one: HostNetworks, *, reports: bool = True) -> RankReport:
    return RankReport(one.host, "", "1.0", (), networks=one.pack() if reports else ())


def test_where_all_ranks_are_on_one_host_nothing_is_chosen() -> None:
    n1, n2 = host("n1", eth(1)), host("n2", eth(2))
    assert choose_rank0_address([card(n1), card(n1, reports=False)], None) is None
    # two names, one network namespace
    assert choose_rank0_address([card(n1), card(n2._replace(namespace=n1.namespace))], None) is None


def test_a_setting_that_fits_no_address_is_refused() -> None:
    n1 = host("n1", eth(1))
    assert choose_rank0_address([card(n1), card(n1)], "127.0.0.1") is None
    with pytest.raises(UsageError, match="this host has no address by nonsense"):
        choose_rank0_address([card(n1), card(n1)], "nonsense")
    # a world of one rank has no connections
    assert choose_rank0_address([card(n1)], "nonsense") is None


def test_the_ranks_of_several_hosts_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "known_address", lambda: "")
    n1, n2 = host("n1", eth(1)), host("n2", eth(2))
    # rank 0 isn't the first of its node
    choice = choose_rank0_address([card(n1, reports=False), card(n2), card(n1)], None)
    assert choice is not None
    assert choice.address == "10.1.0.1"


@pytest.mark.parametrize(
    ("links", "routes", "etcd", "wanted"),
    [
        # loopback alone
        ((), (), [], {"DYN_TCP_RPC_HOST": "127.0.0.1", "DYN_TCP_RESPONSE_STREAM_HOST": "lo"}),
        # as the runtime finds it
        ((eth(1),), DEFAULT, [], {}),
        # a closed network
        ((eth(1),), (), ["http://127.0.0.1:2379"], {"DYN_TCP_RPC_HOST": "10.1.0.1"}),
        ((eth(1), ib(1)), (), ["http://127.0.0.1:2379"], {"DYN_TCP_RPC_HOST": "10.9.0.1"}),
        # where etcd is reached
        ((eth(1), ib(1)), (), ["http://10.1.0.7:2379"], {"DYN_TCP_RPC_HOST": "10.1.0.1"}),
        ((Interface("eth0", ("fd00::1/64",)),), (), [], {"DYN_TCP_RPC_HOST": "[fd00::1]"}),
    ],
)
def test_what_the_runtime_gets_on_one_host(
    monkeypatch: pytest.MonkeyPatch,
    links: tuple[Interface, ...],
    routes: tuple[str, ...],
    etcd: list[str],
    wanted: dict[str, str],
) -> None:
    own = host("n1", *links, routes=routes)
    monkeypatch.setattr(reach, "host_networks", lambda: own)
    monkeypatch.setattr(reach, "host_address", lambda *_: best_address(own))
    monkeypatch.setattr(reach, "source_address", lambda _, address: "10.1.0.1" if address == "10.1.0.7" else address)
    environ: dict[str, str] = {}
    set_runtime_address(None, etcd, environ)
    assert environ == wanted
    chosen = dict.fromkeys(("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST"), "the user's")
    set_runtime_address(None, etcd, chosen)
    assert set(chosen.values()) == {"the user's"}


@pytest.mark.parametrize(
    ("etcd", "address"),
    [("http://localhost:2379", "10.9.0.1"), ("http://10.9.3.3:2379", "10.9.0.1"), ("10.1.0.7", "10.1.0.1")],
)
def test_what_the_runtime_gets_on_several_hosts(monkeypatch: pytest.MonkeyPatch, etcd: str, address: str) -> None:
    own = host("n1", eth(1), ib(1), routes=DEFAULT)
    choice = choose([own, host("n2", eth(2), ib(2))], "")
    monkeypatch.setattr(reach, "host_networks", lambda: own)
    sources = {"10.1.0.7": "10.1.0.1", "10.9.3.3": "10.9.0.1"}
    monkeypatch.setattr(reach, "source_address", lambda _, there: sources.get(there, there))
    environ = {"DYN_TCP_RPC_HOST": ""}
    set_runtime_address(choice, [etcd], environ)
    assert environ == {"DYN_TCP_RPC_HOST": address}
