"""One visit of a model's folder: what it finds, and that a run makes no other."""

from pathlib import Path

import pytest

from splaser_plugin.checkpoints import checkpoint
from splaser_plugin.checkpoints.folder import inspect
from splaser_plugin.errors import CheckpointError
from splaser_plugin.weights.loading import load_model
from splaser_plugin.weights.model_source import find_model
from splaser_plugin.weights.rest import rest_of


def test_names_and_sizes_are_those_in_the_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    (tmp_path / "pytorch_model.bin").write_bytes(b"12")
    (tmp_path / "link").symlink_to(tmp_path / "model.safetensors")
    (tmp_path / "broken").symlink_to(tmp_path / "absent")
    (tmp_path / "sub").mkdir()
    found = inspect(tmp_path)
    assert found.names == ("broken", "link", "model.safetensors", "pytorch_model.bin", "sub")
    assert found.sizes == {"link": 4, "model.safetensors": 4, "pytorch_model.bin": 2}
    assert (found.weight_bytes, found.has_only_pickles, inspect(found) is found) == (4, False, True)
    (tmp_path / "model.safetensors").unlink()
    found = inspect(tmp_path)
    assert (found.weight_bytes, found.has_only_pickles) == (2, True)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such folder. Give a folder with config.json"):
        inspect(tmp_path / "absent")


def test_a_model_is_listed_once_and_its_headers_are_read_once(tiny_folder, monkeypatch):
    listed, read = [], []
    is_listed, header = Path.iterdir, checkpoint.read_header
    monkeypatch.setattr(Path, "iterdir", lambda path: listed.append(path) or is_listed(path))
    monkeypatch.setattr(checkpoint, "read_header", lambda *given: read.append(given[2]) or header(*given))
    source = find_model(tiny_folder)
    model, _ = load_model(source, device="cpu")
    assert source.weight_bytes == (Path(tiny_folder) / "model.safetensors").stat().st_size
    assert rest_of(source, model) is not None
    assert (listed.count(Path(tiny_folder)), len(read)) == (1, 1)
