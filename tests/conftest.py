"""Models for the tests: tiny ones built here, and the real ones that `make models` prepares."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from splaser_plugin.cli.app import main
from splaser_plugin.cli.demo import prepare_embedder, prepare_model

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)  # the tiny models here are slower on two


def tiny_llama(seed: int = 0, vocabulary: int = 49152, **changes):
    """A two-block Llama that speaks SmolLM2's vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "bos_token_id": 1,
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def hub_snapshot(cache: Path, name: str) -> Path:
    """Where the hub's cache has this model, by the layout it has; the folder itself is still to be made."""
    commit = "a" * 40
    repository = cache / f"models--{name.replace('/', '--')}"
    for folder in ("snapshots", "refs"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


@pytest.fixture
def tiny_model():
    return tiny_llama()


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
def pairs_file(tmp_path, pairs):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return str(path)


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
