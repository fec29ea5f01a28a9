# SPDX-License-Identifier: Apache-2.0
"""`launch` with containers: what the user gives beside the image and its mounts, and images and mounts that can't be used."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.dynamo.running import eventually

from .deployment import Deployment
from .session import SlurmSession
from .test_deployment import settings

pytestmark = pytest.mark.slurm
Launch = Callable[..., Deployment]
CONFIG = "/own/engine.yaml"


@pytest.fixture
def launch(slurm: SlurmSession, tmp_path: Path, small_model_dir: Path) -> Iterator[Launch]:
    """Launch one aggregated worker of two ranks over two nodes, and end whatever is left of it."""
    started: list[Deployment] = []

    def begin(*words: str, nodes: int = 2, **environment: str) -> Deployment:
        variables = settings(slurm, small_model_dir, 2, 1, CONFIG) | {"ENGINE_CONFIG": CONFIG, "NUM_NODES": "2"}
        (tmp_path / "engine.yaml").write_text("tensor_parallel_size: 1\npipeline_parallel_size: 2\n")
        variables["MOUNTS"] += f",{tmp_path}:/own"
        command = (str(ROOT / "scripts" / "srun_aggregated.sh"), *words)
        started.append(Deployment(slurm, tmp_path, command, {**variables, **environment}, nodes=nodes))
        return started[-1]

    yield begin
    for deployment in started:
        deployment.stop()


def environment_of(deployment: Deployment, node: str) -> dict[str, str]:
    """Return the environment of the worker's first process on a node."""
    pid = deployment.pids_of(node, "dynamo_mpi.worker")[0]
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def test_the_users_options_and_variables_reach_the_ranks(launch: Launch, slurm: SlurmSession, tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    extra.mkdir()
    image = slurm.image("torch.sqsh", PYTORCH_VERSION="2.9.0", OMPI_MCA_mpi_yield_when_idle="0", SITE="image")
    deployment = launch(
        IMAGE=str(image),
        SRUN_ARGS=f"--container-mounts={extra}:/extra:ro --container-env=SITE",
        PYXIS_CONTAINER_MOUNTS=f"{extra}:/by-variable",
        SITE="user",
        OMP_NUM_THREADS="2",
        RANK="77",
    )
    deployment.wait_for_text("ready: smollm2. Try:")
    for number, node in enumerate(("n1", "n2")):
        found = environment_of(deployment, node)
        assert {name: found[name] for name in ("SITE", "OMP_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle", "RANK")} == {
            "SITE": "user",
            "OMP_NUM_THREADS": "2",
            "OMPI_MCA_mpi_yield_when_idle": "1",
            "RANK": str(number),
        }
        root = Path(f"/proc/{deployment.pids_of(node, 'dynamo_mpi.worker')[0]}/root")
        for folder in ("extra", "by-variable", "own", "mnt", "dynamo_mpi_run", "dynamo_mpi"):
            assert (root / folder).is_dir()
    os.kill(deployment.launcher(), signal.SIGINT)
    assert deployment.wait() == 130, deployment.text()


@pytest.mark.full
@pytest.mark.full
def test_a_spare_is_checked_in_the_image(launch: Launch, slurm: SlurmSession) -> None:
    image = slurm.image("spare.sqsh")
    deployment = launch("--skip-check", nodes=3, IMAGE=str(image), NUM_SPARE_NODES="1", SALLOC_NO_KILL="set")
    deployment.wait_for_text("ready: smollm2. Try:")

    def spare() -> dict[str, str]:
        (found,) = json.loads((deployment.run_dir / "deployment.json").read_text())["spares"]
        return dict(found)

    eventually(lambda: spare()["state"] == "ready", "the spare is ready", 60)
    facts = json.loads((deployment.run_dir / "spares" / f"{spare()['node']}.json").read_text())
    ready = json.loads((deployment.run_dir / "ready" / "agg-0.json").read_text())
    # the paths are those in the image
    assert facts["files"].items() >= ready["node"]["files"].items()
    assert facts["weight_names"] == ready["node"]["weight_names"]
    os.kill(deployment.launcher(), signal.SIGINT)
    assert deployment.wait() == 130, deployment.text()
    assert "left out" not in deployment.text()


def test_a_mount_that_one_node_lacks_is_named(launch: Launch, slurm: SlurmSession) -> None:
    # each node has a /dev/shm of its own
    slurm.exec("mkdir", "/dev/shm/only-here", host="n1")
    try:
        deployment = launch("--max-restarts", "2", SRUN_ARGS="--container-mounts=/dev/shm/only-here:/extra")
        assert deployment.wait(90) == 66, deployment.text()
    finally:
        slurm.exec("rmdir", "/dev/shm/only-here", host="n1")
    says = (
        "agg-0: Pyxis didn't start the container on n2: --container-mounts: source path does not exist: /dev/shm/only"
    )
    text = deployment.text()
    assert says in text
    # where srun has dropped slurmstepd's lines, nothing else shows that the container failed
    assert text.count("start 2 of") == text.count("slurmd's log there has Pyxis's lines"), text
    assert not deployment.left()


def test_an_image_that_is_missing_is_named(launch: Launch) -> None:
    deployment = launch(IMAGE="/no/such/image.sqsh")
    assert deployment.wait() == 66, deployment.text()
    assert "check: Pyxis didn't start the container" in deployment.text()
    assert "No such file or directory: /no/such/image.sqsh" in deployment.text()
