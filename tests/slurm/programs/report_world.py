# SPDX-License-Identifier: Apache-2.0
"""Print the rank, the size of its world, its host and its MPI library, as one line of JSON."""

import json

from mpi4py import MPI

WORLD = MPI.COMM_WORLD
FACTS = (WORLD.rank, WORLD.size, MPI.Get_processor_name(), MPI.Get_library_version().split(",")[0].split("\n")[0])
# one write, and only from rank 0: lines of several ranks may be mixed by their launcher
GATHERED = WORLD.gather(FACTS)
if GATHERED:
    print(json.dumps(GATHERED))
