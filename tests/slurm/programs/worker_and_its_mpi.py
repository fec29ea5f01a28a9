# SPDX-License-Identifier: Apache-2.0
"""Be ``python -m dynamo_mpi.worker``, and print MPI_STARTED at the end if MPI was started."""

import sys

from dynamo_mpi.runtime.main import main

code = main()

# the worker has chosen and bound the library; this is the one it would have started
from mpi4py import MPI  # noqa: E402

if MPI.Is_initialized():
    print("MPI_STARTED", flush=True)
sys.exit(code)
