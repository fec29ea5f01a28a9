# SPDX-License-Identifier: Apache-2.0
"""How the process that holds the LLM finds the ranks that a launcher started for it."""

from __future__ import annotations

import enum
import os
from typing import NamedTuple

from tensorrt_llm._utils import mpi_rank
from tensorrt_llm.llmapi.mpi_session import RemoteMpiCommSessionClient


class RequestError(RuntimeError):
    """A request failed; the engine goes on."""


class LlmLauncherEnvs(str, enum.Enum):
    """The launcher's variables."""

    TLLM_SPAWN_PROXY_PROCESS = "TLLM_SPAWN_PROXY_PROCESS"
    TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR = "TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR"
    TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY = "TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY"


class WorkerCommIpcAddrs(NamedTuple):
    """Endpoint and key of each of the proxy's queues."""

    request_queue_addr: tuple[str, bytes | None]
    worker_init_status_queue_addr: tuple[str, bytes | None]
    result_queue_addr: tuple[str, bytes | None]


def get_spawn_proxy_process_env() -> bool:
    """Return whether a launcher started the ranks."""
    return os.environ.get(LlmLauncherEnvs.TLLM_SPAWN_PROXY_PROCESS.value) == "1"


def get_spawn_proxy_process_ipc_addr_env() -> str | None:
    """Return where rank 0 listens."""
    return os.environ.get(LlmLauncherEnvs.TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR.value)


def get_spawn_proxy_process_ipc_hmac_key_env() -> bytes:
    """Return the key, which the environment holds as hexadecimal digits."""
    name = LlmLauncherEnvs.TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY.value
    key = os.environ.get(name)
    assert key is not None, f"{name} is not set. HMAC encryption is required for IPC communication."
    return bytes.fromhex(key)


def create_mpi_comm_session(n_workers: int) -> RemoteMpiCommSessionClient:
    """Return the session of the launcher's ranks."""
    assert mpi_rank() == 0, f"create_mpi_comm_session must be called by rank 0, but it was called by rank {mpi_rank()}"
    if not get_spawn_proxy_process_env():
        raise RuntimeError(
            f"the real one would call MPI_Comm_spawn for {n_workers} workers here, which the stand-in never does: "
            "set TLLM_SPAWN_PROXY_PROCESS=1 with ..._IPC_ADDR and ..._IPC_HMAC_KEY, or pass _mpi_session"
        )
    address = get_spawn_proxy_process_ipc_addr_env()
    assert address, f"{LlmLauncherEnvs.TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR.value} is not set."
    return RemoteMpiCommSessionClient(address, get_spawn_proxy_process_ipc_hmac_key_env())
