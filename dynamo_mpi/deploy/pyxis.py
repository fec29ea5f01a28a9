# SPDX-License-Identifier: Apache-2.0
"""Pyxis, Slurm's plugin for containers: srun's options for an image, what the user gives of them, and failures of Pyxis itself.

Slurm hands a plugin only the last value of a repeated option, and Pyxis reads its ``PYXIS_CONTAINER_*`` variables only for options that
weren't given; so the user's values have to be merged with ours (Pyxis 0.24: args.c, pyxis_slurmstepd.c).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Pyxis separates mounts by commas and a mount's parts by colons, without quoting
_SEPARATORS = ",:"
_PATHS = ("/", ".")
_FILES = (".sqsh", ".squashfs")
_MERGED = {"--container-mounts": "PYXIS_CONTAINER_MOUNTS", "--container-env": "PYXIS_CONTAINER_ENV"}
# with any other value than ours, Pyxis refuses the step or its ranks do
_OURS = {
    "--container-image": "the image is for all steps of the deployment",
    "--container-remap-root": "MPI doesn't recognise the user of Slurm's PMIx server where the ranks are root",
}


@dataclass(frozen=True)
class Container:
    """The container image of all steps.

    Args:
        image: ``REGISTRY#IMAGE:TAG``, or a .sqsh file.
        mounts: ``HOST:CONTAINER[:FLAGS]``, ours after the user's.
        variables: names of variables that the user wants to win over the image's.
    """

    image: str
    mounts: tuple[str, ...]
    variables: tuple[str, ...] = ()

    def with_mount(self, folder: str) -> Container:
        """Return the same container with a folder of the host at the same path, unless something is mounted there already.

        Raises:
            UsageError: it can't be mounted.
        """
        # a mount without a second part is at the same path
        if any((entry.split(":") * 2)[1] == folder for entry in self.mounts):
            return self
        return replace(self, mounts=(*self.mounts, mount(folder, folder)))

    def options(self, variables: Iterable[str]) -> tuple[str, ...]:
        """Return srun's options.

        Args:
            variables: names of variables that the image must not override.
        """
        return (
            f"--container-image={self.image}",
            f"--container-mounts={','.join(self.mounts)}",
            f"--container-env={','.join(dict.fromkeys((*variables, *self.variables)))}",
            # where the cluster's default is to map the user to root, MPI doesn't recognise the user of Slurm's PMIx server
            "--no-container-remap-root",
        )


class UserOptions(NamedTuple):
    """What the user gives for containers beside the image and its mounts.

    Args:
        words: the words for srun without the merged options.
        mounts: values of ``--container-mounts``.
        variables: names in ``--container-env``.
    """

    words: tuple[str, ...]
    mounts: tuple[str, ...]
    variables: tuple[str, ...]


def read_user_options(words: Sequence[str], image: str | None, environ: Mapping[str, str]) -> UserOptions:
    """Take the options that have to be merged out of the user's words for srun and the variables that Pyxis reads. Pure.

    Args:
        words: the user's words for srun.
        image: the image of all steps, if any.
        environ: the environment variables.

    Raises:
        UsageError: an option contradicts ours, or lacks its value.
    """
    if image is None:
        _refuse_unknown_image(words, environ)
        return UserOptions(tuple(words), (), ())
    found: dict[str, list[str]] = {option: [] for option in _MERGED}
    for option, variable in _MERGED.items():
        if value := environ.get(variable):
            found[option].append(value)
    rest, remaining = [], iter(words)
    for word in remaining:
        option, equals, value = word.partition("=")
        if option in _OURS:
            raise UsageError(
                f"{option} is among srun's words (SRUN_ARGS), and launch gives it: {_OURS[option]}",
                expected="one value, for all steps",
                fix="--image IMAGE (IMAGE)" if option == "--container-image" else f"leave {option} out",
            )
        if option not in _MERGED:
            rest.append(word)
            continue
        value = value if equals else next(remaining, "")
        if not value:
            raise UsageError(f"{option} has no value in SRUN_ARGS", expected=f"{option}=VALUE", fix="correct SRUN_ARGS")
        found[option].append(value)
    mounts, names = (",".join(found[option]).split(",") if found[option] else [] for option in _MERGED)
    return UserOptions(tuple(rest), tuple(mounts), tuple(names))


def _refuse_unknown_image(words: Sequence[str], environ: Mapping[str, str]) -> None:
    named = [f"SRUN_ARGS has {word.partition('=')[0]}" for word in words if word.startswith("--container-image")]
    if environ.get("PYXIS_CONTAINER_IMAGE"):
        named.append("PYXIS_CONTAINER_IMAGE is set")
    if named:
        raise UsageError(
            f"{named[0]}, so steps would run in a container without the mounts and variables that they need",
            expected="the image as launch's setting, for all steps",
            fix="--image IMAGE (IMAGE=…), and no other way",
        )


def resolve_image(image: str) -> tuple[str, str]:
    """Return an image's name as Pyxis needs it, and what to say about it; empty for nothing.

    A file's name without a folder is made absolute if the file exists: Pyxis would ask Docker Hub for it.
    """
    if not image.startswith(("/", ".")) and image.endswith(_FILES) and "#" not in image and os.path.isfile(image):
        absolute = os.path.abspath(image)
        return absolute, f"the image is the file {absolute}; Pyxis would take {image} for a name of Docker Hub"
    warning = image_warning(image)
    return image, f"warning: {warning}" if warning else ""


def image_warning(image: str) -> str:
    """Return what is wrong with an image's name for Pyxis; empty if nothing is.

    Pyxis takes what begins with ``/`` or ``.`` for a file, all else for ``[USER@][REGISTRY#]IMAGE[:TAG]``: without ``#`` for a name of
    Docker Hub (pyxis_slurmstepd.c, enroot's docker.sh). Other tools, Kubernetes among them, write ``REGISTRY/IMAGE``.
    """
    scheme, name = ("docker://", image[9:]) if image.startswith("docker://") else ("", image)
    if name.startswith(("/", ".")) or "://" in name or "#" in name:
        return ""
    if not scheme and name.endswith(_FILES):
        return (
            f"Pyxis takes the image {image} for a name of Docker Hub\n  expected: a file's absolute path, or ./ before it\n"
            f"  fix:      --image './{name}'"
        )
    user, at, rest = name.rpartition("@") if "@" in name.partition("/")[0] else ("", "", name)
    registry, slash, path = rest.partition("/")
    if not slash or not (set(".:") & set(registry) or registry == "localhost"):
        return ""
    # Docker Hub's own registry is the default
    meant = path if registry in ("docker.io", "index.docker.io") else f"{registry}#{path}"
    return (
        f"Pyxis takes the image {image} for a name of Docker Hub\n  expected: the registry before a #\n"
        f"  fix:      --image '{scheme}{user}{at}{meant}'"
    )


def mount(source: str, target: str, flags: str = "") -> str:
    """Return one mount.

    Raises:
        UsageError: Pyxis can't parse the paths.
    """
    for path in (source, target):
        if any(character in path for character in _SEPARATORS):
            raise UsageError(
                f"{path!r} can't be mounted: Pyxis reads commas and colons as separators",
                expected="a path without either",
                fix="move or link it, or another --run-dir",
            )
    return ":".join(filter(None, (source, target, flags)))


def check_mounts(written: str) -> None:
    """Raise what Pyxis would refuse in the user's mounts, before a step starts (args.c: parse_mount_option, add_mount). Pure.

    Args:
        written: all of them.

    Raises:
        UsageError: one is no mount.
    """
    for entry in written.split(",") if written else ():
        source, colon, rest = entry.partition(":")
        target = rest.partition(":")[0] if colon else source
        if not (source.startswith(_PATHS) or source in ("tmpfs", "umount")) or not target.startswith(_PATHS):
            raise UsageError(
                f"Pyxis doesn't take {entry!r} for a mount, in {written!r}",
                expected="HOST:CONTAINER[:FLAGS], separated by commas; both begin with / or ., or HOST is tmpfs or umount",
                fix="correct --mounts (MOUNTS), or --container-mounts among srun's words",
            )


# lines of slurmstepd, after srun's label, and of srun for options that it refuses itself
_PYXIS = re.compile(r"^(?: *(\d+): ?)?(?:slurmstepd\S*|srun): error: pyxis: *(.+)$", re.MULTILINE)
# Slurm's names of the calls before a task's program runs: task_exit() and exit(), where Pyxis exports and removes containers, come after it
_BEFORE = "init|init_post_opt|local_user_init|user_init|task_init_privileged|task_init|task_post_fork"
_FAILED = re.compile(
    rf"error: spank: required plugin \S*pyxis\S*\.so: (?:{_BEFORE})\(\) failed|^srun: error: pyxis: ", re.MULTILINE
)
# these follow from another line, or come before it
_CONSEQUENCES = re.compile(
    r"child \d+ failed with|couldn't create enroot start|not started successfully by another|printing \w+ log file"
)
_ENROOT = re.compile(r"\[ERROR\] *(.+)")
_OPTIONS = re.compile(
    r"--\[?(?:no-)?\]?container-|were specified|mount (?:source|target) must be|mount entry|couldn't chdir|flag was passed"
)
_MISSING = "source path does not exist"


class PyxisFailure(NamedTuple):
    """Pyxis couldn't start the container of a step, so none of our processes ran there.

    Args:
        words: Pyxis's own line, with enroot's if there is one.
        code: `ExitCode.USAGE` for its options, `ExitCode.NO_MODEL` for an image or a mount that it can't read.
        rank: the task whose output it is; -1 if it isn't known.
    """

    words: str
    code: ExitCode
    rank: int

    def describe(self, step: str, nodes: Sequence[str], ranks_per_node: int) -> tuple[str, str, str]:
        """Return problem, expected state and fix.

        Args:
            step: the step's name.
            nodes: its nodes, on each of which ``ranks_per_node`` consecutive ranks run.
            ranks_per_node: the number of ranks on each.
        """
        node = nodes[self.rank // ranks_per_node] if 0 <= self.rank < len(nodes) * ranks_per_node else ""
        where = f" on {node}" if node else ""
        found = f"{step}: Pyxis didn't start the container{where}: {self.words}"
        if self.code is ExitCode.USAGE:
            return (
                found,
                "container options that Pyxis takes",
                "correct --image, --mounts, or the container options in SRUN_ARGS",
            )
        what = "a mount's source" if _MISSING in self.words else "an image and mounts"
        return found, f"{what} that every node can read", "correct --image or --mounts, or mount the file system there"


def pyxis_failure(text: str) -> PyxisFailure | None:
    """Return why Pyxis couldn't start a container, from a step's output; None if that isn't why it ended. Pure."""
    if _FAILED.search(text) is None:
        return None
    lines = [(int(each[1] or -1), each[2].strip()) for each in _PYXIS.finditer(text)]
    causes = [(rank, words) for rank, words in lines if not _CONSEQUENCES.search(words)]
    rank, words = next(iter(causes or lines), (-1, "it gives no reason"))
    if not _ENROOT.search(words):
        inner = next((found[1] for other, line in lines if other == rank and (found := _ENROOT.search(line))), "")
        words += f" ({inner})" if inner else ""
    is_option = _OPTIONS.search(words) is not None and _MISSING not in words
    return PyxisFailure(words, ExitCode.USAGE if is_option else ExitCode.NO_MODEL, rank)
