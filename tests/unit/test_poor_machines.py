# SPDX-License-Identifier: Apache-2.0
"""Commands on a machine that refuses them something ordinary: each ends with one message, with a fix, and a code of the table."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_mpi.common.os_errors import exhausted, of_os_error
from dynamo_mpi.common.ports import require_loopback
from dynamo_mpi.config.sources import WorkerSources
from dynamo_mpi.config.worker import load_settings, resolve_model_dir
from tests.conftest import ROOT, run_command

pytestmark = pytest.mark.slow

PYTHON = (sys.executable, "-m")
GONE = "the current folder doesn't exist any more"


def refused(words: tuple[str, ...], problem: str, code: int = 64, *, env: dict[str, str] | None = None) -> str:
    done = run_command(words, env={**os.environ, **(env or {})}, timeout=60)
    assert (done.returncode, done.stderr.count(problem)) == (code, 1), done.stderr
    assert "Traceback" not in done.stderr
    assert "fix:" in done.stderr
    return done.stderr


def unshared(script: str) -> tuple[str, ...]:
    """Words that run a command in a network namespace of its own, after ``script``."""
    words = ("unshare", "--net", "sh", "-c", f'{script}; exec "$@"', "sh")
    if os.geteuid() or subprocess.run([*words, "ip", "link"], capture_output=True).returncode:
        pytest.skip("no network namespace here: needs root and iproute2")
    return words


@pytest.mark.parametrize(
    "words",
    [
        "dynamo_mpi down",
        "dynamo_mpi down x",
        "dynamo_mpi status --run-dir x",
        "dynamo_mpi wait --run-dir x",
        "dynamo_mpi local",
        "dynamo_mpi.head_node --run-dir x",
        "dynamo_mpi.worker --preflight-only --engine reference --model x",
    ],
)
def test_a_current_folder_that_was_removed(words: str, tmp_path: Path) -> None:
    gone = ("sh", "-c", 'mkdir "$0" && cd "$0" && rmdir "$0" && exec "$@"', str(tmp_path / "gone"))
    refused((*gone, *PYTHON, *words.split()), GONE)


def test_absolute_paths_need_no_current_folder(tmp_path: Path) -> None:
    gone = ("sh", "-c", 'mkdir "$0" && cd "$0" && rmdir "$0" && exec "$@"', str(tmp_path / "gone"))
    refused((*gone, *PYTHON, "dynamo_mpi", "status", "--run-dir", "/no/such"), "there is no folder /no/such")


@pytest.mark.parametrize(
    "script", ["true", "ip link set lo up; ip address del 127.0.0.1/8 dev lo"], ids=["down", "gone"]
)
def test_no_loopback(script: str) -> None:
    refused((*unshared(script), *PYTHON, "dynamo_mpi", "local"), "nothing can be reached at 127.0.0.1")


def test_loopback_is_here() -> None:
    require_loopback()


def test_no_space_for_temporary_files(tmp_path: Path) -> None:
    mount = ("unshare", "--mount", "sh", "-ec", 'mount -t tmpfs -o size=100m tmpfs "$0"; exec "$@"', str(tmp_path))
    if os.geteuid() or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace here: needs root")
    # `run_command` sets TMPDIR
    said = refused((*mount, "env", f"TMPDIR={tmp_path}", *PYTHON, "dynamo_mpi", "local"), "MiB of free space")
    assert f"{tmp_path} has 100 MiB" in said
    assert "set TMPDIR" in said


def limited(limit: int, folder: Path) -> tuple[str, ...]:
    """Words that run a command as a user without root's privileges but that to read files (Python may be in a folder of root's), with a
    limit of processes."""
    capabilities = (
        "--inh-caps=+dac_override",
        "--ambient-caps=+dac_override",
        "--bounding-set=-sys_resource,-sys_admin",
    )
    user = ("setpriv", "--reuid=23456", "--regid=23456", "--clear-groups", *capabilities)
    if os.geteuid() or subprocess.run([*user, "true"], capture_output=True).returncode:
        pytest.skip("no other user here: needs root and setpriv")
    folder.chmod(0o1777)
    return (*user, "prlimit", f"--nproc={limit}", "env", f"HOME={folder}", f"TMPDIR={folder}")


@pytest.mark.parametrize("limit", [1, 8])
def test_no_more_processes(limit: int, tmp_path: Path) -> None:
    command = (*limited(limit, tmp_path), *PYTHON, "dynamo_mpi", "local", "--model", str(tmp_path))
    done = run_command(command, env=os.environ, timeout=60)
    assert done.returncode not in (0, 1), done.stderr
    assert "no further process or thread" in done.stderr
    assert "ulimit -u" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_signal_of_a_numpy_without_threads_is_no_ctrl_c(tmp_path: Path) -> None:
    code = "from dynamo_mpi.common.os_errors import import_numpy; import_numpy()"
    environ = {**os.environ, "OPENBLAS_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    done = run_command((*limited(1, tmp_path), sys.executable, "-c", code), env=environ, timeout=60)
    assert "OpenBLAS blas_thread_init" in done.stderr
    assert done.stderr.splitlines()[-3].endswith("UsageError: no further process or thread can be started")
    assert done.returncode == 1


def test_a_ctrl_c_while_numpy_is_imported_is_one() -> None:
    code = (
        "import os, signal, sys\n"
        "from dynamo_mpi.common.os_errors import import_numpy\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'numpy': os.system(f'kill -2 {os.getpid()}')\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "try: import_numpy()\n"
        "except KeyboardInterrupt: print('interrupted', 'numpy' in sys.modules)\n"
    )
    done = run_command((sys.executable, "-c", code), env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert (done.returncode, done.stdout) == (0, "interrupted True\n"), done.stderr


def test_errors_of_the_system_have_a_fix() -> None:
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    for number, code, words in (
        (28, 64, "TMPDIR"),
        (11, 64, "ulimit -u"),
        (24, 64, "ulimit -n"),
        (5, 70, "rights"),
    ):
        error = of_os_error(OSError(number, os.strerror(number), "/a/file"))
        assert (error.exit_code, words in error.fix) == (code, True)
    assert limit == resource.RLIM_INFINITY or str(limit) in of_os_error(BlockingIOError(11, "")).expected


def test_what_a_process_may_have_lacked(tmp_path: Path) -> None:
    assert exhausted(tmp_path, "panic: no idea") == ""
    assert "ulimit -u" in exhausted(tmp_path, "runtime: failed to create new OS thread (have 7 already)")
    assert exhausted(tmp_path / "none", "Resource temporarily unavailable") == ""


def test_a_name_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    """As a UTF-8 name is read in an ASCII locale, or a Latin-1 name in a UTF-8 one: Dynamo's runtime takes neither."""
    folder = tmp_path / os.fsdecode(b"m\xf6del")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    settings = load_settings(WorkerSources(["--engine", "reference", "--model", str(folder)], {}))
    with pytest.raises(Exception, match="UTF-8") as caught:
        resolve_model_dir(settings, {})
    assert caught.value.exit_code == 64  # type: ignore[attr-defined]


def test_an_mpi_that_cannot_start_is_not_taken_for_lack_of_memory() -> None:
    """MPI ends the process itself, inside MPI_Init; the node agent reports it."""
    words = (*PYTHON, "dynamo_mpi.worker", "--preflight-only", "--engine", "reference", "--model", "/no/such")
    done = run_command(words, env={**os.environ, "OMPI_MCA_pml": "none-such"}, timeout=60)
    assert done.returncode not in (0, 66), done.stderr
    report = done.stderr.partition("error in mpi_init: ")[2]
    assert report.startswith("died while MPI started: "), done.stderr
    assert "read MPI's own lines" in report
    assert "memory" not in report


def test_an_error_is_described_where_nothing_can_be_imported_any_more() -> None:
    code = (
        "import resource, sys\n"
        "from dynamo_mpi.common.failure import describe_error\n"
        "assert 'traceback' not in sys.modules\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "print(describe_error(ValueError('no')))\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "('ValueError: no', 70)\n"), done.stderr
