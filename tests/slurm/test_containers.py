# SPDX-License-Identifier: Apache-2.0
"""The stand-in for Pyxis and enroot: containers as their defaults make them (Pyxis 0.24, enroot 4.1), and what Pyxis refuses."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from .session import SlurmSession

pytestmark = [pytest.mark.slurm, pytest.mark.full]


def in_container(
    slurm: SlurmSession,
    *words: str,
    image: str = "",
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command as a step of one task in a container of the stand-in."""
    image = image or str(slurm.image("plain.sqsh"))
    return slurm.srun("-N1", "-n1", "--nodelist=n1", f"--container-image={image}", *options, *words, env=env)


def test_container_mounts_are_seen_by_the_step_only(slurm: SlurmSession, tmp_path: Path) -> None:
    source, target = tmp_path / "source", "/nowhere/deep"
    source.mkdir()
    (source / "weights").write_text("seen")
    options = (f"--container-mounts={source}:{target}", f"--container-workdir={target}")
    done = in_container(slurm, "bash", "-c", "pwd; cat weights", options=options)
    assert done.stdout.split() == [target, "seen"], done.stderr
    assert not Path("/nowhere").exists()


def test_a_read_only_container_mount_cannot_be_written(slurm: SlurmSession, tmp_path: Path) -> None:
    for flags, code in (":ro", 1), ("", 0):
        options = (f"--container-mounts={tmp_path}:/data{flags}",)
        assert in_container(slurm, "touch", "/data/new", options=options).returncode == code
    assert (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("image", "options", "says"),
    [
        ("", ("--container-mounts=/no/such/source:/mnt",), "source path does not exist: /no/such/source"),
        ("", ("--container-mounts=relative:/mnt",), "mount source must be a relative path, an absolute path"),
        ("", ("--container-mounts=/mnt:relative",), "mount target must be a relative path or an absolute path"),
        ("", ("--container-remap-root", "--no-container-remap-root"), "opposite were specified"),
        ("", ("--container-workdir=/no/such/folder",), "couldn't chdir to /no/such/folder: No such file"),
        ("/no/such/image.sqsh", (), "[ERROR] No such file or directory: /no/such/image.sqsh"),
        ("bare.sqsh", (), "failed to import docker image: bare.sqsh"),
    ],
)
def test_what_pyxis_refuses_is_refused(slurm: SlurmSession, image: str, options: tuple[str, ...], says: str) -> None:
    done = in_container(slurm, "true", image=image, options=options)
    assert done.returncode in (1, 255)
    assert says in done.stderr
    at_once = "srun: error: pyxis: " in done.stderr
    assert at_once or "error: spank: required plugin spank_pyxis.so: task_init() failed with rc=-1" in done.stderr


def test_a_container_has_a_temporary_folder_of_its_own_and_a_root_that_cannot_be_written(slurm: SlurmSession) -> None:
    look = "pwd; ls /tmp | grep -v ^dynmpi-; touch /tmp/mine && echo touched; touch /new 2>/dev/null || echo read-only"
    for _ in range(2):
        assert in_container(slurm, "bash", "-c", look).stdout.split() == ["/", "touched", "read-only"]
    writable = in_container(slurm, "touch", "/new", options=("--container-writable",))
    assert (writable.returncode, Path("/new").exists()) == (0, False)


def test_the_tasks_of_a_node_share_their_container(slurm: SlurmSession) -> None:
    look = "touch /tmp/$SLURM_PROCID; until [ $(ls /tmp/? | wc -l) = 2 ]; do sleep 0.05; done"
    image = slurm.image("plain.sqsh")
    assert slurm.srun("-N1", "-n2", f"--container-image={image}", "bash", "-c", look).returncode == 0


def test_of_an_option_that_is_repeated_a_node_gets_the_last_value(slurm: SlurmSession, tmp_path: Path) -> None:
    options = (f"--container-mounts={tmp_path}:/first", f"--container-mounts={tmp_path}:/second")
    done = in_container(slurm, "bash", "-c", "ls -d /first /second", options=options)
    assert done.stdout == "/second\n"


def test_whose_variables_a_container_has(slurm: SlurmSession) -> None:
    image = slurm.image("torch.sqsh", PYTORCH_VERSION="2.9.0", OF_IMAGE="image", SAME="image")
    env = {"LANG": "C.UTF-8", "LC_ALL": "C", "OMP_NUM_THREADS": "7", "SAME": "user", "RANK": "5", "OF_USER": "user"}
    names = ("LANG", "LC_ALL", "OMP_NUM_THREADS", "SAME", "OF_USER", "OF_IMAGE", "RANK", "WORLD_SIZE", "MASTER_ADDR")
    show = f"echo {' '.join(f'${{{name}-}}:' for name in names)}"
    look = ("-N1", "-n2", "--nodelist=n1", f"--container-image={image}")

    def shown(*options: str) -> set[str]:
        return set(slurm.srun(*look, *options, "bash", "-c", show, env=env).stdout.splitlines())

    assert shown() == {f": : 1: image: user: image: {rank}: 2: n1:" for rank in (0, 1)}
    named = shown("--container-env=LANG,OMP_NUM_THREADS,SAME")
    assert named == {f"C.UTF-8: : 7: user: user: image: {rank}: 2: n1:" for rank in (0, 1)}


def test_a_user_may_be_root_in_a_container(slurm: SlurmSession) -> None:
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    slurm.image("plain.sqsh")
    image = f"--container-image={slurm.cluster.settings.state}/plain.sqsh"
    for option, user in ("--container-remap-root", "0"), ("--no-container-remap-root", "65534"):
        done = slurm.exec(*nobody, "srun", "-N1", "-n1", image, option, "id", "-u")
        assert done.stdout.strip() == user, done.stderr
