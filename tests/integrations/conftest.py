"""Trainers of a tiny model, and the working folder of a user who emits configurations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import Trainer

from splaser_plugin.errors import on_command_line
from tests.integrations.emitting import DATA, PAIR, SCAN
from tests.integrations.trainings import training_arguments

SENTENCES = ["The cat sat on the mat.", "Rain falls mainly in spring.", "Bread needs flour.", "Stars are far."]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """The working folder, with a scan, data and files of a user's own. Errors name options as flags."""
    (tmp_path / "scan.json").write_bytes(SCAN.read_bytes())
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    for base in DATA.glob("emit/base_*.yml"):
        (tmp_path / base.name).write_bytes(base.read_bytes())
    monkeypatch.chdir(tmp_path)
    with on_command_line():
        yield tmp_path


@pytest.fixture
def tokens(tokenizer) -> Dataset:
    """Eight rows of ids to train on."""
    rows = []
    for sentence in SENTENCES * 2:
        ids = tokenizer(sentence, padding="max_length", max_length=12, truncation=True)["input_ids"]
        rows.append({"input_ids": ids, "labels": ids})
    return Dataset.from_list(rows)


@pytest.fixture
def trainer_of(tmp_path, tokens, tokenizer) -> Callable[..., Trainer]:
    """Make a trainer of a model with these callbacks; changes are of its arguments."""

    def make(model, *callbacks, **changes):
        return Trainer(
            model=model,
            args=training_arguments(tmp_path / "run", **changes),
            train_dataset=tokens,
            eval_dataset=tokens,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )

    return make
