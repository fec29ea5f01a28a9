# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo_mpi.worker``: the same command in every rank; together they become one Dynamo worker. See `runtime.main`."""

from __future__ import annotations

if __name__ == "__main__":
    import gc

    # the start makes no garbage; what goes on after the preflight enables it
    gc.disable()

    from dynamo_mpi.runtime.main import exit_process, main

    exit_process(main())
