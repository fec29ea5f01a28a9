# SPDX-License-Identifier: Apache-2.0
"""Pyxis's options as the user gives them, and its failures as srun prints them; see ``tests/data/pyxis``."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_mpi.common.errors import ExitCode, UsageError
from dynamo_mpi.deploy.pyxis import Container, check_mounts, mount, pyxis_failure, read_user_options, resolve_image

RECORDED = Path(__file__).resolve().parent.parent / "data" / "pyxis"
IMAGE = "/images/dynamo.sqsh"
REASONS = {
    "image_missing": (
        66,
        "agg-0: Pyxis didn't start the container on n1: failed to create container filesystem for image: /images/none.sqsh "
        "(No such file or directory: /images/none.sqsh)",
    ),
    "image_on_no_registry": (
        66,
        "agg-0: Pyxis didn't start the container on n1: failed to import docker image: none.sqsh "
        "(Could not process JSON input (there is no registry))",
    ),
    "mount_missing": (
        66,
        "agg-0: Pyxis didn't start the container on n2: --container-mounts: source path does not exist: /dev/shm/only-on-n1",
    ),
    "mount_missing_on_all_nodes": (
        66,
        "agg-0: Pyxis didn't start the container on n1: --container-mounts: source path does not exist: /nonexisting",
    ),
    "mount_refused": (
        64,
        'agg-0: Pyxis didn\'t start the container: mount source must be a relative path, an absolute path, "tmpfs" or "umount"',
    ),
    "options_contradict": (
        64,
        "agg-0: Pyxis didn't start the container: both --no-container-remap-root and its opposite were specified",
    ),
    "workdir_missing": (
        64,
        "agg-0: Pyxis didn't start the container on n1: couldn't chdir to /nope: No such file or directory",
    ),
}


def test_each_recording_has_a_case() -> None:
    assert sorted(path.stem for path in RECORDED.glob("*.txt")) == sorted(REASONS)


@pytest.mark.parametrize("name", REASONS)
def test_pyxis_own_line_is_quoted(name: str) -> None:
    failure = pyxis_failure((RECORDED / f"{name}.txt").read_text(encoding="utf-8"))
    assert failure is not None
    assert (failure.code, failure.describe("agg-0", ("n1", "n2"), 2)[0]) == REASONS[name]


@pytest.mark.parametrize("name", sorted(path.stem for path in (RECORDED.parent / "launchers").glob("*.txt")))
def test_other_ends_are_none_of_pyxis(name: str) -> None:
    assert pyxis_failure((RECORDED.parent / "launchers" / f"{name}.txt").read_text(encoding="utf-8")) is None


def test_what_pyxis_prints_besides_is_no_failure() -> None:
    assert pyxis_failure("0: pyxis: imported docker image: x\nslurmstepd: error: pyxis: failed to remove it\n") is None


def test_a_failure_without_a_reason_is_one_all_the_same() -> None:
    text = "0: slurmstepd: error: spank: required plugin spank_pyxis.so: task_init() failed with rc=-1\n"
    failure = pyxis_failure(text)
    assert failure is not None
    assert (failure.code, "gives no reason" in failure.words) == (ExitCode.NO_MODEL, True)


@pytest.mark.parametrize("call", ["task_exit", "exit"])
def test_what_fails_after_the_tasks_is_no_failure_to_start(call: str) -> None:
    # an export, a removal: the worker's own exit code counts
    text = (
        "0: slurmstepd: error: pyxis: failed to export container to file: /full/image.sqsh\n"
        f"0: slurmstepd: error: spank: required plugin spank_pyxis.so: {call}() failed with rc=-1\n"
    )
    assert pyxis_failure(text) is None


@pytest.mark.parametrize("call", ["init", "init_post_opt", "user_init", "task_init_privileged", "task_post_fork"])
def test_each_call_before_the_task_is_one_to_start_it(call: str) -> None:
    assert pyxis_failure(f"slurmstepd: error: spank: required plugin spank_pyxis.so: {call}() failed with rc=-1\n")


@pytest.mark.parametrize(
    ("words", "environ", "rest", "mounts", "variables"),
    [
        ((), {}, (), (), ()),
        (("--comment=x", "--container-mounts=/a:/a,/b"), {}, ("--comment=x",), ("/a:/a", "/b"), ()),
        (("--container-mounts", "/a:/a", "--mem=0"), {}, ("--mem=0",), ("/a:/a",), ()),
        (("--container-env=A,B", "--container-env", "C"), {}, (), (), ("A", "B", "C")),
        ((), {"PYXIS_CONTAINER_MOUNTS": "/x:/y", "PYXIS_CONTAINER_ENV": "D"}, (), ("/x:/y",), ("D",)),
        (("--container-writable", "--container-name=n"), {}, ("--container-writable", "--container-name=n"), (), ()),
    ],
)
def test_what_a_repeated_option_would_replace_is_merged(
    words: tuple[str, ...],
    environ: dict[str, str],
    rest: tuple[str, ...],
    mounts: tuple[str, ...],
    variables: tuple[str, ...],
) -> None:
    assert read_user_options(words, IMAGE, environ) == (rest, mounts, variables)


@pytest.mark.parametrize(
    ("words", "image", "environ", "says"),
    [
        (("--container-image=/other.sqsh",), IMAGE, {}, "--container-image is among srun's words"),
        (("--container-remap-root",), IMAGE, {}, "MPI doesn't recognise the user"),
        (("--container-mounts",), IMAGE, {}, "--container-mounts has no value"),
        (("--container-env=",), IMAGE, {}, "--container-env has no value"),
        (("--container-image=/i.sqsh",), None, {}, "SRUN_ARGS has --container-image"),
        ((), None, {"PYXIS_CONTAINER_IMAGE": "/i.sqsh"}, "PYXIS_CONTAINER_IMAGE is set"),
    ],
)
def test_what_contradicts_launchs_own_is_refused(
    words: tuple[str, ...], image: str | None, environ: dict[str, str], says: str
) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        read_user_options(words, image, environ)
    assert caught.value.fix


def test_without_an_image_srun_gets_its_words_as_they_are() -> None:
    words = ("--container-mounts=/a:/a", "--mem=0")
    assert read_user_options(words, None, {}).words == words


def test_the_users_names_come_after_ours_and_once() -> None:
    options = Container(IMAGE, ("/a:/b",), ("OMPI_MCA_btl", "MODEL_PATH")).options(["MODEL_PATH", "PYTHON"])
    assert "--container-env=MODEL_PATH,PYTHON,OMPI_MCA_btl" in options
    assert "--no-container-remap-root" in options


def test_a_file_in_this_folder_gets_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trt.sqsh").touch()
    image, remark = resolve_image("trt.sqsh")
    assert image == str(tmp_path / "trt.sqsh")
    assert remark.startswith(f"the image is the file {image}; ")
    assert resolve_image("other.sqsh") == ("other.sqsh", resolve_image("other.sqsh")[1])
    assert resolve_image("other.sqsh")[1].startswith("warning: Pyxis takes the image other.sqsh")
    assert resolve_image(IMAGE) == (IMAGE, "")


@pytest.mark.parametrize("path", ["/a,b", "/a:b"])
def test_a_path_with_pyxis_own_characters_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="reads commas and colons as separators"):
        mount(path, "/x")


def test_a_folder_for_copies_is_mounted_unless_it_is_already() -> None:
    container = Container("image", ("/shared:/shared", "/scratch"))
    assert container.with_mount("/local").mounts == ("/shared:/shared", "/scratch", "/local:/local")
    for folder in ("/shared", "/scratch"):
        assert container.with_mount(folder) is container
    with pytest.raises(UsageError, match="can't be mounted"):
        container.with_mount("/a:b")


@pytest.mark.parametrize("written", ["", "/a", "/a:/b", "./a:/b:ro+rprivate,/c:/d:", "tmpfs:/x,umount:/y", "/a:../b"])
def test_mounts_that_pyxis_takes(written: str) -> None:
    check_mounts(written)


@pytest.mark.parametrize("wrong", ["", "a:/b", "/a:b", ":/b", "/a:", "/a::ro", "tmpfs", " /a:/b"])
@pytest.mark.parametrize("before", ["", "/x:/y,"])
def test_mounts_that_it_does_not_take(before: str, wrong: str) -> None:
    if not before + wrong:
        return
    with pytest.raises(UsageError, match="Pyxis doesn't take") as caught:
        check_mounts(before + wrong)
    assert repr(wrong) in caught.value.problem
    assert "HOST:CONTAINER" in caught.value.expected and "MOUNTS" in caught.value.fix
