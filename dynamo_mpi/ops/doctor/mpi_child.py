# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo_mpi.ops.doctor.mpi_child``: loads the MPI library of a rank, without MPI_Init, and writes facts about it as JSON.

In a separate process, because a library may crash, hang, or can't be unloaded.
"""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path

from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.mpi.world import load_mpi_library

_LIBRARY = re.compile(r"/\S*/lib(mpi|pmix)\.so[^/\s]*$", re.MULTILINE)


def look() -> dict[str, str]:
    """Load the library; return its facts, or the error with which a rank would end."""
    try:
        said = load_mpi_library()
    except DynamoMpiError as error:
        return {"found": error.found, "needed": error.needed, "fix": error.fix}
    import mpi4py

    paths = loaded_libraries(Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace"))
    return {
        "library": said,
        "mpi4py": mpi4py.__version__,
        "path": paths.get("mpi", ""),
        "pmix": _pmix_version(paths["pmix"]) if "pmix" in paths else "",
    }


def loaded_libraries(maps: str) -> dict[str, str]:
    """Return the paths of libmpi and libpmix from the text of ``/proc/self/maps``."""
    return {match[1]: match[0] for match in _LIBRARY.finditer(maps)}


def _pmix_version(path: str) -> str:
    """Return PMIx's version, without PMIx_Init."""
    try:
        version = ctypes.CDLL(path).PMIx_Get_version
    except (OSError, AttributeError):
        return ""
    version.restype = ctypes.c_char_p
    return (version() or b"").decode(errors="replace")


if __name__ == "__main__":
    print(json.dumps(look()))
