# SPDX-License-Identifier: Apache-2.0
"""What a launcher runs in rank 0, beside the process that holds the LLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorrt_llm._utils import mpi_world_size
from tensorrt_llm.executor.utils import get_spawn_proxy_process_ipc_addr_env, get_spawn_proxy_process_ipc_hmac_key_env

from .mpi_session import RemoteMpiCommSessionServer

if TYPE_CHECKING:
    from mpi4py import MPI


def launch_server_main(sub_comm: MPI.Intracomm | None = None) -> None:
    """Serve tasks at the address of the environment until a client sends None."""
    address = get_spawn_proxy_process_ipc_addr_env()
    assert address is not None, "TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR is not set."
    RemoteMpiCommSessionServer(
        hmac_key=get_spawn_proxy_process_ipc_hmac_key_env(),
        n_workers=mpi_world_size() if sub_comm is None else sub_comm.Get_size(),
        addr=address,
        comm=sub_comm,
        is_comm=True,
    ).serve()


if __name__ == "__main__":
    launch_server_main()
