# SPDX-License-Identifier: Apache-2.0
"""Doctor's checks of MPI: mpi4py's library, the launcher, and whether they are compatible. MPI isn't initialised.

``python -m dynamo_mpi.ops.doctor.mpi`` loads the library in a process of its own, and writes facts about it as JSON: a library may crash or
hang, and can't be unloaded.
"""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_mpi.checks.host_facts import version_of
from dynamo_mpi.common.errors import DynamoMpiError, LaunchError
from dynamo_mpi.mpi.launch_checks import MpiLibrary, check_launch, identify_mpi
from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo
from dynamo_mpi.mpi.world import load_mpi_library
from dynamo_mpi.ops.doctor.check import Check, Context, Probe, Section, error, of_error, ok, skipped, warning
from dynamo_mpi.ops.doctor.commands import Output, run_module

if TYPE_CHECKING:
    from collections.abc import Iterator


# loading mpi4py and MPI from a network file system may take seconds
_LOAD_SECONDS = 60.0
_IN_A_RANK = "srun --mpi=pmix -n1 [--container-image=…] dynamo-mpi doctor looks where ranks run"


def check_mpi(context: Context) -> Iterator[Check]:
    """Load the library in a separate process, and evaluate it and the launch."""
    if version_of("mpi4py", "mpi4py") is None:
        yield judge_missing(in_rank=context.in_rank)
        yield describe_launch(context.launch)
        return
    output = run_module("dynamo_mpi.ops.doctor.mpi", context.environ, context.left(_LOAD_SECONDS))
    library, checks = judge_library(output, in_rank=context.in_rank)
    yield from checks
    yield judge_launch(context.launch, library)


def judge_missing(*, in_rank: bool) -> Check:
    """Evaluate a Python without mpi4py; on a login node, which may have another Python than the ranks, that is no error."""
    found, needed = "mpi4py isn't installed in this Python", "mpi4py and the MPI library of the launcher"
    if in_rank:
        return error("library", found, needed, "pip install mpi4py, and load the MPI module")
    return skipped("library", f"{found}; ranks need it", _IN_A_RANK)


def judge_library(output: Output, *, in_rank: bool) -> tuple[MpiLibrary | None, list[Check]]:
    """Return the library from the child's output, None if there is none, and its checks."""
    if output.code is None:
        found = f"loading mpi4py's MPI library did not end within {output.seconds:.1f} s"
        fix = f"look by hand: python -c 'import mpi4py; mpi4py.rc.initialize = False; import mpi4py.MPI'; more --timeout; {_IN_A_RANK}"
        return None, [warning("library", found, "a library that can be loaded at once", fix)]
    if output.code:
        return None, [
            error(
                "library",
                f"the process that loaded mpi4py's MPI library failed: {output.problem}",
                "an MPI library that can be loaded: ranks would end like that",
                "choose another: load the launcher's MPI module, or MPI4PY_LIBMPI=/path/to/libmpi.so",
            )
        ]
    facts = _read(output.out)
    if "library" not in facts:
        problem = LaunchError(
            facts.get("found") or "the MPI library can't be identified",
            needed=facts.get("needed") or "mpi4py and an MPI library",
            fix=facts.get("fix", ""),
        )
        return None, [of_error("library", problem, fatal=in_rank)]
    library = identify_mpi(facts["library"])
    text = f"{library.version} by mpi4py {facts.get('mpi4py', '')}" + (
        f" ({facts['path']})" if facts.get("path") else ""
    )
    return library, [ok("library", text), judge_interface(library, facts.get("pmix", ""))]


def judge_interface(library: MpiLibrary, pmix: str) -> Check:
    """Report the library's process management interface, and which launchers offer it."""
    if library.family == "openmpi":
        brought = f", here {' '.join(pmix.split())}" if pmix else ""
        return ok("interface", f"PMIx{brought}: srun --mpi=pmix, or Open MPI's mpirun")
    if library.family == "mpich":
        both = " or --mpi=pmix" if library.pmix else ""
        return ok("interface", f"PMI{' and PMIx' if library.pmix else ''}: srun --mpi=pmi2{both}, or its own mpiexec")
    return warning(
        "interface",
        f"{library.version or 'a library without a version text'}: how its ranks find each other isn't known",
        "Open MPI, or MPICH or a relative of it",
        "load one of them, or MPI4PY_LIBMPI=/path/to/libmpi.so; TensorRT-LLM needs Open MPI",
    )


def judge_launch(launch: LaunchInfo, library: MpiLibrary | None) -> Check:
    """Evaluate launcher and library, as a rank does before MPI_Init."""
    if launch.launcher in (Launcher.ALONE, Launcher.SLURM_SHELL) or library is None:
        # a rank would reject such a start, but launch and doctor are started like that
        return describe_launch(launch)
    try:
        check_launch(launch, library)
    except LaunchError as problem:
        return of_error("launch", problem)
    return describe_launch(launch)


def describe_launch(launch: LaunchInfo) -> Check:
    """Describe what started this process."""
    if launch.launcher is Launcher.ALONE:
        return ok("launch", "started by no launcher: this is no rank")
    if launch.launcher is Launcher.SLURM_SHELL:
        return ok("launch", f"{launch.launcher.value} (job {launch.job_id}, {launch.size} tasks): ranks need srun")
    ranks = f" of {launch.size}" if launch.size else ""
    return ok("launch", f"rank {launch.rank}{ranks}, by {launch.launcher.value}")


def _read(text: str) -> dict[str, str]:
    try:
        # libraries may print before we do
        content = json.loads(text.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {}
    return {str(key): str(value) for key, value in content.items()} if isinstance(content, dict) else {}


SECTION = Section("mpi", (Probe("library", check_mpi),))


_LIBRARY = re.compile(r"/\S*/lib(mpi|pmix)\.so[^/\s]*$", re.MULTILINE)


def look_at_library() -> dict[str, str]:
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
    print(json.dumps(look_at_library()))
