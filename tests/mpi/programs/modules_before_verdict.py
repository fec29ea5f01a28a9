# SPDX-License-Identifier: Apache-2.0
"""Run the worker, and write down which modules each rank imported beyond those that ``from mpi4py import MPI`` brings.

Usage: ``modules_before_verdict.py FOLDER WORKER_ARGUMENT...``. Writes ``FOLDER/RANK``, one module a line.
"""

from __future__ import annotations

import os
import sys

import mpi4py

# as dynamo_mpi.mpi.world has it: both are read when MPI is imported
mpi4py.rc.initialize = False
mpi4py.rc.finalize = True
from mpi4py import MPI  # noqa: E402 - not before the line above

before = set(sys.modules)

from dynamo_mpi.runtime.main import main  # noqa: E402 - its imports are what is counted

code = main(sys.argv[2:])
after = set(sys.modules) - before
with open(os.path.join(sys.argv[1], str(MPI.COMM_WORLD.rank)), "x") as stream:
    stream.write("\n".join(sorted(after)))
sys.exit(code)
