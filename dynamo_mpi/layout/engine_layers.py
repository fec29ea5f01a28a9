# SPDX-License-Identifier: Apache-2.0
"""The config that the engine really gets: Dynamo merges its flags, the YAML and the overrides, in that order.

In Dynamo a flag that the YAML contradicts has no effect, without a warning (``dynamo/trtllm/workers/llm_worker.py``). Here that is a
finding (H14). A config that can't be read is refused with all that keeps it from being read: one wrong type must not hide the other mistakes.
"""

from __future__ import annotations

from dynamo_mpi.common.config_reader import BadValueError, line_of_key, parse_json, parse_yaml
from dynamo_mpi.common.errors import ConfigFileError, UsageError
from dynamo_mpi.common.frozen import dataclass, field, replace
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.layout.engine_config import EngineConfig, read_balancer, type_engine_config
from dynamo_mpi.layout.engine_reader import EngineReader
from dynamo_mpi.layout.finding import Finding, Severity
from dynamo_mpi.layout.key_rules import check_keys
from dynamo_mpi.layout.layout import layout_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.common.config_reader import BadValueError

DYNAMIC_PREFIX = "--trtllm."
# the flags of dynamo.trtllm that become engine keys, by the key's dotted path
FLAG_KEYS = {
    "tensor_parallel_size": "--tensor-parallel-size",
    "pipeline_parallel_size": "--pipeline-parallel-size",
    "moe_expert_parallel_size": "--expert-parallel-size",
    "enable_attention_dp": "--enable-attention-dp",
    "gpus_per_node": "--gpus-per-node",
    "max_batch_size": "--max-batch-size",
    "max_num_tokens": "--max-num-tokens",
    "max_seq_len": "--max-seq-len",
    "max_beam_width": "--max-beam-width",
    "kv_cache_config.free_gpu_memory_fraction": "--free-gpu-memory-fraction",
    "load_format": "--load-format",
}
_GMS = "gms"


@dataclass(frozen=True)
class EngineLayers:
    """The layers of one engine's config, as given.

    Args:
        flags: values of Dynamo's flags that were given, by the engine key's dotted path (`FLAG_KEYS`).
        yaml_text: contents of the engine config; None for no file.
        yaml_path: where it was found, for messages.
        override_text: ``--override-engine-args``: a JSON object; empty for none.
        dynamic: the words of ``--trtllm.a.b VALUE`` flags, in order.
    """

    flags: Mapping[str, Any] = field(default_factory=dict)
    yaml_text: str | None = None
    yaml_path: str = "the engine config"
    override_text: str = ""
    dynamic: Sequence[str] = ()


@dataclass(frozen=True)
class MergedConfig:
    """The result.

    Args:
        config: the config that the engine gets.
        findings: flags and YAML keys that a later layer overrides.
    """

    config: EngineConfig
    findings: tuple[Finding, ...] = ()


def merge(layers: EngineLayers) -> MergedConfig:
    """Merge the layers.

    Raises:
        ConfigFileError: the YAML or the override can't be used.
        UsageError: both kinds of overrides, or a dynamic flag without a value.
    """
    keys: dict[str, Any] = {}
    flags = dict(layers.flags)
    if with_gms := flags.get("load_format") == _GMS:
        # Dynamo gives the engine "auto" then
        del flags["load_format"]
    for path, value in flags.items():
        _set(keys, path.split("."), value)
    findings: list[Finding] = []
    if layers.yaml_text is not None:
        loaded = parse_yaml(layers.yaml_text, layers.yaml_path, "TensorRT-LLM's YAML")
        for path, value in flags.items():
            found = _get(loaded, path.split("."), missing=value)
            if found != value:
                findings.append(flag_without_effect(path, value, found, layers.yaml_path))
        _lay_yaml(keys, loaded)
    override = _override(layers)
    if override:
        _deep_update(keys, override)
    where = layers.yaml_path if layers.yaml_text is not None else "the engine's flags"
    try:
        config = type_engine_config(keys, where)
    except BadValueError as error:
        raise all_bad_values(error, keys, where, layers.yaml_text) from None
    if with_gms and (ranks := layout_of(config, None).world_size) > 1:
        findings.append(gms_in_the_child(ranks))
    return MergedConfig(config, tuple(findings))


def with_balancer(merged: MergedConfig, text: str) -> MergedConfig:
    """Fill in the expert load balancer's settings from the file that the config names.

    Args:
        merged: a config with a ``moe.balancer_path``.
        text: the file's contents.

    Raises:
        ConfigFileError: it isn't a YAML mapping, or one of its values has the wrong type.
    """
    moe = merged.config.moe
    path = str(moe.balancer_path)
    settings = read_balancer(EngineReader(parse_yaml(text, path, "the load balancer's YAML"), path))
    return replace(merged, config=replace(merged.config, moe=replace(moe, **settings)))


def split_dynamic_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take the ``--trtllm.a.b VALUE`` flags out of a command line.

    Returns:
        The other words, and the flags with their values.

    Raises:
        UsageError: one has no value.
    """
    others: list[str] = []
    dynamic: list[str] = []
    at = 0
    while at < len(words):
        word = words[at]
        if not word.startswith(DYNAMIC_PREFIX):
            others.append(word)
            at += 1
            continue
        if at + 1 == len(words) or words[at + 1].startswith("--"):
            key, _, value = word.partition("=")
            raise UsageError(
                f"{word} has no value",
                expected=f"{key} {value or 'VALUE'}, with a blank between them",
                fix="add the value",
            )
        dynamic += words[at : at + 2]
        at += 2
    return others, dynamic


def _override(layers: EngineLayers) -> dict[str, Any]:
    if layers.override_text and layers.dynamic:
        raise UsageError(
            "--override-engine-args and --trtllm.* flags were given together",
            expected="one of them: Dynamo refuses both",
            fix="write all overrides in one of the two ways",
        )
    if layers.override_text:
        return parse_json(layers.override_text, "--override-engine-args", "a JSON object: '{\"max_batch_size\": 8}'")
    keys: dict[str, Any] = {}
    for flag, text in zip(layers.dynamic[::2], layers.dynamic[1::2], strict=True):
        path = flag.removeprefix(DYNAMIC_PREFIX).split(".")
        if not all(path) or not _set(keys, path, _guess(text)):
            raise UsageError(
                f"{flag} {text} names no engine key, or contradicts another such flag",
                expected="--trtllm.KEY VALUE, or --trtllm.SECTION.KEY VALUE",
                fix="correct or remove it",
            )
    return keys


def _guess(text: str) -> Any:
    """Type a dynamic flag's value as Dynamo does (``dynamo/trtllm/dynamic_flags.py``): none, int, float, bool, else text."""
    if text.lower() in ("none", "null"):
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def _lay_yaml(keys: dict[str, Any], loaded: Mapping[str, Any]) -> None:
    """TensorRT-LLM's ``update_llm_args_with_extra_dict``: top-level keys replace, ``kv_cache_config`` is merged (H14)."""
    for key, value in loaded.items():
        if key == "kv_cache_config" and isinstance(value, dict) and isinstance(keys.get(key), dict):
            _deep_update(keys[key], value)
        else:
            keys[key] = value


def _deep_update(target: dict[str, Any], source: Mapping[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _deep_update(target[key], value)
        else:
            target[key] = value


def _set(keys: dict[str, Any], path: Sequence[str], value: Any) -> bool:
    inner: Any = keys
    for name in path[:-1]:
        if inner.get(name) is None:  # null is overridden, as in Dynamo
            inner[name] = {}
        inner = inner[name]
        if not isinstance(inner, dict):
            return False
    inner[path[-1]] = value
    return True


def _get(keys: Mapping[str, Any], path: Sequence[str], missing: Any) -> Any:
    value: Any = keys
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return missing
        value = value[name]
    return value


def flag_without_effect(path: str, value: Any, found: Any, yaml_path: str) -> Finding:
    """H14: a flag that the engine config contradicts has no effect: in Dynamo the YAML overrides flags (``llm_worker.py``)."""
    flag = FLAG_KEYS.get(path, path)
    return Finding(
        "H14",
        Severity.WARNING,
        f"{flag} {value} has no effect: in Dynamo the engine config overrides flags",
        found=f"{flag} {value}; {yaml_path} says {path}: {found}",
        expected="the value in one place",
        fix=f"set {path} in {yaml_path}, or give --override-engine-args, which overrides both",
    )


def gms_in_the_child(ranks: int) -> Finding:
    """H17: ``--load-format gms`` patches the process of ``dynamo.trtllm`` and ranks that it spawns itself, not these (``setup_gms``)."""
    return Finding(
        "H17",
        Severity.ERROR,
        "--load-format gms doesn't reach the ranks: Dynamo sets it up in dynamo.trtllm alone, which loads no weights here",
        found=f"--load-format gms, {ranks} ranks",
        expected="another load format for more than one rank",
        fix="leave --load-format out",
    )


_MOST = 20


def all_bad_values(first: BadValueError, keys: Mapping[str, Any], where: str, yaml_text: str | None) -> ConfigFileError:
    """Return the error for a config with values of a wrong type: it lists them all, and the keys that no version of the engine knows.

    Args:
        first: the first value's error.
        keys: the config, with all layers merged.
        where: where it was found, for messages.
        yaml_text: the engine config's text; None for none.
    """
    from copy import deepcopy  # for a config that can't be read alone

    bad, rest = [first], deepcopy(dict(keys))
    while _remove(rest, bad[-1].key.split(".")) and len(bad) < _MOST:
        try:
            type_engine_config(rest, where)
        except type(first) as error:
            bad.append(error)
        except ConfigFileError:
            break
        else:
            break
    unknown = [finding for finding in check_keys(keys, None) if finding.severity is Severity.ERROR]
    if len(bad) == 1 and not unknown:
        line = _line(yaml_text, first.key)
        place = f"{where}, {line}" if line else f"{where}: "
        return type(first)(f"{place}{first.found}", expected=first.expected, fix=first.fix)
    lines = [f"{_line(yaml_text, error.key)}{error.found}, expected {error.expected}" for error in bad]
    lines += [finding.message + (f" ({finding.fix})" if finding.fix else "") for finding in unknown]
    return ConfigFileError(
        f"{where} has {'a key' if len(lines) == 1 else f'{len(lines)} values and keys'} that can't be used:\n    "
        + "\n    ".join(lines),
        expected="keys and values of TensorRT-LLM's engine config",
        fix="correct them there",
    )


def _line(text: str | None, key: str) -> str:
    number = 0 if text is None else line_of_key(text, key.split("."))
    return f"line {number}: " if number else ""


def _remove(keys: dict[str, Any], path: list[str]) -> bool:
    """Remove a key; return whether it was there."""
    for name in path[:-1]:
        inner = keys.get(name)
        if not isinstance(inner, dict):
            return False
        keys = inner
    return keys.pop(path[-1], None) is not None
