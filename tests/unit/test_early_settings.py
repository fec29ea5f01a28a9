# SPDX-License-Identifier: Apache-2.0
"""What a node agent reads of a worker's command line and variables."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from dynamo_mpi.config.worker import load_settings
from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo
from dynamo_mpi.supervisor.agent_socket import agent_socket_name
from dynamo_mpi.supervisor.early_settings import WORLD_SECONDS, Limits


@pytest.mark.parametrize(
    ("argv", "environ", "expected"),
    [
        ([], {}, Limits(None, WORLD_SECONDS, "")),
        (["--world-timeout", "5", "--heartbeat-timeout=2.5", "--failure-dir", "/f"], {}, Limits(2.5, 5.0, "/f")),
        (["--log-dir=/l"], {"DYN_MPI_LOG_DIR": "/m"}, Limits(log_dir="/l")),
        (["--model", "m"], {"DYN_MPI_WORLD_TIMEOUT": "7", "DYN_MPI_FAILURE_DIR": "/g"}, Limits(None, 7.0, "/g")),
        # these are refused by rank 0
        (["--heartbeat-timeout", "soon"], {"DYN_MPI_WORLD_TIMEOUT": "-1"}, Limits(None, WORLD_SECONDS, "")),
    ],
)
def test_flags_over_variables_over_defaults(argv: list[str], environ: dict[str, str], expected: Limits) -> None:
    assert Limits.of(argv, environ) == expected


@pytest.mark.parametrize("sources", list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("named_by", ["flag", "variable"])
def test_they_are_the_settings_that_rank_0_reads(sources: tuple[bool, ...], named_by: str, tmp_path: Path) -> None:
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
    read = load_settings([*argv, "--model", "m"], environ)
    folders = [str(folder or "") for folder in (read.failure_dir, read.log_dir)]
    assert Limits.of(argv, environ) == Limits(read.heartbeat_timeout, read.world_timeout, *folders)


def test_a_settings_file_that_cannot_be_read_is_for_rank_0_to_refuse(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [")
    for name in ("broken.yaml", "missing.yaml"):
        assert Limits.of(["--settings", str(tmp_path / name), "--world-timeout", "5"], {}) == Limits(None, 5.0)


def test_worlds_that_share_a_node_do_not_share_an_address() -> None:
    two = LaunchInfo(Launcher.OPEN_MPI, size=2)
    step = LaunchInfo(Launcher.SLURM_PMIX, size=2, job_id="7", step_id="1")
    addresses = [
        agent_socket_name(
            two, {"PMIX_NAMESPACE": "prterun-host-7@1", "PMIX_SERVER_URI4": "pmix.0;tcp4://127.0.0.1:4001"}
        ),
        # another container with a pid namespace of its own, and this network
        agent_socket_name(
            two, {"PMIX_NAMESPACE": "prterun-host-7@1", "PMIX_SERVER_URI4": "pmix.0;tcp4://127.0.0.1:4002"}
        ),
        agent_socket_name(step, {}),
        agent_socket_name(step._replace(step_id="2"), {}),
        agent_socket_name(two, {"PMIX_NAMESPACE": "prterun-" + "very-long-name." * 20 + "@1"}),
    ]
    assert len(set(addresses)) == len(addresses)
    assert all(address.startswith("\0dynamo_mpi ") and len(address) <= 107 for address in addresses)


def test_a_rank_that_is_alone_or_nameless_has_none() -> None:
    assert (
        agent_socket_name(LaunchInfo(Launcher.SLURM_PMIX, size=1, job_id="7", step_id="1"), {"PMIX_NAMESPACE": "x"})
        == ""
    )
    assert agent_socket_name(LaunchInfo(Launcher.HYDRA, size=2), {}) == ""
