# SPDX-License-Identifier: Apache-2.0
"""Names of container images, as Pyxis reads them."""

from __future__ import annotations

import pytest

from dynamo_mpi.deploy.pyxis import image_warning


@pytest.mark.parametrize(
    ("image", "meant"),
    [
        (
            "nvcr.io/nvidia/ai-dynamo/tensorrtllm-runtime:1.1.1",
            "nvcr.io#nvidia/ai-dynamo/tensorrtllm-runtime:1.1.1",
        ),
        ("docker://nvcr.io/nvidia/trt:1", "docker://nvcr.io#nvidia/trt:1"),
        ("$oauthtoken@nvcr.io/nvidia/trt:1", "$oauthtoken@nvcr.io#nvidia/trt:1"),
        ("registry.site:5000/team/trt", "registry.site:5000#team/trt"),
        ("gpu-head:5000/trt", "gpu-head:5000#trt"),
        ("localhost/trt", "localhost#trt"),
        ("docker.io/library/ubuntu:24.04", "library/ubuntu:24.04"),
    ],
)
def test_a_registry_without_a_hash_is_warned_of(image: str, meant: str) -> None:
    warning = image_warning(image)
    assert f"takes the image {image} for a name of Docker Hub" in warning
    assert f"--image '{meant}'" in warning
    assert image_warning(meant) == ""


def test_a_file_without_a_folder_is_warned_of() -> None:
    warning = image_warning("images/trt.sqsh")
    assert "absolute path" in warning
    assert warning.endswith("\n  fix:      --image './images/trt.sqsh'")
    assert image_warning("./images/trt.sqsh") == ""


@pytest.mark.parametrize(
    "image",
    [
        "nvcr.io#nvidia/trt:1",
        "docker://nvcr.io#nvidia/trt:1",
        "/lustre/images/nvcr.io/trt.sqsh",
        "./trt.sqsh",
        "../images/trt.sqsh",
        "ubuntu",
        "ubuntu:24.04",
        "library/ubuntu:24.04",
        "user@library/ubuntu",
        "nvidia/cuda:13.0.0-base-ubuntu24.04",
        "dockerd://nvcr.io/nvidia/trt:1",
    ],
)
def test_what_pyxis_takes_as_it_is_meant(image: str) -> None:
    assert image_warning(image) == ""
