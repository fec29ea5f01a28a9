# SPDX-License-Identifier: Apache-2.0
"""How long `dynamo-mpi status` takes from a cold start, Python's own included: etcd is asked for 32 workers, openly and over mutual TLS.

Prints medians of whole processes, their peak memory, the ratio to a bare Python, and which heavy packages it imports (none).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dynamo_mpi.discovery.etcd import EtcdAuth
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient
from dynamo_mpi.discovery.records import record_key
from tests.bench.check_start import IMPORTED, RUNS, report, run
from tests.certificates import certificates
from tests.servers import running_etcd, running_secured_etcd
from tests.unit.worlds import world

WORKERS, GOAL_SECONDS = 32, 0.4


def fill(url: str, credentials: dict[str, str]) -> None:
    """Write the records of many workers. In a process of its own: what it imports would count as memory of all that is started later."""

    def write() -> None:
        etcd = GrpcEtcdClient([url], EtcdAuth.from_env(credentials), 5)
        for lease in (etcd.grant(600).id for _ in range(WORKERS)):
            record = world("decode", hosts=tuple(f"n{number}" for number in range(16)))
            etcd.put(record_key(record, lease), record.pack(), lease)
        etcd.close()

    writer = multiprocessing.get_context("fork").Process(target=write)
    writer.start()
    writer.join()
    assert writer.exitcode == 0


def main() -> None:
    """Print all figures."""
    python = sys.executable
    bare = statistics.median(run([python, "-c", "pass"]).wall for _ in range(RUNS))
    print(f"a bare Python: median {bare * 1000:.0f} ms", flush=True)
    command = [python, "-m", "dynamo_mpi", "status"]
    with tempfile.TemporaryDirectory() as scratch:
        with running_etcd() as url:
            fill(url, {})
            os.environ["ETCD_ENDPOINTS"] = url
            report(f"status of {WORKERS} workers", command, bare, GOAL_SECONDS)
            run([python, "-c", IMPORTED, "status"])
            del os.environ["ETCD_ENDPOINTS"]
        files = certificates(Path(scratch, "tls"))
        credentials = files.client_environment()
        with running_secured_etcd(files) as url:
            fill(url, credentials)
            environment = {"ETCD_ENDPOINTS": url, **credentials}
            Path(scratch, "services.json").write_text(json.dumps({"url": None, "environment": environment}))
            report("the same, a run folder and mutual TLS", [*command, "--run-dir", scratch], bare, GOAL_SECONDS)


if __name__ == "__main__":
    main()
