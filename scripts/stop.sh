#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Ends a deployment in order: requests in flight are finished, then its steps are gone. `stop.sh [RUN_DIR]`; `dynamo-mpi down --help`.

set -euo pipefail
exec "$(dirname -- "${BASH_SOURCE[0]}")/dynamo-mpi.sh" down "$@"
