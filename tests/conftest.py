"""Fixtures of all tests: tiny models, and the real ones that `make models` prepares.

What takes seconds to import is imported by the fixtures: the process that hands tests to workers loads this file, too.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from splaser_plugin.cli.demo import prepare_embedder, prepare_model

if TYPE_CHECKING:
    from splaser_plugin.search.candidates import Candidate

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # the tiny models are slower on two; the processes that tests start read it, too
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may be told to ignore it
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
CACHE = Path(__file__).parents[1] / ".cache"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of real models first: they take longest, and at the end one worker would have nothing left beside them."""
    long = {item.path for item in items if item.get_closest_marker("real")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture
def tiny_model():
    """A two-block Llama."""
    from tests.builders import tiny_llama

    return tiny_llama()


@pytest.fixture
def wandb_folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """The working folder of a test, in which W&B keeps offline runs; it remembers the first one of a process."""
    import wandb

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    yield tmp_path
    wandb.teardown()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the real SmolLM2-135M-Instruct, float32."""
    return prepare_model(CACHE)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of the real all-MiniLM-L6-v2."""
    return prepare_embedder()


@pytest.fixture(scope="session")
def tokenizer_folder(smollm2, tmp_path_factory) -> Path:
    """Folder of SmolLM2's tokenizer with its most frequent tokens only, in a tenth of the time to load."""
    from tests.builders import VOCABULARY, cut_tokenizer

    return cut_tokenizer(smollm2, tmp_path_factory.mktemp("tokenizer"), VOCABULARY)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    """That tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def whole_tokenizer(smollm2):
    """SmolLM2's tokenizer as it is."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer) -> Path:
    """A two-block Llama with that tokenizer, saved as users save theirs."""
    from tests.builders import tiny_llama

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def whole_folder(tmp_path_factory, whole_tokenizer) -> Path:
    """A two-block Llama with all of SmolLM2's tokens, whose embedding is most of it, as in many models."""
    from tests.builders import tiny_llama

    folder = tmp_path_factory.mktemp("models") / "whole"
    tiny_llama(vocabulary=len(whole_tokenizer)).save_pretrained(folder)
    whole_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pairs() -> list[dict[str, str]]:
    """Four preference pairs as rows."""
    return [
        {
            "prompt": "What is the capital of France?",
            "chosen": "The capital of France is Paris.",
            "rejected": "Bananas are yellow.",
        },
        {"prompt": "Name a fruit.", "chosen": "An apple is a fruit.", "rejected": "No. Ask somebody else."},
        {"prompt": "How many days has a week?", "chosen": "It has seven days.", "rejected": "It has nine days."},
        {"prompt": "Say hello.", "chosen": "Hello! How can I help you?", "rejected": "Go away."},
    ]


@pytest.fixture
def pairs_file(tmp_path, pairs) -> str:
    """A jsonl file of these pairs."""
    from tests.builders import save_rows

    return str(save_rows(tmp_path / "pairs.jsonl", pairs))


@pytest.fixture
def text(tmp_path) -> str:
    """A file with a few hundred words of prose."""
    from tests.builders import PROSE

    path = tmp_path / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return str(path)


@pytest.fixture
def candidates(tiny_model) -> list[Candidate]:
    """The first five matrices of the tiny model, each to be reduced to rank 4."""
    from splaser_plugin.search.candidates import Candidate
    from splaser_plugin.weights.in_memory import Weights

    return [Candidate(matrix, 4, "iqr", 1.0, 0.5) for matrix in Weights(tiny_model).matrices()[0][:5]]


@pytest.fixture
def splaser(monkeypatch, capsys):
    """Run the command in this process; gives its exit code, stdout and stderr."""
    from splaser_plugin.cli.app import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["splaser", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
