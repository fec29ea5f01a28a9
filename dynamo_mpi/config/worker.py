# SPDX-License-Identifier: Apache-2.0
"""A worker's settings: flags, environment variables, settings file, defaults, each value with its origin; and the model's folder.

Existing variables keep their names (``MODEL_PATH``, ``ENGINE_CONFIG``, ``DYN_*`` …); new ones are ``DYN_MPI_*``. Only rank 0 reads settings
and sends the other ranks what they need.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

from dynamo_mpi import __version__
from dynamo_mpi.common.errors import ConfigFileError, ModelNotFoundError, UsageError
from dynamo_mpi.common.frozen import dataclass, field, replace
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.common.phases import FORMER_PHASES
from dynamo_mpi.config.engine import ROLE, engine_flags
from dynamo_mpi.config.options import Option, add_options, read_flags, resolve, usage_parser
from dynamo_mpi.config.sources import SETTINGS_FILE
from dynamo_mpi.config.worker_options import OPTIONS
from dynamo_mpi.layout.engine_layers import split_dynamic_flags
from dynamo_mpi.layout.model_files import find_model

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.config.sources import WorkerSources


@dataclass(frozen=True)
class Settings:
    """All settings of one worker; see `OPTIONS` for their meaning.

    ``dynamic_flags`` are the ``--trtllm.KEY VALUE`` flags, ``passed_on`` those that only ``dynamo.trtllm`` knows.
    """

    role: str
    engine: str
    model: Path
    served_model_name: str
    engine_config: Path | None
    override_engine_args: str | None
    tensor_parallel_size: int | None
    pipeline_parallel_size: int | None
    expert_parallel_size: int | None
    enable_attention_dp: bool | None
    max_batch_size: int | None
    max_num_tokens: int | None
    max_seq_len: int | None
    max_beam_width: int | None
    free_gpu_memory_fraction: float | None
    load_format: str | None
    trtllm_version: str | None
    gpus_per_node: int | None
    gpu: str | None
    min_requests: int
    namespace: str
    component: str
    endpoint: str
    request_plane: str
    discovery_backend: str
    preflight_only: bool
    allow_no_gpu: bool
    no_peer_check: bool
    allow_unlike_card: bool
    ready_file: Path | None
    probe_timeout: float
    probe: str
    probe_strict: bool
    probe_seconds: float
    probe_kv_seconds: float | None
    cpu_bind: str
    stage: str
    only_stage: bool
    stage_timeout: float
    stage_readers: int
    stage_verify: str
    cache: Path | None
    load_timeout: float
    warmup_timeout: float
    drain_timeout: float
    liveness_network: str | None
    heartbeat_timeout: float | None
    world_timeout: float
    failure_dir: Path | None
    log_dir: Path | None
    progress: str
    progress_interval: float
    metrics_file: Path | None
    runtime_system_port: int | None
    timeline: Path | None
    kv_transport: str
    kv_network: str | None
    kv_keep_seconds: float
    kv_pull_timeout: float
    dynamic_flags: tuple[str, ...] = ()
    passed_on: tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def engine_flags(self) -> dict[str, Any]:
        """Engine keys that flags or variables set, by dotted path; the engine config takes precedence."""
        return engine_flags(vars(self))


OWN_FLAGS = ("--settings", *(flag for option in OPTIONS for flag in option.flags))
# accepted until 0.2
_FORMER_NAMES = {"prove_timeout": "warmup_timeout"}


def former_names(sources: WorkerSources) -> list[str]:
    """Return a warning for each setting that was given by its former name."""
    used = dict[str, str]()
    for former, name in _FORMER_NAMES.items():
        flag, new_flag = (f"--{text.replace('_', '-')}" for text in (former, name))
        variable, new_variable = (f"DYN_MPI_{text.upper()}" for text in (former, name))
        if any(word.partition("=")[0] == flag for word in sources.argv):
            used[flag] = new_flag
        if sources.environ.get(variable):
            used[variable] = new_variable
        if former in sources.file:
            used[f"{former} in the {SETTINGS_FILE}"] = name
    phase = sources.environ.get("DYN_MPI_FAULT", "").partition(":")[2].partition(":")[0]
    if phase in FORMER_PHASES:
        used[f"phase {phase} in DYN_MPI_FAULT"] = FORMER_PHASES[phase]
    return [f"{former} is called {name} now; the former name is accepted until 0.2" for former, name in used.items()]


def build_parser() -> ArgumentParser:
    """Return the parser of the worker's command line."""
    parser = usage_parser(
        prog="python -m dynamo_mpi.worker",
        description="One rank of a Dynamo worker. Start it once per rank: srun --mpi=pmix, or mpirun.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dynamo_mpi {__version__}")
    parser.add_argument("--settings", metavar="YAML", help="file with settings, by their long names")
    add_options(parser, OPTIONS)
    return parser


def load_settings(sources: WorkerSources, auto_engine: str = "") -> Settings:
    """Load settings from a command line, environment variables and the settings file that either names.

    Args:
        sources: these.
        auto_engine: what the engine ``auto`` is; empty to look whether TensorRT-LLM is here.

    Raises:
        UsageError: an unknown flag, an invalid value, no model, or a role that the engine doesn't have.
        ConfigFileError: the settings file can't be used.
    """
    words, dynamic = split_dynamic_flags(sources.argv)
    passed_on: list[str] = []
    if (given := read_flags(OPTIONS, words, ("--settings",))) is None:
        parsed, passed_on = build_parser().parse_known_args(words)
        given = vars(parsed)
    environ, file = sources.environ, _known(sources)
    role = resolve([ROLE], given, environ, file)[0]["role"]
    options = [_for_role(option, role) for option in OPTIONS]
    values, origins = resolve(options, given, environ, file, sources.early_texts)
    if values["engine"] == "auto":
        # found, not imported: importing it is collective (K1)
        is_trtllm = role != "agg" or find_spec("tensorrt_llm") is not None
        values["engine"] = auto_engine or ("trtllm" if is_trtllm else "reference")
    if passed_on and values["engine"] != "trtllm":
        from dynamo_mpi.config.flags import did_you_mean

        problem = f"Unrecognized arguments: {' '.join(passed_on)}"
        raise UsageError(
            problem,
            expected="the worker's flags",
            fix=f"{did_you_mean(problem, OWN_FLAGS)}python -m dynamo_mpi.worker --help; flags of dynamo.trtllm alone need "
            "--engine trtllm",
        )
    if passed_on and not passed_on[0].startswith("--"):
        raise UsageError(
            f"{passed_on[0]!r} belongs to no flag",
            expected="flags, each with its value",
            fix="look at the quotes around values",
        )
    if values["engine"] == "trtllm":
        unknown_flags(passed_on)
        _refuse_visual_generation(passed_on, environ)
    if values["model"] is None:
        raise UsageError("no model was given", expected="a model folder", fix="--model DIR, or MODEL_PATH=DIR")
    if role == "encode" and values["engine"] == "reference":
        raise UsageError(
            f"{origins['role']} is {role!r}: the reference engine doesn't encode images",
            expected="--role agg, prefill or decode, or --engine trtllm",
            fix="correct one of them",
        )
    if values["served_model_name"] is None:
        values["served_model_name"] = values["model"].resolve().name
    if values["component"] is None:
        values["component"] = role if role in ("prefill", "encode") else "backend"
    if values["endpoint"] is None:
        values["endpoint"] = f"dyn://{values['namespace']}.{values['component']}.generate"
    return Settings(**values, dynamic_flags=tuple(dynamic), passed_on=tuple(passed_on), origins=origins)


def unknown_flags(passed_on: Sequence[str]) -> list[str]:
    """Return a warning for each flag that perhaps not even ``dynamo.trtllm`` takes.

    Raises:
        UsageError: one is a misspelt flag of the worker's.
    """
    if not passed_on:
        return []
    from dynamo_mpi.config.flags import foreign_flags

    return foreign_flags(passed_on, OWN_FLAGS)


def _refuse_visual_generation(words: Sequence[str], environ: Mapping[str, str]) -> None:
    """Refuse Dynamo's diffusion modalities: TensorRT-LLM serves them by another executor, and no completion can prove that it works."""
    modality = environ.get("DYN_TRTLLM_MODALITY") or environ.get("MODALITY") or ""
    for word, value in zip_longest(words, words[1:], fillvalue=""):
        if word.partition("=")[0] == "--modality":
            modality = word.partition("=")[2] or value
    if modality.endswith("_diffusion"):
        raise UsageError(
            f"modality {modality}: this worker doesn't generate images or videos",
            expected="a worker that generates text",
            fix="start `python -m dynamo.trtllm` itself for images and videos; or remove --modality, DYN_TRTLLM_MODALITY and MODALITY",
        )


def _for_role(option: Option, role: str) -> Option:
    """Add the role's variable to those of a prefill or decode worker's engine config, with the lowest precedence."""
    if option.name != "engine_config" or role == "agg":
        return option
    return replace(option, variables=(*option.variables, f"{role.upper()}_ENGINE_CONFIG"))


def _known(sources: WorkerSources) -> dict[str, Any]:
    """Return the settings file's values by option name; refuse those that are no option."""
    known = {option.name for option in OPTIONS}
    named = {_FORMER_NAMES.get(name, name): value for name, value in sources.file.items()}
    if unknown := sorted(set(named) - known):
        from difflib import get_close_matches

        meant = [f"{name} in place of {key}" for key in unknown for name in get_close_matches(key[:60], known, n=1)]
        raise ConfigFileError(
            f"the settings file {sources.file_name} has unknown settings: {', '.join(unknown)}",
            expected=", ".join(sorted(known)),
            fix=f"{', '.join(meant)}?" if meant else "correct or remove them",
        )
    return named


def resolve_model_dir(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """Return the settings with the model's directory in place of a ``config.json`` or a hub id. The served model name stays the hub id or the
    directory's name.

    Raises:
        ModelNotFoundError: there is no such model, or only a file of it.
        ConfigFileError: its config is not text, or too large.
        UsageError: Dynamo's runtime can't take its path or name.
    """
    if os.path.isfile(settings.model) and settings.model.name != "config.json":
        raise ModelNotFoundError(
            f"the model {settings.model} is a file",
            expected="a model folder, its config.json, or a hub id that is in the cache",
            fix="set --model to the folder with config.json, the tokenizer's files and the weights",
        )
    files = find_model(str(settings.model), environ)
    named = settings.origins["served_model_name"] != "default"
    name = settings.served_model_name if named else files.name
    folder = Path(files.config).parent
    for flag, text in (("--model", str(folder)), ("--served-model-name", name)):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{flag} {text!r} is no UTF-8 text in this locale",
                expected="UTF-8, which alone Dynamo's runtime takes",
                fix="set LC_ALL=C.UTF-8 or PYTHONUTF8=1 on all ranks if the name is UTF-8, or rename it",
            ) from None
    return replace(settings, model=folder, served_model_name=name)
