# SPDX-License-Identifier: Apache-2.0
"""Finding a model's config: in folders, as files, in the hub's cache; and saying what is wrong where there is none."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from pathlib import Path

import pytest

from dynamo_mpi.common.errors import ConfigFileError, ModelNotFoundError
from dynamo_mpi.layout.model_files import ModelFiles, find_model, hub_cache

CONFIG = '{"architectures": ["M"], "num_attention_heads": 4}'
HUB_ID = "maker/Some-Model_1.5"


def put(file: Path, text: str = CONFIG) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def refused(model: str, environ: Mapping[str, str] | None = None) -> ModelNotFoundError:
    with pytest.raises(ModelNotFoundError) as caught:
        find_model(model, environ or {"HOME": "/nowhere"})
    assert caught.value.fix
    assert len(str(caught.value)) < 1000
    return caught.value


def in_cache(cache: Path, commit: str, text: str = CONFIG, model: str = HUB_ID) -> Path:
    """Lay a snapshot down as the hub's library does: files are links to blobs."""
    folder = cache / f"models--{model.replace('/', '--')}"
    blob = put(folder / "blobs" / f"blob-of-{commit}", text)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_a_folder(tmp_path: Path) -> None:
    config = put(tmp_path / "some-model" / "config.json")
    found = find_model(str(config.parent), {})
    assert found == ModelFiles("some-model", str(config), CONFIG, None)
    assert found.shape().attention_heads == 4
    assert find_model(f"{config.parent}/", {}).name == "some-model"
    assert find_model(f"{config.parent}/../some-model", {}).name == "some-model"


def test_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "some-model" / "config.json")
    monkeypatch.chdir(tmp_path / "some-model")
    assert find_model(".", {}).name == "some-model"
    monkeypatch.chdir(tmp_path)
    # a folder of that name comes before a hub id
    assert find_model("some-model", {}).name == "some-model"


def test_the_config_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = put(tmp_path / "some-model" / "config.json")
    assert find_model(str(config), {}).name == "some-model"
    monkeypatch.chdir(config.parent)
    assert find_model("config.json", {}).name == "some-model"


def test_a_config_that_is_a_link_is_named_by_where_it_lies(tmp_path: Path) -> None:
    snapshot = in_cache(tmp_path, "c0ffee")
    assert find_model(str(snapshot / "config.json"), {}).name == "c0ffee"
    link = tmp_path / "my-model"
    link.symlink_to(snapshot)
    assert find_model(str(link), {}).name == "c0ffee"


def test_a_file_of_another_name(tmp_path: Path) -> None:
    config = put(tmp_path / "llama-3.1-8b.json")
    put(tmp_path / "hf_quant_config.json", '{"quantization": {"quant_algo": "FP8"}}')
    found = find_model(str(config), {})
    # several of them may lie in one folder, so that file is another one's
    assert (found.name, found.quant_text) == ("llama-3.1-8b", None)
    put(tmp_path / "llama-3.1-8b.hf_quant_config.json", '{"quantization": {"quant_algo": "NVFP4"}}')
    quantisation = find_model(str(config), {}).shape().quantisation
    assert quantisation is not None and quantisation.algo == "NVFP4"


def test_modelopt_s_file_beside_the_config(tmp_path: Path) -> None:
    config = put(tmp_path / "m" / "config.json")
    put(tmp_path / "m" / "hf_quant_config.json", '{"quantization": {"quant_algo": "FP8"}}')
    for model in (config, config.parent):
        quantisation = find_model(str(model), {}).shape().quantisation
        assert quantisation is not None and quantisation.algo == "FP8"


# hub ids


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"HF_HUB_CACHE": "{}/a"}, "a"),
        ({"HUGGINGFACE_HUB_CACHE": "{}/a"}, "a"),
        ({"HF_HUB_CACHE": "{}/a", "HUGGINGFACE_HUB_CACHE": "{}/b", "HF_HOME": "{}/c"}, "a"),
        ({"HF_HOME": "{}/a", "XDG_CACHE_HOME": "{}/b"}, "a/hub"),
        ({"XDG_CACHE_HOME": "{}/a", "HOME": "{}/b"}, "a/huggingface/hub"),
        ({"HOME": "{}/a"}, "a/.cache/huggingface/hub"),
        ({"HF_HUB_CACHE": "", "HF_HOME": "", "XDG_CACHE_HOME": "", "HOME": "{}/a"}, "a/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_hub_s_library_has_it(environ: dict[str, str], folder: str, tmp_path: Path) -> None:
    environ = {name: value.replace("{}", str(tmp_path)) for name, value in environ.items()}
    assert hub_cache(environ) == str(tmp_path / folder)
    in_cache(tmp_path / folder, "c0ffee")
    found = find_model(HUB_ID, environ)
    assert (found.name, found.config_text) == (HUB_ID, CONFIG)


def test_without_any_variable_it_is_below_the_home_folder() -> None:
    assert hub_cache({}).endswith("/.cache/huggingface/hub")


def test_main_s_snapshot_comes_before_newer_ones(tmp_path: Path) -> None:
    environ = {"HF_HUB_CACHE": str(tmp_path)}
    in_cache(tmp_path, "old", '{"num_attention_heads": 1}')
    newer = in_cache(tmp_path, "newer", '{"num_attention_heads": 2}')
    os.utime(newer, (2**31, 2**31))
    assert find_model(HUB_ID, environ).shape().attention_heads == 2
    main = put(tmp_path / f"models--{HUB_ID.replace('/', '--')}" / "refs" / "main", "old\n")
    assert find_model(HUB_ID, environ).shape().attention_heads == 1
    # a pointer to nothing, or that is none
    for text in ("gone", "", "x" * 5000, "a\0b"):
        main.write_text(text)
        assert find_model(HUB_ID, environ).shape().attention_heads == 2
    main.write_bytes(b"\xff")
    assert find_model(HUB_ID, environ).shape().attention_heads == 2


def test_a_model_without_a_maker(tmp_path: Path) -> None:
    in_cache(tmp_path, "c0ffee", model="gpt2")
    assert find_model("gpt2", {"HF_HUB_CACHE": str(tmp_path)}).name == "gpt2"


def test_an_incomplete_download_is_reported(tmp_path: Path) -> None:
    environ = {"HF_HUB_CACHE": str(tmp_path)}
    folder = tmp_path / f"models--{HUB_ID.replace('/', '--')}"
    folder.mkdir()
    assert "there is no model" in refused(HUB_ID, environ).problem
    (folder / "snapshots").mkdir()
    assert "there is no model" in refused(HUB_ID, environ).problem
    put(folder / "snapshots" / "a-file-here")
    assert "there is no model" in refused(HUB_ID, environ).problem
    (folder / "snapshots" / "c0ffee").mkdir()
    assert "config.json can't be read: No such file" in refused(HUB_ID, environ).problem
    # the link is there, the blob isn't
    (folder / "snapshots" / "c0ffee" / "config.json").symlink_to("../../blobs/gone")
    assert "config.json can't be read: No such file" in refused(HUB_ID, environ).problem


def test_a_hub_id_that_is_not_in_the_cache_is_refused_with_how_to_get_it(tmp_path: Path) -> None:
    error = refused(HUB_ID, {"HF_HOME": str(tmp_path)})
    assert str(tmp_path / "hub") in error.problem
    assert f"hf download {HUB_ID}" in error.fix


# what is no model


@pytest.mark.parametrize(
    "model", ["/nowhere/at/all", "./nowhere", "a/b/c", "maker/", "/", "a\0b", "maker/a b", "~/model", "https://x.org/m"]
)
def test_what_is_no_model_is_refused(model: str) -> None:
    assert refused(model).problem


def test_names_that_no_file_can_have() -> None:
    for model in ("a" * 300, "/" + "a" * 5000, "maker/" + "m" * 300, "x/" * 3000):
        assert refused(model).problem


def test_an_empty_folder(tmp_path: Path) -> None:
    error = refused(str(tmp_path))
    assert f"the model config {tmp_path / 'config.json'} can't be read: No such file" in error.problem


def test_a_config_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    assert "Is a directory" in refused(str(tmp_path)).problem
    (tmp_path / "config.json").rmdir()
    put(tmp_path / "config.json")
    (tmp_path / "hf_quant_config.json").mkdir()
    assert "hf_quant_config.json can't be read: Is a directory" in refused(str(tmp_path)).problem


def test_a_path_below_a_file(tmp_path: Path) -> None:
    assert refused(str(put(tmp_path / "x.json") / "config.json")).problem


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert refused(str(tmp_path / "a")).problem
    (tmp_path / "config.json").symlink_to("config.json")
    assert "symbolic links" in refused(str(tmp_path)).problem


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_config_without_rights(tmp_path: Path) -> None:
    put(tmp_path / "m" / "config.json").chmod(0)
    assert "Permission denied" in refused(str(tmp_path / "m")).problem
    (tmp_path / "m").chmod(0)
    try:
        assert "Permission denied" in refused(str(tmp_path / "m" / "config.json")).problem
    finally:
        (tmp_path / "m").chmod(0o755)


def test_a_config_that_cannot_be_opened(tmp_path: Path) -> None:
    """The same for root: no more files may be open."""
    put(tmp_path / "config.json")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        error = refused(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "can't be read: Too many open files" in error.problem


def test_configs_that_are_none(tmp_path: Path) -> None:
    for data in (b"\xff\xfe", b"\0" * (9 * 2**20)):
        (tmp_path / "config.json").write_bytes(data)
        with pytest.raises(ConfigFileError, match=r"config\.json is "):
            find_model(str(tmp_path), {})
    put(tmp_path / "config.json", "[]")
    with pytest.raises(ConfigFileError, match=r"config\.json holds a list"):
        find_model(str(tmp_path), {}).shape()
    put(tmp_path / "config.json")
    put(tmp_path / "hf_quant_config.json", "nothing")
    with pytest.raises(ConfigFileError, match=r"hf_quant_config\.json is not JSON"):
        find_model(str(tmp_path), {}).shape()
