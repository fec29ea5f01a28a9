# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's layout rules, model shapes, memory estimates and the planner.

The names of `__all__` are the library: they stay. See `library.py` for how to use them. They are imported at first use, so that
``import dynamo_mpi.layout`` costs nothing in a rank.

The model's file, config.json
    model_files          finds it; model_config: reads it into a shape; config_keys: keys that were not read
    model_shape          the shape: sizes, layers, parts; model_parts: reads latents, experts, states, encoders
    layer_patterns       the kind of each layer; attention_patterns: windows, heads and head sizes of its own
    quantisation         number formats, and which module has which; quantisation_config: reads them, for each layer
The engine config
    engine_layers        merges flags, YAML and overrides; engine_config: the typed keys; engine_reader: values, as the engine reads them
    engine_keys          which keys each version has, and the key that was meant; key_rules: their findings
    engine_values        which values each version accepts; key_conflicts: keys that exclude each other; value_rules: their findings
    engine_yaml          writes it for a layout, or one value, to paste
The rules
    layout               their input: a worker, and each rank's coordinates; gpus: kinds of GPU; trtllm_version: order of versions
    rules/               one module per section, and the registry; contract: rules between prefill and decode
    divisibility         how heads, MLPs and experts are divided
Sizes in bytes
    memory               each stage's memory; weights: of a rank; layer_weights: of one layer; kv_cache: of a token; overheads: the rest
    staging_room         of a whole checkpoint, as it is staged on a node
Results
    library              `check` and `plan`; report: a worker's or pair's result; report_text: its text; versions_report: over all versions
    finding              what a rule found; format: numbers and tables; planner: legal layouts, best first; suggestions: others instead
"""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo_mpi.common.errors import ConfigFileError, DynamoMpiError, ModelNotFoundError, UsageError
    from dynamo_mpi.layout.engine_layers import EngineLayers
    from dynamo_mpi.layout.finding import Finding, Severity
    from dynamo_mpi.layout.library import PlanReport, Worker, check, plan
    from dynamo_mpi.layout.memory import MemoryEstimate
    from dynamo_mpi.layout.model_files import ModelFiles, find_model
    from dynamo_mpi.layout.planner import Plan
    from dynamo_mpi.layout.report import PairReport, Report, check_pair
    from dynamo_mpi.layout.versions_report import VersionsReport, check_versions

_MODULES = {
    "dynamo_mpi.common.errors": ("ConfigFileError", "DynamoMpiError", "ModelNotFoundError", "UsageError"),
    "dynamo_mpi.layout.engine_layers": ("EngineLayers",),
    "dynamo_mpi.layout.finding": ("Finding", "Severity"),
    "dynamo_mpi.layout.library": ("PlanReport", "Worker", "check", "plan"),
    "dynamo_mpi.layout.memory": ("MemoryEstimate",),
    "dynamo_mpi.layout.model_files": ("ModelFiles", "find_model"),
    "dynamo_mpi.layout.planner": ("Plan",),
    "dynamo_mpi.layout.report": ("PairReport", "Report", "check_pair"),
    "dynamo_mpi.layout.versions_report": ("VersionsReport", "check_versions"),
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
