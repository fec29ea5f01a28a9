# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo_mpi.head_node``: etcd, NATS and the Dynamo frontend of one job. See `deploy.head_node`."""

from __future__ import annotations

from dynamo_mpi.deploy.head_node import main

if __name__ == "__main__":
    raise SystemExit(main())
