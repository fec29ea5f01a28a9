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
from dynamo_mpi.layout.format import listed
from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo, MpiLibrary, check_launch, identify_mpi
from dynamo_mpi.mpi.world import load_mpi_library
from dynamo_mpi.ops.doctor.check import Check, Context, Probe, Section, error, of_error, ok, skipped, warning
from dynamo_mpi.ops.doctor.commands import Output, run_module

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


# loading mpi4py and MPI from a network file system may take seconds
_LOAD_SECONDS = 60.0
_FIRST_WITH_PRRTE = 5
# what starts ranks: ORTE up to Open MPI 4.1, PRRTE from 5.0 on; framework names by their folders in both
_LAUNCHER_FRAMEWORKS = (
    *(
        "orte",
        "prte",
        "plm",
        "rmaps",
        "odls",
        "ras",
        "ess",
        "iof",
        "oob",
        "rml",
        "routed",
        "grpcomm",
        "errmgr",
        "filem",
        "state",
    ),
    *("schizo", "rtc"),
)
_RENAMED = {
    "orte_": "prte_",
    "plm_rsh_": "plm_ssh_",
    "rmaps_base_mapping_policy": "rmaps_default_mapping_policy",
    "rmaps_base_ranking_policy": "rmaps_default_ranking_policy",
    "rmaps_base_oversubscribe": "rmaps_default_mapping_policy",
    "rmaps_base_no_oversubscribe": "rmaps_default_mapping_policy",
    "hwloc_base_binding_policy": "hwloc_default_binding_policy",
}
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
    if library is not None:
        yield from judge_parameters(context.environ, library)
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
            expected=facts.get("needed") or "mpi4py and an MPI library",
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


def judge_parameters(environ: Mapping[str, str], library: MpiLibrary) -> Iterator[Check]:
    """Find parameters of the launcher that are set for another Open MPI: since 5.0 its launcher is PRRTE, with a prefix of its own, and it
    ignores ``OMPI_MCA_orte_…``, ``OMPI_MCA_plm_…`` and the like without a word; up to 4.1 ``PRTE_MCA_…`` means nothing."""
    match = re.search(r"v(\d+)\.", library.version) if library.family == "openmpi" else None
    if match is None:
        return
    major = int(match[1])
    # with PRRTE's names; a batch script may serve both versions by setting both
    old = {name: f"PRTE_MCA_{prrte_name(name[9:])}" for name in sorted(environ) if _is_of_launcher(name)}
    if major >= _FIRST_WITH_PRRTE:
        prefix, ignored = "PRTE_MCA_", {name: meant for name, meant in old.items() if meant not in environ}
    else:
        new = [name for name in sorted(environ) if name.startswith("PRTE_MCA_") and name not in old.values()]
        prefix, ignored = "OMPI_MCA_", {name: f"OMPI_MCA_{name[9:].replace('prte_', 'orte_', 1)}" for name in new}
    if ignored:
        yield warning(
            "parameters",
            f"Open MPI {major} ignores {listed(ignored)}",
            f"parameters of its launcher with the prefix {prefix}",
            "export " + " ".join(f"{meant}=…" for meant in dict.fromkeys(ignored.values())),
        )


def prrte_name(name: str) -> str:
    """Return PRRTE's name of a parameter of Open MPI 4's launcher, both without prefix (PRRTE 3.0, the launcher of Open MPI 5.0)."""
    for old, new in _RENAMED.items():
        if name == old or (old.endswith("_") and name.startswith(old)):
            return new + name[len(old) :]
    return name


def _is_of_launcher(name: str) -> bool:
    """Return whether a variable sets a parameter of Open MPI 4's launcher, not of the library. What chooses a component, such as
    ``OMPI_MCA_plm``, has a check of its own."""
    parameter = name[9:]
    frameworks = tuple(f"{framework}_" for framework in _LAUNCHER_FRAMEWORKS)
    return name.startswith("OMPI_MCA_") and (parameter.startswith(frameworks) or parameter in _RENAMED)


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
        return {"found": error.problem, "needed": error.expected, "fix": error.fix}
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
