# SPDX-License-Identifier: Apache-2.0
"""Finds, imports and sets up NIXL: never before it is asked for, and with the reason and the cure where that can't be done."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynamo_mpi.errors import UsageError
from dynamo_mpi.services.host_address import host_address, interface_addresses

_PACKAGES = ("nixl", "nixl_cu12", "nixl_cu13")
_INFINIBAND = Path("/sys/class/infiniband")
_CURE = "pip install --no-deps nixl-cu12 (NVIDIA's containers have nixl), or --kv-transport tcp on the prefill worker"


def nixl_installed() -> bool:
    """Tell whether there is a package of NIXL, without importing it."""
    return any(importlib.util.find_spec(name) is not None for name in _PACKAGES)


def missing_nixl() -> UsageError:
    """Return the error for a host without NIXL."""
    return UsageError("NIXL is not installed here", needed="it on every rank's host, for KV by NIXL", fix=_CURE)


def new_agent(network: str | None) -> Any:
    """Return an agent with UCX, without the thread that would burn a core.

    Args:
        network: interface, network or address of this host, the one Ethernet to listen on; None leaves it to UCX and its variables.

    Raises:
        UsageError: NIXL is missing or doesn't work here, or this host has no such address.
    """
    nixl = _import_nixl()
    try:
        variables = _ucx_variables(network)
        config = nixl.nixl_agent_config(
            enable_prog_thread=False, backends=[], sync_mode=nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        )
        # nobody else's may have this name
        agent = nixl.nixl_agent(secrets.token_hex(8), config)
        with _environment(variables):
            agent.create_backend("UCX")
    except UsageError:
        raise
    except Exception as error:  # NIXL has a class of its own for each
        raise unusable(f"{type(error).__name__}: {error}") from None
    return agent


def _import_nixl() -> Any:
    for name in _PACKAGES:
        try:
            nixl = importlib.import_module(f"{name}._api")
        except ModuleNotFoundError as error:
            if error.name in (name, f"{name}._api"):
                continue
            raise unusable(f"{name} needs {error.name}, which is not installed") from None
        except (ImportError, OSError) as error:  # a library that it needs
            raise unusable(str(error)) from None
        logger = logging.getLogger("nixl")
        logger.handlers.clear()  # it writes to stdout, which is not ours to write to
        logger.propagate = True
        if "NIXL_LOG_LEVEL" not in os.environ:
            logger.setLevel(logging.WARNING)
        return nixl
    raise missing_nixl()


def unusable(why: str) -> UsageError:
    """Return the error for a host whose NIXL doesn't work."""
    return UsageError(f"NIXL can't be used on this host: {why}", needed="a NIXL with its UCX backend", fix=_CURE)


def _ucx_variables(network: str | None) -> dict[str, str]:
    """Return what UCX is to be told, unless its user has told it something else.

    NIXL's wheel brings libraries for InfiniBand that collide with the system's, and end the process by SIGSEGV when it exits: they stay
    out where there is no InfiniBand. Interfaces are excluded, not chosen: a choice would exclude devices that aren't interfaces.
    """
    variables = {}
    if not (_INFINIBAND.is_dir() and any(_INFINIBAND.iterdir())):
        variables["UCX_MODULES"] = "^ib"
    if network is not None:
        address = host_address(network, "--kv-network / DYN_MPI_KV_NETWORK")
        others = [name for name, found in interface_addresses().items() if address not in map(str, found)]
        if others:
            variables["UCX_NET_DEVICES"] = "^" + ",".join(others)
    return {name: value for name, value in variables.items() if name not in os.environ}


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables for a while: MPI's own UCX reads the same ones."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
