# SPDX-License-Identifier: Apache-2.0
"""The cluster's parts that are plain functions; these tests run anywhere."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.namespaces.errors import ClusterError
from tests.namespaces.processes import ProcessIdentity

from .cluster.config import render_gres_conf, render_hosts, render_slurm_conf
from .cluster.settings import ClusterSettings
from .record_environments import replace_machine


@pytest.mark.parametrize(
    "values",
    [{"nodes": 0}, {"nodes": 100}, {"cpus_per_node": 0}, {"gpus_per_node": -1}],
    ids=lambda values: next(iter(values)),
)
def test_settings_that_cannot_work_are_refused(values: Mapping[str, int]) -> None:
    with pytest.raises(ClusterError):
        ClusterSettings(Path("/tmp/x"), **values)


def test_a_state_path_too_long_for_sockets_is_refused() -> None:
    with pytest.raises(ClusterError, match="sockets"):
        ClusterSettings(Path("/tmp") / ("x" * 64))


def test_one_gpu_and_no_gpu_are_written_without_brackets() -> None:
    one = ClusterSettings(Path("/tmp/x"), nodes=1, gpus_per_node=1)
    assert render_gres_conf(one) == "AutoDetect=off\nNodeName=n1 Name=gpu File=/tmp/x/dev/nvidia0\n"
    assert "Gres" not in render_slurm_conf(ClusterSettings(Path("/tmp/x"), gpus_per_node=0))


def test_a_reused_pid_is_another_process() -> None:
    identity = ProcessIdentity.of(os.getpid())
    assert identity is not None
    assert identity.is_alive()
    assert not ProcessIdentity(identity.pid, identity.start_ticks - 1).is_alive()


def test_settings_come_back_as_they_were_saved() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # tmp_path may be too long for a state folder
        settings = ClusterSettings(Path(folder), nodes=3, gpus_per_node=8)
        settings.save()
        assert ClusterSettings.load(Path(folder)) == settings


def test_hosts_name_the_login_node_and_every_node() -> None:
    lines = render_hosts(ClusterSettings(Path("/tmp/x"), nodes=2)).splitlines()
    assert lines[-3:] == ["10.213.77.254 login", "10.213.77.1 n1", "10.213.77.2 n2"]


def test_a_record_names_neither_the_machine_nor_its_paths() -> None:
    replacements = {"/tmp/c1": "/run/slurm", "/tmp/c1/tmp": "/tmp", "vm": "workstation"}
    assert (
        replace_machine("/tmp/c1/tmp/ompi.vm.0:/tmp/c1/spool", replacements)
        == "/tmp/ompi.workstation.0:/run/slurm/spool"
    )
    assert replace_machine("/tmp/c12 vmware", replacements) == "/tmp/c12 vmware"
