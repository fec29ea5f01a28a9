# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's own way to start a multi-node LLM, in little: what its ``trtllm-llmapi-launch`` does in each rank.

Usage, under mpirun: standin_launcher.py PID_FILE COMMAND...

Rank 0 starts COMMAND outside MPI, joined by TLLM_SPAWN_PROXY_PROCESS*, writes its pid to PID_FILE, serves it, and ends with
its exit code. The other ranks wait for tasks.
"""

from __future__ import annotations

import importlib
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import mpi4py

mpi4py.rc.initialize = False  # the package does it, as for any launcher

_LAUNCHER_VARIABLES = ("OMPI_", "PMIX_", "PMI_", "SLURM_", "MPI_", "I_MPI_", "HYDRA_", "MPICH_", "PRTE_")


def start_child(pid_file: Path, command: list[str], world_size: int) -> subprocess.Popen[bytes]:
    """Start the process that holds the LLM."""
    os.environ["TLLM_SPAWN_PROXY_PROCESS"] = "1"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER_VARIABLES)}
    child = subprocess.Popen(command, env=environment | {"tllm_mpi_size": str(world_size)})
    pid_file.write_text(str(child.pid))
    return child


def stop_server_after(child: subprocess.Popen[bytes], address: str, key: bytes) -> None:
    """Wait for the child and report to the server that nothing more comes."""
    ipc = importlib.import_module("tensorrt_llm.executor.ipc")
    child.wait()
    queue = ipc.ZeroMqQueue((address, key), is_server=False)
    queue.put(None)
    queue.close()


def main() -> int:
    importlib.import_module("tensorrt_llm")
    from mpi4py import MPI
    from mpi4py.futures import MPICommExecutor

    world = MPI.COMM_WORLD
    if world.Get_rank() != 0:
        with MPICommExecutor(world):
            return 0
    with tempfile.TemporaryDirectory(prefix="standin-launcher-") as folder:
        address, key = f"ipc://{folder}/session", secrets.token_bytes(32)
        os.environ["TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR"] = address
        os.environ["TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY"] = key.hex()
        child = start_child(Path(sys.argv[1]), sys.argv[2:], world.Get_size())
        threading.Thread(target=stop_server_after, args=(child, address, key)).start()
        importlib.import_module("tensorrt_llm.llmapi.mgmn_leader_node").launch_server_main()
        return child.wait()


if __name__ == "__main__":
    sys.exit(main())
