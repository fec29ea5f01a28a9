# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's layout rules, model shapes, memory estimates and the planner.

The names of `__all__` are the library: they stay. See `library.py` for how to use them. They are imported at first use, so that
``import dynamo_mpi.layout`` costs nothing in a rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo_mpi.common.errors import ConfigFileError, DynamoMpiError, ModelNotFoundError, UsageError
    from dynamo_mpi.layout.engine_layers import EngineLayers
    from dynamo_mpi.layout.finding import Finding, Severity
    from dynamo_mpi.layout.library import PlanReport, Worker, check, plan
    from dynamo_mpi.layout.memory import MemoryEstimate
    from dynamo_mpi.layout.model_files import ModelFiles, find_model
    from dynamo_mpi.layout.planner import Plan
    from dynamo_mpi.layout.report import PairReport, Report, check_pair
    from dynamo_mpi.layout.versions import VersionsReport, check_versions

_MODULES = {
    "dynamo_mpi.common.errors": ("ConfigFileError", "DynamoMpiError", "ModelNotFoundError", "UsageError"),
    "dynamo_mpi.layout.engine_layers": ("EngineLayers",),
    "dynamo_mpi.layout.finding": ("Finding", "Severity"),
    "dynamo_mpi.layout.library": ("PlanReport", "Worker", "check", "plan"),
    "dynamo_mpi.layout.memory": ("MemoryEstimate",),
    "dynamo_mpi.layout.model_files": ("ModelFiles", "find_model"),
    "dynamo_mpi.layout.planner": ("Plan",),
    "dynamo_mpi.layout.report": ("PairReport", "Report", "check_pair"),
    "dynamo_mpi.layout.versions": ("VersionsReport", "check_versions"),
}
__all__ = [
    "ConfigFileError",
    "DynamoMpiError",
    "EngineLayers",
    "Finding",
    "MemoryEstimate",
    "ModelFiles",
    "ModelNotFoundError",
    "PairReport",
    "Plan",
    "PlanReport",
    "Report",
    "Severity",
    "UsageError",
    "VersionsReport",
    "Worker",
    "check",
    "check_pair",
    "check_versions",
    "find_model",
    "plan",
]


def __getattr__(name: str) -> object:
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found: object = getattr(import_module(module), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
