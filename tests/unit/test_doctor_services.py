# SPDX-License-Identifier: Apache-2.0
"""What doctor finds of etcd and NATS: real ones, with and without credentials, and none."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.common.errors import AuthorizationError, DiscoveryError, UsageError
from dynamo_mpi.common.ports import free_port
from dynamo_mpi.deploy.certificates import Certificates, Credentials
from dynamo_mpi.deploy.programs import find_nats_server
from dynamo_mpi.deploy.services import Nats
from dynamo_mpi.discovery.etcd import EtcdAuth
from dynamo_mpi.discovery.etcd_http import HttpEtcdClient
from dynamo_mpi.ops.doctor.check import Check, Context, Status
from dynamo_mpi.ops.doctor.services import (
    EtcdAnswers,
    check_etcd,
    check_nats,
    check_run_dir,
    judge_answers,
    judge_clock,
)
from tests.certificates import certificates, without_certificate
from tests.etcd_users import PASSWORDS, add_users
from tests.servers import closed_port, running, running_etcd, running_nats, running_secured_etcd


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("tls") / "ours")


def look(environ: Mapping[str, str], *, write: bool = False, run_dir: Path | None = None) -> dict[str, Check]:
    context = Context.of(environ, 20, run_dir, write)
    # the release that the tests run may be an old one
    return {check.id: check for check in check_etcd(context) if check.id != "etcd-version"}


def keys_left(endpoint: str, environ: Mapping[str, str]) -> int:
    with HttpEtcdClient(endpoint, EtcdAuth.from_env(environ), time.monotonic() + 10) as client:
        return sum(len(client.get_prefix(prefix)) for prefix in ("v1/", "dynamo_mpi/"))


def test_an_etcd_that_is_well() -> None:
    with running_etcd() as url, closed_port() as dead:
        found = look({"ETCD_ENDPOINTS": url})
        assert [check.status for check in found.values()] == [Status.OK] * 3 + [Status.SKIPPED]
        assert found["etcd-read"].found.startswith("etcd 3.")
        assert found["clock"].found == "this host's clock and etcd's agree"
        assert look({"ETCD_ENDPOINTS": url}, write=True)["etcd-write"].status is Status.OK
        assert keys_left(url, {}) == 0
        half = look({"ETCD_ENDPOINTS": f"http://me:hunter2@127.0.0.1:{dead},{url}"})
        assert half["etcd"].status is Status.WARNING
        assert "1 of 2 endpoints do not answer" in half["etcd"].found
        assert "hunter2" not in str(half)


def test_an_etcd_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_port() as port:
        dead = f"http://127.0.0.1:{port}"
        (named,) = look({"ETCD_ENDPOINTS": dead}).values()
        assert (named.status, named.code) == (Status.ERROR, 69)
        monkeypatch.setattr("dynamo_mpi.discovery.etcd.DEFAULT_ETCD", dead)
        (unnamed,) = look({}).values()
    assert unnamed.status is Status.WARNING
    assert "ETCD_ENDPOINTS isn't set" in unnamed.found


def test_over_tls(files: Certificates) -> None:
    with running_secured_etcd(files) as url:
        known = {**files.client_environment(), "ETCD_ENDPOINTS": url}
        found = look(known, write=True)
        assert {check.status for check in found.values()} == {Status.OK}
        for secret in files.client_environment().values():
            assert secret not in str(found)
        with pytest.raises(AuthorizationError):
            look({**without_certificate(files), "ETCD_ENDPOINTS": url})


def test_with_users() -> None:
    with running_etcd() as url:
        add_users(url, ("v1/", "dynamo_mpi/"))

        def as_user(name: str, word: str) -> dict[str, Check]:
            environ = {"ETCD_ENDPOINTS": url, "ETCD_AUTH_USERNAME": name, "ETCD_AUTH_PASSWORD": word}
            found = look(environ, write=True)
            assert PASSWORDS.get(name, "-") not in str(found)
            return found

        assert as_user("worker", PASSWORDS["worker"])["etcd-write"].status is Status.OK
        refused = [as_user("guest", PASSWORDS["guest"]), as_user("worker", "wr0ng"), look({"ETCD_ENDPOINTS": url})]
        for found in refused:
            assert (found["etcd-auth"].status, found["etcd-auth"].code) == (Status.ERROR, 77)
        assert "permission denied" in refused[0]["etcd-auth"].found


def test_the_run_folders_services_are_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_etcd() as url:
        (tmp_path / "services.json").write_text(json.dumps({"environment": {"ETCD_ENDPOINTS": url}}))
        assert look({"ETCD_ENDPOINTS": "http://nowhere.invalid:1"}, run_dir=tmp_path)["etcd"].status is Status.OK
        assert main(["doctor", "--only", "services", "--run-dir", str(tmp_path), "--write"]) == 0
        assert "ok      etcd-write: v1/, dynamo_mpi/ can be written" in capsys.readouterr().out
    (there,) = check_run_dir(Context({}, run_dir=tmp_path))
    assert there.status is Status.OK
    (missing,) = check_run_dir(Context({}, run_dir=tmp_path / "none"))
    assert missing.status is Status.WARNING
    assert not list(check_run_dir(Context({})))


def test_an_outdated_etcd_is_a_warning_with_the_fix() -> None:
    _, age = judge_answers(EtcdAnswers("http://h:1", "3.5.1", 0.1, None, 0))
    assert age.status is Status.WARNING
    assert "DYN_MPI_ETCD" in age.fix


def test_slow_answers_and_clocks_apart_are_reported() -> None:
    slow, clock = judge_answers(EtcdAnswers("http://h:1", "3.5.33", 0.9, 90.0, 2))
    assert (slow.status, clock.status) == (Status.WARNING, Status.WARNING)
    assert "2 workers recorded" in slow.found
    assert clock.found == "etcd's host is 90 s ahead of this one"
    assert judge_clock(-29.0).status is Status.OK


def nats(environ: Mapping[str, str]) -> Check:
    (check,) = check_nats(Context.of(environ, 10))
    return check


def test_nats() -> None:
    assert nats({}).status is Status.SKIPPED
    with running_nats() as url:
        well = nats({"NATS_SERVER": url})
        assert well.status is Status.OK
        assert "lets us in" in well.found
    with pytest.raises(DiscoveryError):
        nats({"NATS_SERVER": url})
    with pytest.raises(UsageError):
        nats({"NATS_SERVER": "http://x"})


def test_a_nats_that_wants_a_password() -> None:
    def guarded(folder: Path) -> Nats:
        config = folder / "nats.conf"
        config.write_text('authorization { user: "dynamo", password: "hunter2" }')
        credentials = Credentials(Certificates(folder), config, {})
        return Nats(find_nats_server(), free_port(), folder, credentials=credentials)

    with running(guarded) as server:
        known = {"NATS_SERVER": server, "NATS_AUTH_USERNAME": "dynamo", "NATS_AUTH_PASSWORD": "hunter2"}
        assert nats(known).status is Status.OK
        for environ in ({"NATS_SERVER": server}, {**known, "NATS_AUTH_PASSWORD": "wr0ng"}):
            with pytest.raises(AuthorizationError):
                nats(environ)
        with pytest.raises(UsageError) as refused:
            nats({"NATS_SERVER": server.replace("//", "//dynamo:hunter2@")})
        assert "hunter2" not in str(refused.value)
