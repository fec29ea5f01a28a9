# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's version, as far as rules depend on it: most users run release candidates, so their order matters."""

from __future__ import annotations

import sys
from functools import cache

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.frozen import dataclass, field
from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    import re

_LONGEST = 64
_FINAL = (4, 0)
_PHASES = {"a": 1, "alpha": 1, "b": 2, "beta": 2, "c": 3, "rc": 3, "pre": 3, "preview": 3}


@dataclass(frozen=True, order=True)
class TrtllmVersion:
    """A version of TensorRT-LLM; a release candidate sorts before its release, a post release after it.

    Args:
        release: its numbers, three at least.
        phase: its kind: development, alpha, beta, candidate, final; and the number within.
        post: number of the post release; -1 for none.
        dev: number of the development release; very large for none.
        text: the original text. It doesn't count in comparisons, and neither does a local part such as ``+cu13``.
    """

    release: tuple[int, ...]
    phase: tuple[int, int] = _FINAL
    post: int = -1
    dev: int = sys.maxsize
    text: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.text or ".".join(map(str, self.release))

    @property
    def minor(self) -> tuple[int, int]:
        """Major and minor number."""
        return self.release[0], self.release[1]

    @property
    def is_final(self) -> bool:
        """Whether it is a release, not a pre-release."""
        return self.phase == _FINAL and self.dev == sys.maxsize


def parse_trtllm_version(text: str) -> TrtllmVersion:
    """Read ``1.2.1``, ``1.3.0rc22``, ``1.2.0rc2.post1``, ``1.1.0+cu13``.

    Raises:
        UsageError: it has another format.
    """
    stripped = text.strip()
    # most versions, the tables' among them, are 1.2.1 or 1.3.0rc22: the pattern takes a millisecond to compile
    head, candidate, number = stripped.partition("rc")
    parts = head.split(".")
    if len(parts) == 3 and _are_numbers(*parts) and (not candidate or _are_numbers(number)):
        phase = (_PHASES["rc"], int(number)) if candidate else _FINAL
        return TrtllmVersion(tuple(map(int, parts)), phase, text=stripped)
    match = _pattern().fullmatch(stripped) if len(stripped) <= _LONGEST else None
    if match is None:
        shown = stripped if len(stripped) <= _LONGEST else stripped[:_LONGEST] + "..."
        raise UsageError(
            f"{shown!r} is not a version of TensorRT-LLM",
            expected="one such as 1.2.1 or 1.3.0rc22",
            fix="give what `pip show tensorrt_llm` calls Version",
        )
    numbers = [int(number) for number in match["release"].split(".")]
    numbers += [0] * (3 - len(numbers))
    while len(numbers) > 3 and numbers[-1] == 0:
        numbers.pop()
    phase = _FINAL
    if match["phase"]:
        phase = (_PHASES[match["phase"].lower()], int(match["phase_number"] or 0))
    elif match["dev"] is not None and match["post"] is None:
        phase = (0, 0)
    return TrtllmVersion(
        tuple(numbers),
        phase,
        -1 if match["post"] is None else int(match["post"] or 0),
        sys.maxsize if match["dev"] is None else int(match["dev"] or 0),
        stripped,
    )


def _are_numbers(*texts: str) -> bool:
    return all(text.isascii() and text.isdecimal() and len(text) <= _LONGEST for text in texts)


def installed_trtllm_version() -> TrtllmVersion | None:
    """Return the version of TensorRT-LLM in this environment; None if it isn't installed, or can't be read.

    Reads the distribution's metadata: importing the package initialises MPI and loads CUDA libraries.
    """
    if all(finder.find_spec("tensorrt_llm", None) is None for finder in sys.meta_path):
        return None  # without reading metadata, which takes longer on a login node than all the rules
    from dynamo_mpi.common.distributions import installed_versions

    try:
        return parse_trtllm_version(installed_versions(["tensorrt-llm"]).get("tensorrt-llm", ""))
    except UsageError:
        return None


@cache
def _pattern() -> re.Pattern[str]:
    import re

    return re.compile(
        r"v?(?P<release>\d+(?:\.\d+)+)"
        r"(?:[-_.]?(?P<phase>alpha|beta|preview|pre|rc|a|b|c)[-_.]?(?P<phase_number>\d*))?"
        r"(?:[-_.]?post[-_.]?(?P<post>\d*))?"
        r"(?:[-_.]?dev[-_.]?(?P<dev>\d*))?"
        r"(?:\+[a-z0-9]+(?:[-_.][a-z0-9]+)*)?",
        re.ASCII | re.IGNORECASE,
    )
