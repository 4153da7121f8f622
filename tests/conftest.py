"""Fixtures of all tests: tiny models, and the real ones that `make models` prepares."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, and by the processes that tests start

import pytest
import torch

from splaser_plugin.cli.app import main
from splaser_plugin.cli.demo import prepare_embedder, prepare_model
from splaser_plugin.search.candidates import Candidate
from splaser_plugin.weights.in_memory import Weights
from tests.builders import PROSE, ROOT, save_rows, tiny_llama

torch.set_num_threads(1)  # the tiny models here are slower on two


@pytest.fixture
def tiny_model():
    """A two-block Llama."""
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
    return prepare_model(ROOT / ".cache")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of the real all-MiniLM-L6-v2."""
    return prepare_embedder()


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    """The real SmolLM2 tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer) -> Path:
    """A two-block Llama with the SmolLM2 tokenizer, saved as users save theirs."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
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
    return str(save_rows(tmp_path / "pairs.jsonl", pairs))


@pytest.fixture
def text(tmp_path) -> str:
    """A file with a few hundred words of prose."""
    path = tmp_path / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return str(path)


@pytest.fixture
def candidates(tiny_model) -> list[Candidate]:
    """The first five matrices of the tiny model, each to be reduced to rank 4."""
    return [Candidate(matrix, 4, "iqr", 1.0, 0.5) for matrix in Weights(tiny_model).matrices()[0][:5]]


@pytest.fixture
def splaser(monkeypatch, capsys):
    """Run the command in this process; gives its exit code, stdout and stderr."""

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
