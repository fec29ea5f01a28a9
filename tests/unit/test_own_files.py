# SPDX-License-Identifier: Apache-2.0
"""Files where another user may write too: that user's links, FIFOs and files are neither followed nor waited for, and honest folders work."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from dynamo_mpi.common import folder_walk
from dynamo_mpi.common.folder_walk import ForeignFileError, UnsafeFileError
from dynamo_mpi.common.own_files import OwnFolder, make_folder, open_own, read_own, remove_own, write_own
from tests.unit.neighbour import NOBODY, as_neighbour, needs_root

APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


def folder_in(parent: Path, name: str = "run") -> Path:
    folder = parent / name
    folder.mkdir(mode=0o700)
    return folder


def guarded(path: Path) -> list[str]:
    with OwnFolder(path, guarded=True) as folder:
        return folder.names()


def test_a_file_is_written_whole_read_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "it's a file"
    write_own(path, b"one")
    write_own(path, b"two")
    assert (read_own(path), stat.S_IMODE(path.stat().st_mode), os.listdir(tmp_path)) == (b"two", 0o600, [path.name])
    remove_own(path)
    remove_own(path)
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        write_own(tmp_path / "taken", b"x")
    assert os.listdir(tmp_path) == ["taken"]


def test_the_umask_holds_unless_the_mode_is_exact(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_own(tmp_path / "a", b"", 0o666)
        write_own(tmp_path / "b", b"", 0o644, exact=True)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"] == [0o640, 0o644]


def test_a_relative_path_and_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_in(tmp_path, "a")
    monkeypatch.chdir(tmp_path / "a")
    write_own("x", b"1")
    assert (read_own("../a/./x"), guarded(Path()), guarded(Path("../a"))) == (b"1", ["x"], ["x"])


def test_an_absolute_path_where_the_current_folder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder_in(tmp_path, "gone"))
    (tmp_path / "gone").rmdir()
    write_own(tmp_path / "x", b"1")
    assert read_own(tmp_path / "x") == b"1"
    with pytest.raises(FileNotFoundError):
        read_own("x")


def test_own_links_on_the_way_are_followed(tmp_path: Path) -> None:
    folder = folder_in(tmp_path)
    (tmp_path / "relative").symlink_to("run")
    (tmp_path / "absolute").symlink_to(folder)
    (tmp_path / "chain").symlink_to(tmp_path / "relative" / ".." / "absolute")
    write_own(tmp_path / "chain" / "x", b"1")
    assert [guarded(tmp_path / name) for name in ("relative", "absolute", "chain")] == [["x"]] * 3


def test_links_in_a_circle_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="Too many levels"):
        OwnFolder(tmp_path / "a")


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR, APPEND, os.O_WRONLY | os.O_CREAT | os.O_TRUNC])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, flags: int) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to("mine")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in ("link", "fifo", "folder", "mine"):
        if name == "mine":
            os.close(open_own(tmp_path / name, flags & ~os.O_TRUNC))
            continue
        with pytest.raises((UnsafeFileError, IsADirectoryError)):
            open_own(tmp_path / name, flags)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_second_name_is_read_and_not_written(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    os.link(tmp_path / "mine", tmp_path / "log")
    assert read_own(tmp_path / "log") == b"mine"
    with pytest.raises(UnsafeFileError, match="second name"):
        open_own(tmp_path / "log", APPEND | os.O_TRUNC)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert read_own(tmp_path / "x", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_own(tmp_path / "x", 4)


def test_an_opened_file_blocks_as_usual(tmp_path: Path) -> None:
    for _ in ("new", "there"):
        descriptor = open_own(tmp_path / "log", APPEND)
        assert os.get_blocking(descriptor)
        os.close(descriptor)


@needs_root
@pytest.mark.parametrize(
    ("mode", "group", "why"),
    [
        (0o755, 0, ""),
        (0o1777, 0, ""),
        (0o2770, NOBODY, ""),
        (0o775, NOBODY, ""),
        (0o777, 0, "no sticky bit"),
        (0o757, 0, "no sticky bit"),
    ],
)
def test_parents_that_others_can_write(shared: Path, mode: int, group: int, why: str) -> None:
    folder_in(shared)
    os.chown(shared, 0, group)
    shared.chmod(mode)
    if not why:
        assert guarded(shared / "run") == []
        return
    with pytest.raises(UnsafeFileError, match=why) as caught:
        guarded(shared / "run")
    assert caught.value.fix == f"chmod +t {shared}, or name another folder"


@needs_root
@pytest.mark.parametrize(
    ("mode", "group", "is_trusted"),
    [(0o755, NOBODY, False), (0o1777, NOBODY, False), (0o775, NOBODY, False), (0o2770, 0, True), (0o755, 0, False)],
)
def test_parents_of_somebody_else(shared: Path, mode: int, group: int, is_trusted: bool) -> None:
    """Only a folder that its owner shares with a group of ours is one to work in."""
    folder_in(shared)
    os.chown(shared, NOBODY, group)
    shared.chmod(mode)
    if is_trusted:
        assert guarded(shared / "run") == []
        return
    with pytest.raises(UnsafeFileError, match=f"belongs to user {NOBODY}, who can replace") as caught:
        guarded(shared / "run")
    # as in a container with a user's folder mounted
    assert f"docker run --user {NOBODY}:{group}" in caught.value.fix


@needs_root
@pytest.mark.parametrize(("mode", "owner", "kind"), [(0o700, NOBODY, ForeignFileError), (0o720, 0, UnsafeFileError)])
def test_a_guarded_folder_is_its_users_alone(shared: Path, mode: int, owner: int, kind: type[Exception]) -> None:
    folder = folder_in(shared)
    os.chown(folder, owner, 0)
    folder.chmod(mode)
    with pytest.raises(kind):
        guarded(folder)


@needs_root
def test_in_a_rootless_container_root_is_unknown(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_in(shared)
    os.chown(shared, NOBODY, NOBODY)
    monkeypatch.setattr(folder_walk, "_outside", lambda: (NOBODY,))
    assert guarded(shared / "run") == []
    os.chown(shared / "run", NOBODY, NOBODY)
    with pytest.raises(ForeignFileError):
        guarded(shared / "run")


@needs_root
@pytest.mark.parametrize("name", ["link", "link/deeper", "own/link"])
def test_a_neighbours_link_is_not_followed(shared: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "deeper").mkdir()
    own = folder_in(shared, "own")
    own.chmod(0o1777)

    def plant() -> None:
        for place in (shared, own):
            os.symlink(tmp_path, place / "link")

    as_neighbour(plant)
    with pytest.raises(UnsafeFileError, match=f"is a link of user {NOBODY}") as caught:
        write_own(shared / name / "x", b"1")
    assert caught.value.fix == f"name the folder itself: {tmp_path}"
    assert os.listdir(tmp_path) == ["deeper"]


@needs_root
def test_a_folder_swapped_afterwards_stays_the_same(shared: Path) -> None:
    """A member of the group may rename what is in a shared folder."""
    os.chown(shared, 0, NOBODY)
    shared.chmod(0o770)
    write_own(folder_in(shared) / "x", b"ours")

    def swap() -> None:
        os.rename(shared / "run", shared / "away")
        os.mkdir(shared / "run", 0o777)
        (shared / "run" / "x").write_text("theirs")

    with OwnFolder(shared / "run", guarded=True) as folder:
        as_neighbour(swap)
        assert folder.read("x") == b"ours"
        folder.write("y", b"1")
        folder.remove("x")
    assert (os.listdir(shared / "away"), os.listdir(shared / "run")) == (["y"], ["x"])
    with pytest.raises(ForeignFileError):
        guarded(shared / "run")


def plant_file(path: Path) -> None:
    path.write_text("theirs")
    path.chmod(0o666)


@needs_root
@pytest.mark.parametrize("plant", [plant_file, os.mkfifo, lambda path: os.symlink("/etc/passwd", path)])
@pytest.mark.parametrize("flags", [os.O_RDONLY, APPEND])
def test_what_a_neighbour_planted_is_not_opened(shared: Path, plant: Callable[[Path], None], flags: int) -> None:
    as_neighbour(lambda: plant(shared / "x"))
    with pytest.raises(UnsafeFileError):
        open_own(shared / "x", flags)


def test_folders_are_made_for_this_user_alone(tmp_path: Path) -> None:
    made = tmp_path / "a" / "b"
    make_folder(made)
    make_folder(made)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (made, made.parent)] == [0o700, 0o700]
    (tmp_path / "own").symlink_to(tmp_path / "c" / "d")
    make_folder(tmp_path / "own" / "e")
    assert (tmp_path / "c" / "d" / "e").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        make_folder(tmp_path / "file" / "x")


@needs_root
@pytest.mark.parametrize("name", ["link", "link/deeper", "dangling", "dangling/deeper"])
def test_no_folder_is_made_through_a_neighbours_link(shared: Path, tmp_path: Path, name: str) -> None:
    def plant() -> None:
        os.symlink(tmp_path, shared / "link")
        os.symlink(tmp_path / "new", shared / "dangling")

    as_neighbour(plant)
    with pytest.raises(UnsafeFileError, match=f"is a link of user {NOBODY}"):
        make_folder(shared / name)
    with pytest.raises(UnsafeFileError, match=f"is a link of user {NOBODY}"):
        OwnFolder(shared / name, guarded=True, create=True)
    assert os.listdir(tmp_path) == []
