# SPDX-License-Identifier: Apache-2.0
"""What an index shows of the package: its version's changelog, and the licences of what it installs. `.ci/package` builds it."""

from __future__ import annotations

import re
from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dynamo_mpi import __version__
from tests.conftest import ROOT
from tools.list_licences import BESIDE, EXTRAS, PAGE


def test_the_changelog_has_the_version_behind_what_is_unreleased() -> None:
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[:2] == ["Unreleased", __version__]


def test_every_direct_dependency_s_licence_is_listed() -> None:
    listed = set(re.findall(r"^\| `([\w.-]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    direct = set(BESIDE)
    for text in requires("dynamo-mpi") or ():
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in EXTRAS):
            direct.add(canonicalize_name(requirement.name))
    assert len(direct) > 10
    assert direct <= listed, "python -m tools.list_licences"
    assert "see its files" not in PAGE.read_text(encoding="utf-8")
