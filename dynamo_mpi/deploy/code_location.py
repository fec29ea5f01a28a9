# SPDX-License-Identifier: Apache-2.0
"""How a step finds our code: the scripts of a checkout, which a container gets mounted, or the installed package."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

# where a checkout lies in a container, and a deployment's folder
CHECKOUT_INSIDE = "/dynamo_mpi"
RUN_DIR_INSIDE = "/dynamo_mpi_run"
_PACKAGE = Path(__file__).resolve().parents[1]
_MODULES = {
    "start_frontend_services.sh": ("-m", "dynamo_mpi.head_node"),
    "start_worker.sh": ("-m", "dynamo_mpi.worker"),
    "dynamo-mpi.sh": ("-m", "dynamo_mpi"),
    "check_kv.sh": ("-m", "dynamo_mpi.checks.kv"),
}


@dataclass(frozen=True)
class CodeLocation:
    """Where our code is.

    Args:
        checkout: its folder on the host; None where the package is installed, which an image must then have too.
        inside: the same folder as the steps see it.
        python: interpreter of the steps.
    """

    checkout: Path | None
    inside: str
    python: str

    def entry(self, script: str) -> tuple[str, ...]:
        """Return the start of a command line: one of the checkout's scripts, or what that runs."""
        if self.checkout is None:
            return (self.python, *_MODULES[script])
        return (f"{self.inside}/scripts/{script}",)


def find_source(image: str | None, python: str | None) -> CodeLocation:
    """Find our code.

    Args:
        image: the container image of the steps, if any.
        python: interpreter that the user wants.
    """
    interpreter = python or ("python3" if image is not None else sys.executable)
    checkout = _PACKAGE.parent
    if not (checkout / "scripts" / "start_worker.sh").is_file():
        return CodeLocation(None, "", interpreter)
    return CodeLocation(checkout, str(checkout) if image is None else CHECKOUT_INSIDE, interpreter)
