# SPDX-License-Identifier: Apache-2.0
"""What a node agent reads of a worker's command line and variables."""

from __future__ import annotations

import pytest

from dynamo_mpi.launchers.launch import Launch, Launcher
from dynamo_mpi.supervision.agent_socket import agent_socket_name
from dynamo_mpi.supervision.early_settings import WORLD_SECONDS, Limits


@pytest.mark.parametrize(
    ("argv", "environ", "expected"),
    [
        ([], {}, Limits(None, WORLD_SECONDS, "")),
        (["--world-timeout", "5", "--heartbeat-timeout=2.5", "--failure-dir", "/f"], {}, Limits(2.5, 5.0, "/f")),
        (["--log-dir=/l"], {"DYN_MPI_LOG_DIR": "/m"}, Limits(log_dir="/l")),
        (["--world-timeout"], {"DYN_MPI_WORLD_TIMEOUT": "7"}, Limits(None, WORLD_SECONDS, "")),
        (["--model", "m"], {"DYN_MPI_WORLD_TIMEOUT": "7", "DYN_MPI_FAILURE_DIR": "/g"}, Limits(None, 7.0, "/g")),
        # these are refused by rank 0
        (["--heartbeat-timeout", "soon"], {"DYN_MPI_WORLD_TIMEOUT": "-1"}, Limits(None, WORLD_SECONDS, "")),
    ],
)
def test_flags_over_variables_over_defaults(argv: list[str], environ: dict[str, str], expected: Limits) -> None:
    assert Limits.of(argv, environ) == expected


def test_worlds_that_share_a_node_do_not_share_an_address() -> None:
    two = Launch(Launcher.OPEN_MPI, size=2)
    step = Launch(Launcher.SLURM_PMIX, size=2, job_id="7", step_id="1")
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
        agent_socket_name(Launch(Launcher.SLURM_PMIX, size=1, job_id="7", step_id="1"), {"PMIX_NAMESPACE": "x"}) == ""
    )
    assert agent_socket_name(Launch(Launcher.HYDRA, size=2), {}) == ""
