# SPDX-License-Identifier: Apache-2.0
"""Command lines and environments of ``dynamo-mpi local``'s parts."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.common.subprocess import with_pdeathsig
from dynamo_mpi.deploy.local.workers import MpirunWorker, WorkerRole, WorkerSpec, mpi_environment, served_name
from dynamo_mpi.deploy.programs import discovery_environment, local_environment, local_services
from dynamo_mpi.deploy.services import Etcd, Frontend, Nats

ETCD = Etcd(Path("/bin/etcd"), 2379, Path("/run/etcd"))
NATS = Nats(Path("/bin/nats-server"), 4222, Path("/run/nats"))


def values_after(command: tuple[str, ...], flag: str) -> list[str]:
    return [value for name, value in itertools.pairwise(command) if name == flag]


def make_ranks(mpirun: tuple[str, ...] = ("mpirun",), spec: WorkerSpec = WorkerSpec("agg", 3)) -> MpirunWorker:  # noqa: B008 - it is frozen
    return MpirunWorker(
        mpirun=mpirun,
        spec=spec,
        model=Path("/run/model"),
        served_model_name="a model",
        engine_config=Path("/run/engine.yaml"),
        ready_file=Path("/run/ready.json"),
        rank_logs=Path("/run/ranks"),
        scratch=Path("/run/scratch"),
        discovery={"ETCD_ENDPOINTS": "http://127.0.0.1:2379"},
        timeline=Path("/run/timeline/worker.html"),
    )


@pytest.mark.parametrize("service", [ETCD, NATS, Frontend(8000, {})], ids=lambda service: service.name)
def test_a_service_listens_on_loopback_only(service: Etcd | Nats | Frontend) -> None:
    words = service.command()
    addresses = [word for word in words if re.search(r"\d+\.\d+\.\d+\.\d+", word)]
    assert str(service.port) in " ".join(words)
    assert addresses
    assert all("127.0.0.1" in word for word in addresses)


def test_etcd_needs_no_fixed_peer_port() -> None:
    command = ETCD.command()
    peers = values_after(command, "--listen-peer-urls") + values_after(command, "--initial-advertise-peer-urls")
    assert peers == ["http://127.0.0.1:0"] * 2
    assert values_after(command, "--initial-cluster") == ["default=http://127.0.0.1:0"]


@pytest.mark.parametrize(("plane", "servers"), [("tcp", None), ("nats", "nats://127.0.0.1:4222")])
def test_nats_is_named_on_its_own_plane_only(plane: str, servers: str | None) -> None:
    services = local_services(ETCD, NATS, plane, None)  # type: ignore[arg-type]  # parametrize knows no literals
    assert services.get("NATS_SERVER") == servers
    assert services["ETCD_ENDPOINTS"] == "http://127.0.0.1:2379"
    assert discovery_environment(plane)["DYN_REQUEST_PLANE"] == plane  # type: ignore[arg-type]  # the same


def test_every_rank_ends_with_its_launcher() -> None:
    command = make_ranks(("srun", "--mpi=pmix"), WorkerSpec("agg", 9)).command()
    assert command[:4] == ("srun", "--mpi=pmix", "-n", "9")
    worker = command[command.index("--") + 1 :]
    assert worker[:3] == (sys.executable, "-m", "dynamo_mpi.worker")
    assert values_after(worker, "--served-model-name") == ["a model"]
    assert values_after(command[: command.index("--")], "--rank-logs") == ["/run/ranks"]
    assert "--parent" not in command  # a rank's parent is the launcher, whose id isn't known yet


@pytest.mark.parametrize(("role", "networks"), [("agg", []), ("prefill", ["127.0.0.1"]), ("decode", ["127.0.0.1"])])
def test_kv_is_served_on_loopback_only(role: WorkerRole, networks: list[str]) -> None:
    command = make_ranks(spec=WorkerSpec(role, 1)).command()
    assert values_after(command, "--role") == [role]
    assert values_after(command, "--kv-network") == networks


@pytest.mark.parametrize(
    ("contents", "pid"),
    [(None, None), ('{"pid": 7}', 7), ("{}", None), ('{"pid": "7"}', None), ("[7]", None), ("{", None)],
)
def test_rank_zero_is_who_the_ready_file_says(tmp_path: Path, contents: str | None, pid: int | None) -> None:
    ranks = replace(make_ranks(), ready_file=tmp_path / "ready.json")
    if contents is not None:
        ranks.ready_file.write_text(contents)
    assert ranks.rank_zero() == pid


def test_a_command_that_ends_with_its_parent_keeps_its_words() -> None:
    words = ["program", "--", "-x", "two words", ""]
    command = with_pdeathsig(words, parent=7)
    assert list(command[command.index("--") + 1 :]) == words
    assert values_after(command, "--parent") == ["7"]


@pytest.mark.parametrize("root", [True, False])
def test_open_mpi_gets_the_root_option_only_as_root(root: bool) -> None:
    assert ("OMPI_ALLOW_RUN_AS_ROOT" in mpi_environment(Path("/run"), root=root)) == root


def test_the_stack_takes_nothing_from_another_deployment() -> None:
    foreign = {
        "ETCD_ENDPOINTS": "http://production:2379",
        "ETCD_AUTH_PASSWORD": "secret",
        "NATS_SERVER": "nats://production:4222",
        "DYN_NAMESPACE": "production",
        "SLURM_NTASKS": "8",
        "SLURMD_NODENAME": "n1",
        "PMIX_RANK": "3",
        "PMI_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "8",
    }
    kept = {"HOME": "/home/me", "DYN_LOG": "debug", "OMPI_MCA_pml": "ob1", "DYN_MPI_X": "1", "PATH": "/bin"}
    result = local_environment(foreign | kept, Path("/run/scratch"))
    assert not foreign.keys() & result.keys()
    assert kept.items() <= result.items()
    assert result["TMPDIR"] == "/run/scratch"


@given(st.none() | st.sampled_from(["", "example.com", "10.0.0.0/8,.corp"]))
def test_loopback_never_goes_through_a_proxy(given_exceptions: str | None) -> None:
    own = {} if given_exceptions is None else {"no_proxy": given_exceptions}
    exceptions = local_environment(own, Path("/run"))["no_proxy"].split(",")
    assert exceptions[-2:] == ["127.0.0.1", "localhost"]
    assert "" not in exceptions
    assert not given_exceptions or exceptions[:-2] == given_exceptions.split(",")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("model.gguf", "model"),
        ("Qwen2.5-0.5B.Q8_0.gguf", "Qwen2.5-0.5B"),
    ],
)
def test_served_name_is_the_file_name_without_quantisation(file: str, name: str) -> None:
    assert served_name(Path("/models") / file) == name
