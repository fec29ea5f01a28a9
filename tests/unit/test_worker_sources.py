# SPDX-License-Identifier: Apache-2.0
"""A worker's settings are read once: those that are needed before MPI runs are the ones that rank 0 resolves. A node agent's address."""

from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path

import pytest

from dynamo_mpi.common.errors import ConfigFileError, DynamoMpiError, UsageError
from dynamo_mpi.config.sources import EARLY, WORLD_SECONDS, EarlySettings, WorkerSources
from dynamo_mpi.config.worker import former_names, load_settings
from dynamo_mpi.config.worker_options import OPTIONS


@pytest.mark.parametrize(
    ("argv", "environ", "expected"),
    [
        ([], {}, EarlySettings()),
        (["--world-timeout", "5", "--heartbeat-timeout=2.5", "--failure-dir", "/f"], {}, EarlySettings(2.5, 5.0, "/f")),
        (["--log-dir=/l"], {"DYN_MPI_LOG_DIR": "/m"}, EarlySettings(log_dir="/l")),
        (["--model", "m"], {"DYN_MPI_WORLD_TIMEOUT": "7", "DYN_MPI_FAILURE_DIR": "/g"}, EarlySettings(None, 7.0, "/g")),
        (["--world-timeout", "5", "--world-timeout=6"], {}, EarlySettings(world_timeout=6.0)),
        (["--", "--world-timeout", "5"], {}, EarlySettings()),
        # these are refused by rank 0
        (["--heartbeat-timeout", "soon"], {"DYN_MPI_WORLD_TIMEOUT": "-1"}, EarlySettings(None, WORLD_SECONDS)),
        (["--heartbeat-timeout=", "--world-timeout"], {}, EarlySettings()),
    ],
)
def test_flags_over_variables_over_defaults(argv: list[str], environ: dict[str, str], expected: EarlySettings) -> None:
    assert WorkerSources(argv, environ).early == expected


@pytest.mark.parametrize(
    ("argv", "environ", "file", "warned"),
    [
        (["--warmup-timeout", "5"], {"DYN_MPI_FAULT": "rank1:load:kill"}, "", ""),
        (["--prove-timeout", "5"], {}, "", "--prove-timeout is called --warmup-timeout now"),
        (["--prove-timeout=5"], {}, "", "--prove-timeout is called --warmup-timeout now"),
        ([], {"DYN_MPI_PROVE_TIMEOUT": "5"}, "", "DYN_MPI_PROVE_TIMEOUT is called DYN_MPI_WARMUP_TIMEOUT now"),
        ([], {}, "prove-timeout: 5", "prove_timeout in the settings file is called warmup_timeout now"),
        ([], {"DYN_MPI_FAULT": "rank1:prove:kill"}, "", "phase prove in DYN_MPI_FAULT is called warmup now"),
    ],
)
def test_a_former_name_gets_one_warning(
    argv: list[str], environ: dict[str, str], file: str, warned: str, tmp_path: Path
) -> None:
    (tmp_path / "settings.yaml").write_text(file + "\n")
    sources = WorkerSources(["--model", "m", "--settings", str(tmp_path / "settings.yaml"), *argv], environ)
    # the fault's variable isn't a setting
    assert "DYN_MPI_FAULT" in environ or load_settings(sources).warmup_timeout == 5
    warnings = former_names(sources)
    assert len(warnings) == bool(warned)
    assert not warned or warnings[0].startswith(warned)


@pytest.mark.parametrize("sources", list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("named_by", ["flag", "variable"])
def test_rank_0_resolves_the_same_values(sources: tuple[bool, ...], named_by: str, tmp_path: Path) -> None:
    in_flags, in_variables, in_file = sources
    file = tmp_path / "settings.yaml"
    given = ("world-timeout", "heartbeat_timeout", "failure-dir", "log_dir")
    values = iter(range(1, 20))
    file.write_text("".join(f"{name}: {next(values)}\n" for name in given) if in_file else "model: m\n")
    environ = {f"DYN_MPI_{name.upper().replace('-', '_')}": str(next(values)) for name in given if in_variables}
    argv = [f"--{name.replace('_', '-')}={next(values)}" for name in given if in_flags]
    if named_by == "flag":
        argv += ["--settings", str(file)]
    else:
        environ["DYN_MPI_SETTINGS"] = str(file)
    read = WorkerSources([*argv, "--model", "m"], environ)
    early = read.early
    found = load_settings(read)
    folders = [str(folder or "") for folder in (found.failure_dir, found.log_dir)]
    assert early == EarlySettings(found.heartbeat_timeout, found.world_timeout, *folders)
    origin = "flag" if in_flags else "environment" if in_variables else "settings file" if in_file else "default"
    assert all(found.origins[name].startswith(origin) for name in EARLY)


def test_early_settings_have_the_flags_and_variables_of_their_options() -> None:
    options = {option.name: option for option in OPTIONS}
    for name in EARLY:
        assert options[name].flags == (f"--{name.replace('_', '-')}",)
        assert options[name].variables == (f"DYN_MPI_{name.upper()}",)
    assert options["world_timeout"].default == EarlySettings().world_timeout
    assert {options[name].default for name in EARLY if name != "world_timeout"} == {None}


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "1e9"])
def test_invalid_early_values_are_refused_by_rank_0(value: str) -> None:
    read = WorkerSources(["--model", "m", "--heartbeat-timeout", value], {})
    assert read.early == EarlySettings()
    with pytest.raises(UsageError, match=f"flag --heartbeat-timeout is '{value}'"):
        load_settings(read)


def test_an_unreadable_settings_file_is_refused_by_rank_0(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [")
    for name in ("broken.yaml", "missing.yaml"):
        read = WorkerSources(["--settings", str(tmp_path / name), "--world-timeout", "5", "--model", "m"], {})
        assert read.early == EarlySettings(world_timeout=5.0)
        with pytest.raises(DynamoMpiError, match=name):
            load_settings(read)


def test_the_settings_file_is_read_once(tmp_path: Path) -> None:
    # a pipe can be read only once, as in `--settings <(…)`
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("world_timeout: 5\nmodel: m\n",))
    writer.start()
    read = WorkerSources(["--settings", str(pipe)], {})
    early, found = read.early, load_settings(read)
    writer.join()
    assert (early.world_timeout, found.world_timeout, str(found.model)) == (5.0, 5.0, "m")


def test_unknown_settings_name_their_file(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("modle: m\n")
    with pytest.raises(ConfigFileError, match=r"s\.yaml has unknown settings: modle"):
        load_settings(WorkerSources(["--settings", str(tmp_path / "s.yaml")], {}))
