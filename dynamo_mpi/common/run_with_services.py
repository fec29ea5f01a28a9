# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo_mpi.common.run_with_services MODULE ARGUMENT…``: as ``python -m MODULE ARGUMENT…``, with the variables of the file that
``DYN_MPI_SERVICES_FILE`` names.

Dynamo's runtime reads credentials from variables only. Set here, they aren't in ``/proc/PID/environ``.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys

from dynamo_mpi.common.credentials import DESCRIPTORS, SERVICES_FILE, export_secrets, load_services
from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.process import forbid_core_dumps


def use_services_file() -> None:
    """Set the variables of the services file, close it if it is a file in memory, and write no core dumps from now on.

    Raises:
        UsageError, AuthorizationError: it can't be read.
    """
    load_services()
    export_secrets()
    forbid_core_dumps()
    place = os.environ.pop(SERVICES_FILE, "")
    if place.startswith(DESCRIPTORS):
        with contextlib.suppress(OSError, ValueError):
            os.close(int(place.removeprefix(DESCRIPTORS)))


def main() -> int:
    """Run the module; return an exit code only if it can't be."""
    try:
        use_services_file()
    except DynamoMpiError as error:
        print(f"{sys.argv[1]}: {error}", file=sys.stderr)
        return error.exit_code
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
