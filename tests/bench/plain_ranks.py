# SPDX-License-Identifier: Apache-2.0
"""Plain mpi4py ranks in a collective, of which one meets a fault: ``plain_ranks.py FAULT RANK``. For `faults.py` alone."""

from __future__ import annotations

import os
import signal
import sys
import time

from mpi4py import MPI


def main() -> None:
    """Meet in a barrier a few times; then the fault."""
    fault, victim = sys.argv[1], int(sys.argv[2])
    comm = MPI.COMM_WORLD
    for _ in range(3):
        comm.Barrier()
    if comm.Get_rank() == victim:
        time.sleep(0.3)  # the others are in the barrier
        os.write(2, b"fault: now\n")
        if fault in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        elif fault.startswith("exit"):
            os._exit(int(fault.removeprefix("exit")))
        raise RuntimeError("an exception")
    comm.Barrier()


if __name__ == "__main__":
    main()
