# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo_mpi.pods``: a worker over several Kubernetes pods. See `deploy.kubernetes`."""

from __future__ import annotations

import sys

from dynamo_mpi.deploy.kubernetes.__main__ import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
