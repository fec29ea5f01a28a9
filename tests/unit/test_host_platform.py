# SPDX-License-Identifier: Apache-2.0
"""For what host code is compiled: the right values of files as distributions and toolkits have them."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from dynamo_mpi.common.host_platform import cpu_kind, host_platform, libc_version, os_release, toolkit_version

INTEL = "processor\t: 0\nflags\t\t: fpu sse2 avx2 avx512f amx_tile\n\nprocessor\t: 1\nflags\t\t: fpu\n"


def kind_of(folder: Path, text: str) -> str:
    (folder / "cpuinfo").write_text(text)
    return cpu_kind(str(folder / "cpuinfo"))


def test_cpus_with_other_instructions_are_other_kinds(tmp_path: Path) -> None:
    intel = kind_of(tmp_path, INTEL)
    assert intel.startswith(f"{platform.machine()}-")
    # what no compiler asks for, and the order, make no difference
    assert kind_of(tmp_path, INTEL.replace("fpu sse2 avx2", "avx2 sse2 xsaves")) == intel
    older = kind_of(tmp_path, INTEL.replace(" amx_tile", ""))
    grace = kind_of(tmp_path, "processor\t: 0\nFeatures\t: fp asimd sve2 i8mm bf16\n")
    assert len({intel, older, grace, cpu_kind(str(tmp_path / "none"))}) == 4


def test_the_c_library_is_the_one_that_runs() -> None:
    version = subprocess.run(["getconf", "GNU_LIBC_VERSION"], capture_output=True, text=True, check=False).stdout
    assert libc_version() == version.strip()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('PRETTY_NAME="Ubuntu 24.04.3 LTS"\nID=ubuntu\nVERSION_ID="24.04"\nID_LIKE=debian\n', "ubuntu 24.04"),
        ("ID='rocky'\nVERSION_ID='9.4'\n", "rocky 9.4"),
        ("ID=arch\n", "arch"),
        ("", ""),
    ],
)
def test_the_distribution(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "os-release").write_text(text)
    assert os_release(str(tmp_path / "os-release")) == found
    assert os_release(str(tmp_path / "none")) == ""


def toolkit(folder: Path, *, json: str = "", header: str = "") -> str:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/nvcc").touch(mode=0o755)
    if json:
        (folder / "version.json").write_text(json)
    if header:
        (folder / "include").mkdir()
        (folder / "include/cuda.h").write_text(header)
    return str(folder)


def test_the_toolkit_is_the_one_that_torch_takes(tmp_path: Path) -> None:
    nothing = str(tmp_path / "none")
    new = '{\n   "cuda" : {\n      "name" : "CUDA SDK",\n      "version" : "13.0.1"\n   },\n   "nvcc" : {"version" : "1"}\n}'
    with_json = toolkit(tmp_path / "cuda-13.0", json=new)
    with_header = toolkit(tmp_path / "cuda-12.9", header="/* */\n#define CUDA_VERSION 12090\n#define X 1\n")
    script = toolkit(tmp_path / "usr")
    assert toolkit_version({"CUDA_HOME": with_json, "PATH": f"{with_header}/bin"}, nothing) == "13.0.1"
    assert toolkit_version({"CUDA_PATH": with_header}, nothing) == "12.9"
    assert toolkit_version({"PATH": f"/bin:{with_header}/bin"}, with_json) == "12.9"
    # an nvcc that is a script beside no toolkit
    assert toolkit_version({"PATH": f"{script}/bin"}, with_json) == "13.0.1"
    assert toolkit_version({}, nothing) == ""


def test_what_is_not_known_is_left_out() -> None:
    found = dict(host_platform({"PATH": "", "CUDA_HOME": ""}))
    assert found["cpu"] == cpu_kind() and "" not in found.values()
