# SPDX-License-Identifier: Apache-2.0
"""Lists the worker records of a Dynamo namespace from etcd: which workers there are, their phase, layout and place.

    ETCD_ENDPOINTS=http://HEAD:2379 python examples/read_worker_records.py [NAMESPACE]

The namespace is `dynamo` by default; `dynamo-mpi local` and the scripts of a job have one of their own, which `dynamo-mpi status` shows.

Addresses and credentials are those of a worker: DYN_MPI_SERVICES_FILE=services.json of a run folder, or ETCD_AUTH_*. The exit code is
0, 69 if etcd does not answer, or 77 if it refuses the credentials.
"""

from __future__ import annotations

import os
import sys

from dynamo_mpi.common.credentials import clients_of
from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.errors import DynamoMpiError, ExitCode
from dynamo_mpi.discovery.etcd_http import query_etcd
from dynamo_mpi.discovery.records import list_workers

SECONDS = 5.0


def main(namespace: str = "dynamo") -> int:
    """Print a line for each record; return the exit code."""
    # tolerant: a record of another version may have other members
    problems: dict[str, list[str]] = {}
    try:
        workers, unreadable = query_etcd(
            clients_of(os.environ), SECONDS, lambda etcd: list_workers(etcd, namespace, problems)
        )
    except DynamoMpiError as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code
    for worker in workers:
        record = worker.record
        # anybody who may write to etcd has written it: no escape sequence of theirs reaches the terminal
        print(
            sanitize(
                f"{record.model}: {record.place}, {record.layout}, phase {record.phase}, instance {record.instance}"
            )
        )
    for key, reason in unreadable.items():
        print(sanitize(f"{key} can't be read: {reason}"), file=sys.stderr)
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__, file=sys.stderr)
        sys.exit(ExitCode.USAGE)
    sys.exit(main(*sys.argv[1:]))
