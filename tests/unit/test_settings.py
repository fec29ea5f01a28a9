# SPDX-License-Identifier: Apache-2.0
"""Settings: flags over environment over file over defaults."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.common.errors import ConfigFileError, DynamoMpiError, UsageError
from dynamo_mpi.config.options import Option, read_flags
from dynamo_mpi.config.sources import WorkerSources
from dynamo_mpi.config.variables import KNOWN, known_only, unknown_variables
from dynamo_mpi.config.worker import Settings, build_parser, load_settings
from dynamo_mpi.config.worker_options import OPTIONS
from tests.contracts.commands import settings as golden_settings

MODEL = ("--model", "/m/Name")
# a value that each option takes, other than its default
SAMPLES = {
    "role": "agg",
    "engine": "trtllm",
    "model": "/other/model",
    "served_model_name": "a/model",
    "engine_config": "/e.yaml",
    "override_engine_args": '{"max_batch_size": 1}',
    "tensor_parallel_size": "3",
    "pipeline_parallel_size": "7",
    "expert_parallel_size": "2",
    "enable_attention_dp": "true",
    "max_batch_size": "4",
    "max_num_tokens": "5",
    "max_seq_len": "6",
    "max_beam_width": "8",
    "free_gpu_memory_fraction": "0.5",
    "load_format": "dummy",
    "trtllm_version": "1.2.1",
    "gpus_per_node": "9",
    "gpu": "h200",
    "min_requests": "2",
    "namespace": "ns",
    "component": "comp",
    "endpoint": "dyn://a.b.c",
    "request_plane": "nats",
    "discovery_backend": "etcd",
    "preflight_only": "true",
    "allow_no_gpu": "true",
    "no_peer_check": "true",
    "allow_unlike_card": "true",
    "ready_file": "/r.json",
    "probe_timeout": "1.5",
    "probe": "fabric",
    "probe_strict": "true",
    "probe_seconds": "9.5",
    "probe_kv_seconds": "77",
    "cpu_bind": "none",
    "stage": "/local/scratch",
    "only_stage": "true",
    "stage_timeout": "77.5",
    "stage_readers": "3",
    "stage_verify": "digest",
    "cache": "/shared/caches",
    "load_timeout": "3.5",
    "warmup_timeout": "2.5",
    "drain_timeout": "0",
    "liveness_network": "10.1.0.0/16",
    "heartbeat_timeout": "7.5",
    "world_timeout": "90.5",
    "failure_dir": "/failures",
    "log_dir": "/logs",
    "progress": "plain",
    "progress_interval": "2.25",
    "metrics_file": "/m.prom",
    "runtime_system_port": "21000",
    "timeline": "/t.html",
    "kv_transport": "tcp",
    "kv_network": "ib0",
    "kv_keep_seconds": "4.5",
    "kv_pull_timeout": "5.5",
}


def load(*argv: str, file: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    named = {} if file is None else {"DYN_MPI_SETTINGS": str(file)}
    return load_settings(WorkerSources(argv, {**(environ or {}), **named}))


def shown(settings: Settings, name: str) -> str:
    value = getattr(settings, name)
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def settings_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_option_is_a_setting_and_has_a_sample() -> None:
    names = [option.name for option in OPTIONS]
    fields = [field.name for field in dataclasses.fields(Settings)]
    assert names == fields[:-3] == list(SAMPLES)


def test_defaults() -> None:
    settings = load(*MODEL)
    assert settings.model == Path("/m/Name")
    assert settings.served_model_name == "Name"
    assert settings.endpoint == "dyn://dynamo.backend.generate"
    assert (settings.request_plane, settings.discovery_backend, settings.preflight_only) == ("tcp", "etcd", False)
    assert settings.engine_flags == {}
    assert settings.origins["model"] == "flag --model"
    assert {origin for name, origin in settings.origins.items() if name != "model"} == {"default"}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_flags_win_over_environment_over_file(option: Option, tmp_path: Path) -> None:
    sample = SAMPLES[option.name]
    model = () if option.name == "model" else MODEL
    for key in (option.name, option.name.replace("_", "-")):
        settings = load(*model, file=settings_file(tmp_path, f"{key}: {sample}\n"))
        assert (shown(settings, option.name), settings.origins[option.name]) == (sample, "settings file")
    broken = settings_file(tmp_path, f"{option.name}: ' /'\n")
    for variable in option.variables:
        settings = load(*model, file=broken, environ={variable: sample})
        assert (shown(settings, option.name), settings.origins[option.name]) == (sample, f"environment {variable}")
    for flag in option.flags:
        words = (flag,) if option.switch else (flag, sample)
        settings = load(*model, *words, file=broken, environ=dict.fromkeys(option.variables, " /"))
        assert (shown(settings, option.name), settings.origins[option.name]) == (sample, f"flag {option.flags[0]}")


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.variables], ids=lambda option: option.name)
def test_an_empty_variable_is_not_set(option: Option) -> None:
    settings = load(*MODEL, environ=dict.fromkeys(option.variables, ""))
    assert settings == load(*MODEL)
    assert settings.origins == load(*MODEL).origins


def test_the_file_may_be_named_by_flag_or_variable(tmp_path: Path) -> None:
    path = settings_file(tmp_path, "namespace: from_file\nmodel: /m\nengine_config: null\n")
    for settings in (load("--settings", str(path)), load(file=path)):
        assert (settings.namespace, settings.engine_config) == ("from_file", None)
    assert load("--settings", str(path), file=tmp_path / "never looked at").namespace == "from_file"


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("on", True), ("no", False), ("'yes'", True), ("0", False)]
)
def test_switches_in_a_file(tmp_path: Path, text: str, value: bool) -> None:
    assert load(*MODEL, file=settings_file(tmp_path, f"preflight_only: {text}")).preflight_only is value


@pytest.mark.parametrize(("text", "value"), [("1", True), ("TRUE", True), ("yes", True), ("0", False), ("off", False)])
def test_switches_in_the_environment(text: str, value: bool) -> None:
    assert load(*MODEL, environ={"DYN_MPI_PREFLIGHT_ONLY": text}).preflight_only is value


@pytest.mark.parametrize(
    ("alias", "flag"),
    [
        ("--disaggregation-mode", "--role"),
        ("--model-path", "--model"),
        ("--extra-engine-args", "--engine-config"),
        ("--tp-size", "--tensor-parallel-size"),
        ("--pp-size", "--pipeline-parallel-size"),
    ],
)
def test_dynamos_own_flags_are_understood(alias: str, flag: str) -> None:
    name = next(option.name for option in OPTIONS if flag in option.flags)
    model = () if name == "model" else MODEL
    assert load(*model, alias, SAMPLES[name]) == load(*model, flag, SAMPLES[name])


def test_sizes_given_as_flags_go_by_their_yaml_keys() -> None:
    settings = load(
        *MODEL, "--tp-size", "3", "--ep-size", "2", "--free-gpu-memory-fraction", "0.5", "--max-seq-len", "64"
    )
    assert settings.engine_flags == {
        "tensor_parallel_size": 3,
        "moe_expert_parallel_size": 2,
        "kv_cache_config.free_gpu_memory_fraction": 0.5,
        "max_seq_len": 64,
    }


def test_dynamic_flags_are_kept_in_order_beside_the_others() -> None:
    settings = load(*MODEL, "--trtllm.a.b", "1", "--tp-size", "3", "--trtllm.c", "x")
    assert settings.dynamic_flags == ("--trtllm.a.b", "1", "--trtllm.c", "x")
    assert settings.tensor_parallel_size == 3


def test_a_switch_with_two_forms_can_be_taken_back() -> None:
    environ = {"DYN_TRTLLM_ENABLE_ATTENTION_DP": "true"}
    assert load(*MODEL, environ=environ).enable_attention_dp is True
    assert load(*MODEL, "--no-enable-attention-dp", environ=environ).enable_attention_dp is False


@pytest.mark.parametrize(
    ("words", "endpoint"),
    [
        (("--namespace", "a"), "dyn://a.backend.generate"),
        (("--component", "b"), "dyn://dynamo.b.generate"),
        (("--endpoint", "dyn://x.y.z", "--namespace", "a"), "dyn://x.y.z"),
        (("--endpoint", "x.y.z"), "dyn://x.y.z"),
    ],
)
def test_the_endpoint_has_three_parts(words: tuple[str, ...], endpoint: str) -> None:
    assert load(*MODEL, *words).endpoint == endpoint


@pytest.mark.parametrize("model", ["/m/Name/", "/m/Name/.", "/m/x/../Name"])
def test_the_served_name_is_the_folders(model: str) -> None:
    assert load("--model", model).served_model_name == "Name"


@pytest.mark.parametrize(
    ("flag", "value", "needed"),
    [
        *(
            ("--tensor-parallel-size", value, "positive whole number")
            for value in ("0", "-1", "2.0", "two", "", "1e3", "²")
        ),
        *(("--probe-timeout", value, "number of seconds") for value in ("-1", "inf", "nan", "1e10", "soon", "")),
        *(("--namespace", value, "name without dots") for value in ("a.b", "a/b", "a b", "", "a\n")),
        *(
            ("--endpoint", value, "dyn://namespace.component.endpoint|name without dots")
            for value in ("", "a", "a.b", "a.b.c.d", "a..c", "http://a.b.c", "dyn://a.b.c/d")
        ),
        ("--role", "both", "one of agg, prefill, decode, encode"),
        ("--engine", "abacus", "one of auto, reference, trtllm"),
        ("--request-plane", "http", "one of tcp, nats"),
        # what an unset variable of a batch script leaves behind
        ("--model", "", "a path"),
        ("--engine-config", "", "a path"),
        ("--ready-file", "", "a path"),
        ("--served-model-name", "", "empty"),
    ],
)
def test_impossible_values_are_named_with_flag_and_need(flag: str, value: str, needed: str) -> None:
    with pytest.raises(UsageError, match=needed) as caught:
        load(*MODEL, f"{flag}={value}")
    assert flag in caught.value.problem
    assert repr(value) in caught.value.problem


ROLE_CONFIGS = {"PREFILL_ENGINE_CONFIG": "/p.yaml", "DECODE_ENGINE_CONFIG": "/d.yaml"}


@pytest.mark.parametrize(
    ("role", "words", "environ", "config"),
    [
        ("agg", (), {}, None),
        ("prefill", (), {}, "/p.yaml"),
        ("decode", (), {}, "/d.yaml"),
        ("prefill", ("--engine-config", "/f.yaml"), {}, "/f.yaml"),
        ("prefill", (), {"ENGINE_CONFIG": "/e.yaml"}, "/e.yaml"),
        ("decode", (), {"DYN_TRTLLM_EXTRA_ENGINE_ARGS": "/e.yaml"}, "/e.yaml"),
        ("decode", (), {"DECODE_ENGINE_CONFIG": ""}, None),
    ],
)
def test_a_roles_own_variable_gives_its_engine_config_where_nothing_else_does(
    role: str, words: tuple[str, ...], environ: dict[str, str], config: str | None
) -> None:
    settings = load(*MODEL, "--engine", "trtllm", "--role", role, *words, environ={**ROLE_CONFIGS, **environ})
    assert settings.engine_config == (None if config is None else Path(config))


def test_a_roles_variable_wins_over_the_settings_file(tmp_path: Path) -> None:
    file = settings_file(tmp_path, "engine_config: /s.yaml\nengine: trtllm\nrole: decode\n")
    settings = load(*MODEL, file=file, environ=ROLE_CONFIGS)
    assert settings.engine_config == Path("/d.yaml")
    assert settings.origins["engine_config"] == "environment DECODE_ENGINE_CONFIG"
    assert load(*MODEL, file=file).engine_config == Path("/s.yaml")


def test_the_role_that_the_reference_engine_lacks_is_named_with_its_origin() -> None:
    with pytest.raises(UsageError, match=r"environment DYN_MPI_ROLE is 'encode'.*reference engine"):
        load(*MODEL, "--engine", "reference", environ={"DYN_MPI_ROLE": "encode"})


@pytest.mark.parametrize(("role", "component"), [("prefill", "prefill"), ("decode", "backend")])
def test_the_reference_engine_splits_prefill_from_decode(role: str, component: str) -> None:
    settings = load(*MODEL, "--engine", "reference", "--role", role, "--kv-network", "ib0", "--kv-pull-timeout", "2")

    assert (settings.role, settings.engine, settings.component) == (role, "reference", component)
    assert (settings.kv_network, settings.kv_keep_seconds, settings.kv_pull_timeout) == ("ib0", 60, 2)


def test_a_clusters_gpus_are_no_flag_of_the_engine() -> None:
    assert load(*MODEL, environ={"NUM_GPUS_PER_NODE": "8"}).gpus_per_node is None


def test_an_impossible_value_in_the_environment_is_named_with_its_variable() -> None:
    with pytest.raises(UsageError, match="environment DYN_MPI_PROBE_TIMEOUT is 'soon'"):
        load(*MODEL, environ={"DYN_MPI_PROBE_TIMEOUT": "soon"})
    with pytest.raises(UsageError, match="environment DYN_MPI_PREFLIGHT_ONLY is 'perhaps'"):
        load(*MODEL, environ={"DYN_MPI_PREFLIGHT_ONLY": "perhaps"})


@pytest.mark.parametrize(
    "words",
    [
        ("--modell", "/m"),
        ("--names", "ns"),
        ("stray",),
        ("--model",),
        ("--preflight-only=yes",),
        ("--kv-block-size", "3"),
    ],
    ids=" ".join,
)
def test_unknown_words_are_usage_errors_that_point_to_the_help(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=words[0].partition("=")[0]) as caught:
        load(*MODEL, *words)
    assert "--help" in caught.value.fix
    assert capsys.readouterr() == ("", "")


def test_a_model_is_needed() -> None:
    with pytest.raises(UsageError, match="--model DIR"):
        load()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a", "not a mapping"),
        ("words", "not a mapping"),
        ("modell: /m", "unknown settings: modell"),
        ("1: x", "unknown settings: 1"),
        ("a: [1", "is not YAML"),
        ("a: 2024-13-45", "is not YAML"),
        ("model: '\0'", "is not YAML"),
        (r'model: "\ud800"', "is not YAML"),
        ("model: /m\nmodel: /n", "line 2: the key 'model' is a duplicate"),
    ],
)
def test_a_bad_settings_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = settings_file(tmp_path, text)
    with pytest.raises(ConfigFileError, match=words) as caught:
        load(*MODEL, file=path)
    assert str(path) in caught.value.problem


def test_a_settings_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"namespace: \xe9")
    for path in (tmp_path / "absent.yaml", tmp_path, latin):
        with pytest.raises(ConfigFileError, match=r"can't be read|is not text") as caught:
            load(*MODEL, file=path)
        assert str(path) in caught.value.problem


@pytest.mark.parametrize("text", [r'model: "a\0b"', "model: ''", "tensor_parallel_size: 2.5", "role: [agg]"])
def test_a_bad_value_in_a_settings_file_is_a_usage_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="settings file is "):
        load(file=settings_file(tmp_path, text))


@given(
    st.lists(st.sampled_from([flag for option in OPTIONS for flag in option.flags]) | st.text(max_size=4), max_size=6),
    st.dictionaries(
        st.sampled_from([variable for option in OPTIONS for variable in option.variables]),
        st.text(max_size=4),
        max_size=4,
    ),
)
def test_any_command_line_is_understood_or_refused(words: list[str], environ: dict[str, str]) -> None:
    if {"-h", "--help", "--version"} & set(words):
        return
    try:
        settings = load_settings(WorkerSources(words, environ))
    except DynamoMpiError as error:
        assert error.problem
    else:
        assert settings.model is not None


def test_the_help_names_every_flag_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in OPTIONS:
        for word in (*option.flags, *option.variables[:1]):
            assert word in text


@pytest.mark.parametrize("name", ["agg", "pd", "prefill_and_decode", "aggregated"])
def test_dynamos_names_for_an_aggregated_worker(name: str) -> None:
    assert load(*MODEL, "--disaggregation-mode", name).role == "agg"


@pytest.mark.parametrize(
    ("role", "component"), [("agg", "backend"), ("prefill", "prefill"), ("decode", "backend"), ("encode", "encode")]
)
def test_the_component_is_the_one_that_dynamo_expects_of_the_role(role: str, component: str) -> None:
    assert load(*MODEL, "--engine", "trtllm", "--role", role).endpoint == f"dyn://dynamo.{component}.generate"
    assert load(*MODEL, "--engine", "trtllm", "--role", role, "--component", "c").endpoint == "dyn://dynamo.c.generate"


def test_flags_of_dynamo_trtllm_are_handed_on_in_their_order() -> None:
    words = ("--publish-kv-events", "--kv-block-size", "64", "--engine", "trtllm", "--modality", "multimodal")
    settings = load(*words, *MODEL, "--trtllm.a.b", "1")
    assert settings.passed_on == ("--publish-kv-events", "--kv-block-size", "64", "--modality", "multimodal")
    assert settings.dynamic_flags == ("--trtllm.a.b", "1")


@pytest.mark.parametrize(
    ("words", "environ"),
    [
        (("--modality", "image_diffusion"), {}),
        (("--modality=video_diffusion",), {"MODALITY": "text"}),
        ((), {"MODALITY": "image_diffusion"}),
        ((), {"DYN_TRTLLM_MODALITY": "video_diffusion", "MODALITY": "text"}),
    ],
)
def test_a_worker_that_generates_images_is_refused(words: tuple[str, ...], environ: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"modality (image|video)_diffusion: this worker doesn't generate images"):
        load(*MODEL, "--engine", "trtllm", *words, environ=environ)
    assert load(*MODEL, "--engine", "reference", environ=environ).engine == "reference"


def test_the_flag_of_the_modality_takes_precedence() -> None:
    assert load(*MODEL, "--engine", "trtllm", "--modality", "text", environ={"MODALITY": "image_diffusion"}).passed_on


def test_the_reference_engine_has_no_further_flags() -> None:
    with pytest.raises(UsageError, match="--publish-kv-events") as caught:
        load(*MODEL, "--engine", "reference", "--publish-kv-events")
    assert "--engine trtllm" in caught.value.fix


@pytest.mark.parametrize(
    ("words", "installed", "engine"),
    [
        ((), False, "reference"),
        ((), True, "trtllm"),
        (("--engine", "reference"), True, "reference"),
        (("--role", "prefill"), False, "trtllm"),
        (("--role", "agg"), False, "reference"),
    ],
)
def test_the_engine_is_the_one_that_is_there(
    words: tuple[str, ...], installed: bool, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_mpi.config.worker.find_spec", lambda name: installed or None)
    assert load(*MODEL, *words).engine == engine


def test_a_word_without_a_flag_is_refused_before_anything_is_started() -> None:
    with pytest.raises(UsageError, match="'foo' belongs to no flag"):
        load(*MODEL, "foo", "--engine", "trtllm")


def test_the_nixl_transport_is_refused_with_the_fix() -> None:
    with pytest.raises(UsageError, match=r"--kv-transport .* is 'nixl'") as caught:
        load("--model", "/m", "--kv-transport", "nixl")
    assert (caught.value.expected, caught.value.fix[:22]) == ("tcp, or no such option", "remove --kv-transport;")


_VALUES = st.sampled_from(["", "8", "a b", "-5", "--", "--help", "x=y", "auto", "=", "@file", "-"])
_FLAGS = st.sampled_from(
    [*(flag for option in OPTIONS for flag in option.flags), "--settings", "--other", "-x", "word"]
)
_WORDS = st.one_of(
    st.tuples(_FLAGS, _VALUES), st.tuples(_FLAGS), st.builds(lambda flag, value: (f"{flag}={value}",), _FLAGS, _VALUES)
)


@given(st.lists(_WORDS, max_size=5).map(lambda groups: [word for group in groups for word in group]))
def test_flags_that_are_read_without_argparse_are_what_it_reads(words: list[str]) -> None:
    found = read_flags(OPTIONS, words, ("--settings",))
    if found is not None:
        parsed, rest = build_parser().parse_known_args(words)
        expected = {name: value for name, value in vars(parsed).items() if value is not None and name != "settings"}
        assert (found, rest) == (expected, [])


def test_usual_command_lines_need_no_argparse() -> None:
    words = ["--model", "m", "--tensor-parallel-size=8", "--allow-no-gpu", "--settings", "s.yaml"]
    negatable = [option for option in OPTIONS if option.negatable]
    assert read_flags(OPTIONS, words) is None, "--settings is no option"
    assert read_flags(OPTIONS, words, ("--settings",)) == {
        "model": "m",
        "tensor_parallel_size": "8",
        "allow_no_gpu": "true",
    }
    for option in negatable:
        assert read_flags(OPTIONS, [f"--no-{option.flags[0].removeprefix('--')}"]) == {option.name: "false"}


def test_all_variables_of_ours_are_known_and_no_others() -> None:
    """Among them those that the project sets for what it starts; rank 0 can't import all options."""
    documented = set(re.findall(r"DYN_MPI_\w+", golden_settings()))
    assert {f"DYN_MPI_{name}" for name in KNOWN} == documented
    environ = dict.fromkeys(documented, "") | {"DYN_STAGEE": "", "MPI_STAGEE": ""}
    assert (unknown_variables(environ), known_only(environ)) == ({}, environ)


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("DYN_MPI_STAGEE", "is DYN_MPI_STAGE meant?"),
        ("DYN_MPI_LOGDIR", "is DYN_MPI_LOG_DIR meant?"),
        ("DYN_MPI_SPARES", "is DYN_MPI_SPARE_NODES meant?"),
        ("DYN_MPI_stage", "docs/reference/settings.md has the names"),
        ("DYN_MPI_", "docs/reference/settings.md has the names"),
        ("DYN_MPI_" + "X" * 10_000, "docs/reference/settings.md has the names"),
    ],
)
def test_a_misspelt_variable_comes_with_the_one_that_was_probably_meant(name: str, fix: str) -> None:
    (warning,) = unknown_variables({name: "x", "DYN_MPI_STAGE": "y"}).values()
    assert warning.startswith(f"unknown variable {name[:50]}")
    assert warning.endswith(f", which is ignored: {fix}")
    assert len(warning) < 200
    assert known_only({name: "x", "DYN_MPI_STAGE": "y"}) == {"DYN_MPI_STAGE": "y"}


MORE = ("NUM_NODES", "NUM_GPUS_PER_NODE", "NUM_SPARE_NODES", "STAGE_DIR", "CACHE_DIR", "PREFILL_ENGINE_CONFIG", "IMAGE")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("NUM_SPARE_NODE", "NUM_SPARE_NODES"),
        ("NUM_SPARES", "NUM_SPARE_NODES"),
        ("NUM_NODE", "NUM_NODES"),
        ("NUM_GPUS", "NUM_GPUS_PER_NODE"),
        ("STAGE_DIRS", "STAGE_DIR"),
        ("CACHE_DIRR", "CACHE_DIR"),
        ("PREFILL_CONFIG", "PREFILL_ENGINE_CONFIG"),
        *((name, "") for name in (*MORE, "NUM_THREADS", "NUM_CORES", "NUM_", "CACHE_HOME", "IMAGES", "STAGE", "DIR")),
    ],
)
def test_variables_without_our_prefix_are_named_only_if_they_resemble_one_of_ours(name: str, meant: str) -> None:
    warning = f"unknown variable {name}, which is ignored: is {meant} meant?"
    assert unknown_variables({name: "x"}, MORE) == ({name: warning} if meant else {})
    assert unknown_variables({name: "x"}) == {}
