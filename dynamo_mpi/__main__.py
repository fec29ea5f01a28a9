# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo_mpi`` is ``dynamo-mpi``."""

import sys

from dynamo_mpi.cli.main import entry

if __name__ == "__main__":
    sys.exit(entry())
