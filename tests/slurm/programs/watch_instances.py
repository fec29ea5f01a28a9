# SPDX-License-Identifier: Apache-2.0
"""Print Dynamo's instances in a deployment's etcd whenever they change: ``watch_instances.py RUN_DIR``; a line is the time and their keys."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from dynamo_mpi.discovery.etcd import EtcdAuth, etcd_endpoints
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient


def main() -> None:
    environ = json.loads((Path(sys.argv[1]) / "services.json").read_text())["environment"]
    etcd = GrpcEtcdClient(etcd_endpoints(environ), EtcdAuth.from_env(environ), 5)
    last = None
    while True:
        now = sorted(entry.key for entry in etcd.get_prefix("v1/instances/"))
        if now != last:
            print(f"{time.time():.3f}", *now, flush=True)
            last = now
        time.sleep(0.02)


if __name__ == "__main__":
    main()
