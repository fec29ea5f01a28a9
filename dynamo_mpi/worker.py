# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo_mpi.worker``: the same command in every rank; together they become one Dynamo worker. See `runtime.main`."""

from __future__ import annotations

from dynamo_mpi.runtime.main import exit_process, main

if __name__ == "__main__":
    exit_process(main())
