"""What is a path and what a hub id is said by one rule, for models, pairs, texts and embedders."""

from __future__ import annotations

from pathlib import Path

import pytest

from splaser_plugin.data.pairs import load_pairs
from splaser_plugin.data.windows import open_text
from splaser_plugin.errors import CheckpointError, EmbedderError, PairsError, TextError
from splaser_plugin.files.sources import is_hub_id, looks_like_path, path_of
from splaser_plugin.scanning.records import Scan
from splaser_plugin.scanning.spectrum_format import load_scan
from splaser_plugin.scoring.embedding import SentenceEmbedder
from splaser_plugin.weights.model_source import find_model
from tests.report_data import made_up_scan

PAIR = '{"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."}\n'


@pytest.fixture
def home(tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):  # Windows' is the second
        monkeypatch.setenv(variable, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["gpt2", "org/model-7B_v0.1", "orca_dpo"])
def test_a_name_with_at_most_one_slash_is_a_hub_id(name):
    assert is_hub_id(name) and not looks_like_path(name)


@pytest.mark.parametrize("name", ["./x", "../x", "/x", "~/x", "~nobody-has-this-name/x", "a/b/c", r"C:\x", Path("x")])
def test_what_was_meant_as_a_path_is_no_hub_id(name):
    assert looks_like_path(name) and not is_hub_id(name)


@pytest.mark.parametrize("name", ["", "two words", "a:b", "a\0b"])
def test_what_can_be_neither_is_no_hub_id(name):
    assert not is_hub_id(name)


def test_what_is_there_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("models/mine")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert not is_hub_id("models/mine")


def test_a_tilde_is_the_home_of_whoever_has_one(home):
    assert path_of("~/x") == home / "x"
    assert path_of("~nobody-has-this-name/x") == Path("~nobody-has-this-name/x")


def test_pairs_and_texts_are_found_below_the_home(home):
    (home / "pairs.jsonl").write_text(PAIR)
    (home / "text.md").write_text("some text\n")
    assert len(load_pairs("~/pairs.jsonl")) == 1
    assert "".join(open_text("~/text.md")) == "some text\n"


def test_json_is_found_below_the_home(home):
    made_up_scan(1).save("~/scan.json")
    assert Scan.load("~/scan.json") == load_scan("~/scan.json") == Scan.load(home / "scan.json")


@pytest.mark.parametrize("name", ["~/absent", "./absent", "~nobody-has-this-name/absent", "a/b/c"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(home, name):
    for load, error in (
        (load_pairs, PairsError),
        (open_text, TextError),
        (find_model, CheckpointError),
        (lambda name: SentenceEmbedder(name, "cpu"), EmbedderError),
    ):
        with pytest.raises(error, match="no such"):
            load(name)
