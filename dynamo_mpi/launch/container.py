# SPDX-License-Identifier: Apache-2.0
"""Pyxis's options for a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_mpi.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

# Pyxis separates mounts by commas and a mount's parts by colons, and knows no quoting
_SEPARATORS = ",:"


@dataclass(frozen=True)
class Container:
    """The image of all steps.

    Args:
        image: as Pyxis takes it: ``REGISTRY#IMAGE:TAG``, or a .sqsh file.
        mounts: ``HOST:CONTAINER[:FLAGS]``, ours after the user's.
    """

    image: str
    mounts: tuple[str, ...]

    def options(self, variables: Iterable[str]) -> tuple[str, ...]:
        """Return srun's options.

        Args:
            variables: those that the image must not replace by its own.
        """
        return (
            f"--container-image={self.image}",
            f"--container-mounts={','.join(self.mounts)}",
            f"--container-env={','.join(variables)}",
        )


def mount(source: str, target: str, flags: str = "") -> str:
    """Return one mount.

    Raises:
        UsageError: Pyxis couldn't read it.
    """
    for path in (source, target):
        if any(character in path for character in _SEPARATORS):
            raise UsageError(
                f"{path!r} can't be mounted: Pyxis reads commas and colons as separators",
                needed="a path without either",
                fix="move or link it, or another --run-dir",
            )
    return ":".join(filter(None, (source, target, flags)))
