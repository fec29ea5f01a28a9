# SPDX-License-Identifier: Apache-2.0
"""Where a step finds dynamo_mpi: in a checkout, which is mounted into the container, or as the installed package."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

# paths of the checkout and of the deployment's folder inside a container
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
    """The location of dynamo_mpi's code.

    Args:
        checkout: its folder on the host; None if the package is installed; then the image must have it too.
        inside: the path of that folder in the steps.
        python: the steps' interpreter.
    """

    checkout: Path | None
    inside: str
    python: str

    def entry(self, script: str) -> tuple[str, ...]:
        """Return the start of a command line: one of the checkout's scripts, or the module that it runs."""
        if self.checkout is None:
            return (self.python, *_MODULES[script])
        return (f"{self.inside}/scripts/{script}",)


def find_source(image: str | None, python: str | None) -> CodeLocation:
    """Find dynamo_mpi's code.

    Args:
        image: the container image of the steps, if any.
        python: the user's choice of interpreter.
    """
    interpreter = python or ("python3" if image is not None else sys.executable)
    checkout = _PACKAGE.parent
    if not (checkout / "scripts" / "start_worker.sh").is_file():
        return CodeLocation(None, "", interpreter)
    return CodeLocation(checkout, str(checkout) if image is None else CHECKOUT_INSIDE, interpreter)
