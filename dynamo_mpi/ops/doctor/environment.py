# SPDX-License-Identifier: Apache-2.0
"""Doctor's checks of environment variables that are known to be harmful, and of cache folders. Values that may be secrets are never shown."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from dynamo_mpi.common.display import sanitize, shell_word
from dynamo_mpi.config.variables import unknown_variables
from dynamo_mpi.discovery.etcd import etcd_endpoints
from dynamo_mpi.layout.format import listed
from dynamo_mpi.ops.doctor.check import Check, Context, Probe, Section, ok, skipped, warning
from dynamo_mpi.ops.doctor.services import clients_of

_LOOPBACK = ("localhost", "127.0.0.1")
_PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "grpc_proxy")
_MCA = ("OMPI_MCA_", "PRTE_MCA_", "PMIX_MCA_")


def _is_on(value: str) -> bool:
    return value.strip().lower() not in ("", "0", "false", "no", "off")


def _is_set(value: str) -> bool:
    return bool(value)


class Harm(NamedTuple):
    """A harmful variable.

    Args:
        name: its name.
        when: returns whether a value is harmful.
        expected: what is expected instead, and the effect.
        launched: whether a launcher sets it itself in its ranks, in which it is harmless.
    """

    name: str
    when: Callable[[str], bool]
    expected: str
    launched: bool = False


HARMS = (
    Harm("TLLM_DISABLE_MPI", _is_on, "unset: TensorRT-LLM would not use the ranks that MPI starts"),
    Harm("TLLM_WORKER_USE_SINGLE_PROCESS", _is_on, "unset: TensorRT-LLM would run in one process"),
    Harm("TLLM_SPAWN_PROXY_PROCESS", _is_on, "unset: the worker sets it for the one process that it is meant for"),
    Harm("TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR", _is_set, "unset: it leads to another world's ranks"),
    Harm(
        "TRTLLM_EPLB_SHM_NAME",
        _is_set,
        "a name of its own for each launch: segments of the load balancer are found by it",
    ),
    Harm("MPI4PY_MPIABI", _is_set, "unset: with it mpi4py doesn't open the library that MPI4PY_LIBMPI names"),
    Harm("OMPI_MCA_pmix", _is_set, "unset: Open MPI finds its launcher by itself", launched=True),
    Harm("OMPI_MCA_ess", _is_set, "unset: it keeps Open MPI from asking its launcher", launched=True),
    Harm("OMPI_MCA_plm", _is_set, "unset: mpirun would start its daemons in another way", launched=True),
    Harm(
        "PMIX_NAMESPACE",
        _is_set,
        "unset: a launcher that is started here would take itself for a rank of that world",
        launched=True,
    ),
    Harm("CUDA_LAUNCH_BLOCKING", _is_on, "unset: every kernel is waited for"),
    Harm("NCCL_P2P_DISABLE", _is_on, "unset: GPUs of a node would not reach each other by NVLink"),
    Harm("NCCL_SHM_DISABLE", _is_on, "unset: GPUs of a node would reach each other by the network"),
    Harm("NCCL_IB_DISABLE", _is_on, "unset: nodes would reach each other by TCP"),
    Harm("DYN_MPI_FAULT", _is_set, "unset: it makes a rank fail on purpose"),
)


def check_variables(context: Context) -> Iterator[Check]:
    """Check for harmful variables."""
    found = [*judge_variables(context.environ, in_rank=context.in_rank), *judge_names(context.environ)]
    yield from found or [ok("variables", "none that is known to harm")]
    yield describe_mca(context.environ)


def judge_variables(environ: Mapping[str, str], *, in_rank: bool) -> Iterator[Check]:
    """Evaluate each variable of `HARMS` that is set."""
    for harm in HARMS:
        value = environ.get(harm.name, "")
        if harm.when(value) and not (harm.launched and in_rank):
            yield warning(harm.name, f"{harm.name} is set", harm.expected, f"unset {harm.name}")


def judge_names(environ: Mapping[str, str]) -> Iterator[Check]:
    """Evaluate the names of this project's variables."""
    for name, found in unknown_variables(environ).items():
        yield warning(
            sanitize(name, 60), found, "names of docs/reference/settings.md", f"correct or unset {shell_word(name)}"
        )


def describe_mca(environ: Mapping[str, str]) -> Check:
    """List the parameters of Open MPI, PRRTE and PMIx that are set: they help to explain problems."""
    names = sorted(name for name in environ if name.startswith(_MCA))
    return ok("mca", f"set: {listed(names)}" if names else "no parameter of Open MPI, PRRTE or PMIx is set")


def check_proxies(context: Context) -> Iterator[Check]:
    """Check whether a proxy would intercept connections to etcd, NATS or the frontend."""
    hosts = [
        urlsplit(url if "://" in url else f"http://{url}").hostname or "" for url in etcd_endpoints(clients_of(context))
    ]
    yield judge_proxies(context.environ, [*_LOOPBACK, *filter(None, hosts)])


def judge_proxies(environ: Mapping[str, str], hosts: Sequence[str]) -> Check:
    """Evaluate the proxy variables for these hosts. The clients of etcd and NATS, curl and Python all use them, with the same exceptions."""
    proxies = [name for name in _PROXIES if environ.get(name)]
    if not proxies:
        return ok("proxy", "no proxy is set")
    exceptions = environ.get("no_proxy") or environ.get("NO_PROXY", "")
    caught = [host for host in dict.fromkeys(hosts) if not bypasses(host, exceptions)]
    if not caught:
        return ok("proxy", f"{listed(proxies)} set, and no_proxy leaves out {listed(dict.fromkeys(hosts))}")
    return warning(
        "proxy",
        f"{listed(proxies)} set, and no_proxy doesn't leave out {listed(caught)}",
        "services of the cluster without a proxy between: it refuses them, or keeps streams back",
        f"export no_proxy={','.join(filter(None, [exceptions, *caught]))} NO_PROXY=$no_proxy",
    )


def bypasses(host: str, exceptions: str) -> bool:
    """Return whether ``no_proxy`` excludes a host: by its name, by a domain suffix, by ``*``, or, as in Go, by a network."""
    for entry in (one.strip().lower() for one in exceptions.split(",")):
        name = entry.removeprefix("*").removeprefix(".").partition(":")[0] if entry != "*" else "*"
        if name == "*" or (name and (host.lower() == name or host.lower().endswith(f".{name}"))):
            return True
        if "/" in entry and _in_network(host, entry):
            return True
    return False


def check_caches(context: Context) -> Iterator[Check]:
    """Check whether the cache folders of the hub's client, torch and Triton are writable."""
    for id, folder in cache_folders(context.environ).items():
        yield judge_cache(id, folder, _why_unwritable(folder))


def cache_folders(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the cache folders by setting."""
    home = environ.get("HOME", "")
    named = {
        name: environ[name]
        for name in ("HF_HOME", "HF_HUB_CACHE", "TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE")
        if environ.get(name)
    }
    return {**named, "HOME": home} if home else named


def judge_cache(id: str, folder: str, problem: str) -> Check:
    """Evaluate one folder."""
    if not problem:
        return ok(id, f"{folder} can be written")
    needed = "a folder that this user can write: models, kernels and tokenizers are kept there"
    fix = "HOME=/a/folder" if id == "HOME" else f"another {id}"
    return warning(id, f"{folder}: {problem}", needed, f"{fix}; Pyxis: --container-mount-home, or --container-writable")


def _why_unwritable(folder: str) -> str:
    """Check without writing; if the folder doesn't exist, it must be possible to create it."""
    place = os.path.abspath(folder)
    while not os.path.exists(place) and place != os.path.dirname(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        return f"{place} is no folder"
    return "" if os.access(place, os.W_OK | os.X_OK) else f"{place} can't be written"


def _in_network(host: str, network: str) -> bool:
    from ipaddress import ip_address, ip_network

    try:
        return ip_address(host) in ip_network(network, strict=False)
    except ValueError:
        return False


def check_secrets(context: Context) -> Iterator[Check]:
    """Report that credentials are set, never their values."""
    names = [
        name
        for name in ("ETCD_AUTH_PASSWORD", "ETCD_AUTH_CLIENT_KEY", "NATS_AUTH_PASSWORD", "NATS_AUTH_TOKEN", "HF_TOKEN")
        if context.environ.get(name)
    ]
    yield ok("credentials", f"set: {listed(names)}") if names else skipped("credentials", "none in the environment")


SECTION = Section(
    "environment",
    (
        Probe("variables", check_variables),
        Probe("proxy", check_proxies),
        Probe("caches", check_caches),
        Probe("credentials", check_secrets),
    ),
)
