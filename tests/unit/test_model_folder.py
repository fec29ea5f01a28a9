# SPDX-License-Identifier: Apache-2.0
"""What ``--model`` may be, and the name that clients then ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_mpi.common.errors import ModelNotFoundError
from dynamo_mpi.config.sources import WorkerSources
from dynamo_mpi.config.worker import load_settings, resolve_model_dir


def found(model: str | Path, *words: str, cache: Path = Path("/nowhere")) -> tuple[str, str]:
    settings = load_settings(WorkerSources(["--model", str(model), *words], {}))
    located = resolve_model_dir(settings, {"HF_HUB_CACHE": str(cache)})
    return str(located.model), located.served_model_name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "Name"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A snapshot as the hub's library makes it: links to blobs."""
    repository = tmp_path / "models--org--Model"
    path = repository / "snapshots" / "0123abc"
    path.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "f00d").write_text("{}")
    (path / "config.json").symlink_to("../../blobs/f00d")
    return path


def test_a_folder_is_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(folder) == (str(folder), "Name")
    assert found(folder, "--served-model-name", "other") == (str(folder), "other")
    monkeypatch.chdir(folder.parent)
    assert found("Name") == ("Name", "Name"), "ranks may have working folders of their own"
    monkeypatch.chdir(folder)
    assert found(".") == (".", "Name")


def test_a_config_stands_for_its_folder(folder: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(folder / "config.json") == (str(folder), "Name")
    assert found(snapshot / "config.json") == (str(snapshot), "0123abc")
    monkeypatch.chdir(folder)
    assert found("config.json") == (".", "Name")


def test_a_hub_id_is_looked_up_in_the_cache(tmp_path: Path, snapshot: Path) -> None:
    assert found("org/Model", cache=tmp_path) == (str(snapshot), "org/Model")
    assert found("org/Model", "--served-model-name", "other", cache=tmp_path) == (str(snapshot), "other")


@pytest.mark.parametrize("name", ["model.gguf", "other.json"])
def test_a_file_that_is_no_config_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    with pytest.raises(ModelNotFoundError, match=f"{name} is a file"):
        found(folder / name)


@pytest.mark.parametrize(
    ("model", "words"),
    [("/no/such/model", "no model at /no/such"), ("org/Absent", "nor a snapshot in"), ("x" * 5000, "can't be read")],
)
def test_a_model_that_is_nowhere_is_a_model_error(tmp_path: Path, model: str, words: str) -> None:
    with pytest.raises(ModelNotFoundError, match=words):
        found(model, cache=tmp_path)


def test_a_folder_without_a_config_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"model config .*config\.json can't be read"):
        found(tmp_path)
