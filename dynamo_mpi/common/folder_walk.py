# SPDX-License-Identifier: Apache-2.0
"""Walks the path of a folder from the root, one directory after the other, each by the descriptor of the one before: what is renamed or
replaced afterwards changes nothing. On the way

- a link is followed only if root or this user has made it;
- for a run folder (``guarded``), no other user may replace what is there: a directory is root's, this user's, or one that its group shares
  with this user (group-writable); one that every user may write has the sticky bit, as ``/tmp``;
- for files with code that this user will run (``sole``), nor may a member of a group: no directory is writable by a group, without the sticky
  bit. The folder and its files may be root's.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat

from dynamo_mpi.common.display import sanitize, shell_word

STEP = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
"""Flags to open a directory of the way."""
_MOST_LINKS = 40
_MOST_SHOWN = 1000
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_WHOLE_MAP = ["0", "0", "4294967295"]


class UnsafeFileError(PermissionError):
    """Other users have, or may change, a file or folder or the way to it. ``strerror`` says why.

    Args:
        path: the file or folder.
        problem: the problem, beginning with a verb: ``is a link``.
        fix: what the user can do; empty if there is nothing but another path.
    """

    def __init__(self, path: str, problem: str, fix: str = "") -> None:
        super().__init__(errno.EPERM, f"{sanitize(path, _MOST_SHOWN)} {problem}")
        self.fix = fix


class ForeignFileError(UnsafeFileError):
    """A file or folder belongs to another user."""


def reason(error: OSError) -> str:
    """Return why a file or folder can't be used, and what to do if the error says it: for a message without a ``fix`` of its own."""
    return "; ".join(filter(None, (error.strerror or str(error), fix_for(error, ""))))


def fix_for(error: OSError, otherwise: str) -> str:
    """Return what the user can do, by the error itself if it says it."""
    return (isinstance(error, UnsafeFileError) and error.fix) or otherwise


def open_folder(
    path: str, *, guarded: bool, create: bool, parents: bool = True, sole: bool = False, mode: int = 0o700
) -> int:
    """Return the descriptor of a directory, see `own_files.OwnFolder`."""
    # the current folder may be gone, and an absolute path doesn't need it
    whole = path if path.startswith("/") else os.path.join(os.getcwd(), path)
    parts = [part for part in whole.split("/") if part][::-1]
    links, place, here = 0, "/", os.open("/", STEP | os.O_DIRECTORY)
    try:
        while parts:
            if guarded:
                _require_guarded(place, os.fstat(here), sole=sole)
            name = parts.pop()
            try:
                # the flag has automounts mounted
                following = _step(name, here, create=create and (parents or not parts), mode=mode)
            except FileNotFoundError:
                if not create or parents:
                    raise
                missing = sanitize(os.path.join(place, name), _MOST_SHOWN)
                text = f"there is no {missing}, and only the last folder of a path is created"
                raise FileNotFoundError(errno.ENOENT, text) from None
            except NotADirectoryError:
                links += 1
                target = _target(os.path.join(place, name), name, here, links)
                parts += [part for part in target.split("/") if part][::-1]
                if not target.startswith("/"):
                    continue
                name, following = "/", os.open("/", STEP | os.O_DIRECTORY)
            os.close(here)
            here, place = following, os.path.normpath(os.path.join(place, name))
        if guarded:
            _require_private(place, os.fstat(here), or_root=sole)
    except OSError:
        os.close(here)
        raise
    return here


def _step(name: str, parent: int, *, create: bool, mode: int) -> int:
    """Open a directory in another one."""
    try:
        return os.open(name, STEP | os.O_DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        if not create:
            raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, mode, dir_fd=parent)
    return os.open(name, STEP | os.O_DIRECTORY, dir_fd=parent)


def _target(path: str, name: str, parent: int, links: int) -> str:
    """Return where a link leads."""
    link = os.open(name, STEP, dir_fd=parent)
    try:
        status = os.fstat(link)
        if not stat.S_ISLNK(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        target = os.readlink("", dir_fd=link)
        if status.st_uid not in _trusted():
            raise UnsafeFileError(
                path, f"is a link of user {status.st_uid}", f"name the folder itself: {shell_word(target)}"
            )
        return target
    finally:
        os.close(link)


def require_own(path: str, status: os.stat_result, *, or_root: bool = False) -> None:
    """Raise a `ForeignFileError` unless a file or folder is this user's."""
    if status.st_uid != os.geteuid() and not (or_root and status.st_uid in _trusted()):
        raise ForeignFileError(path, f"belongs to user {status.st_uid}")


def _require_private(path: str, status: os.stat_result, *, or_root: bool) -> None:
    require_own(path, status, or_root=or_root)
    if status.st_mode & WRITABLE_BY_OTHERS:
        mode = stat.S_IMODE(status.st_mode)
        # a folder such as /tmp must stay as it is
        fix = "name a folder below it" if status.st_mode & stat.S_ISVTX else f"chmod 700 {shell_word(path)}"
        raise UnsafeFileError(path, f"is a folder that others can write (mode {mode:04o})", fix)


def _require_guarded(path: str, status: os.stat_result, *, sole: bool) -> None:
    """Check a directory on the way to a guarded one."""
    if sole and status.st_mode & stat.S_IWGRP and not status.st_mode & stat.S_ISVTX:
        raise UnsafeFileError(path, "can be written by its group", f"chmod g-w {shell_word(path)}")
    is_shared = not sole and status.st_mode & stat.S_IWGRP and status.st_gid in (os.getegid(), *os.getgroups())
    if status.st_uid not in _trusted() and not is_shared:
        # root in a container often works in a mount of a user of the host
        fix = f"run as that user (docker run --user {status.st_uid}:{status.st_gid}), or name a folder below one of root's"
        whose = f"belongs to user {status.st_uid}, who can replace what is in it"
        raise UnsafeFileError(path, whose, "" if os.geteuid() else fix)
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise UnsafeFileError(
            path,
            "can be written by every user and has no sticky bit",
            f"chmod +t {shell_word(path)}, or name another folder",
        )


def _trusted() -> tuple[int, ...]:
    """Return the users whose links and directories are trusted on the way."""
    return (0, os.geteuid(), *_outside())


def user_number() -> int:
    """Return this user's number outside of this user namespace: in containers that show their user as root, it alone is the user's own.

    Source: user_namespaces(7), "User and group ID mappings". Of a namespace in another one, it is that of the outer.
    """
    own = os.geteuid()
    with contextlib.suppress(OSError, ValueError), open("/proc/self/uid_map", encoding="ascii") as file:
        for line in file:
            inside, outside, count = map(int, line.split())
            if inside <= own < inside + count:
                return outside + own - inside
    return own


def require_root_s(path: str) -> None:
    """Raise a `ForeignFileError` unless root has made a folder.

    In a user namespace root is seen as all users outside are, so there the folder above must be one in which only its owner creates folders.
    """
    status, above = os.lstat(path), os.stat(os.path.dirname(path))
    if status.st_uid and (status.st_uid not in _outside() or above.st_mode & WRITABLE_BY_OTHERS):
        raise ForeignFileError(
            path, f"belongs to user {status.st_uid}, or it can't be seen from here that it is root's"
        )


def user_folder(prefix: str = "dynamo-mpi") -> str:
    """Return the name of this user's folder below one that users share."""
    return f"{prefix}-{user_number()}"


@functools.cache
def _outside() -> tuple[int, ...]:
    """Return the user who stands for all users outside of this user namespace, root among them: in a rootless container."""
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/uid_map", encoding="ascii") as file:
            if file.read().split() == _WHOLE_MAP:
                return ()
        with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
            return (int(file.read()),)
    return ()
