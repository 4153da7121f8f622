"""What several tests need: tiny models and their folders, scans, options of short runs, and launchers of processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from splaser_plugin.checkpoints.folder import INDEX_NAME
from splaser_plugin.checkpoints.header import DTYPES
from splaser_plugin.scanning.scan import MatrixScan, Scan
from splaser_plugin.spectra.edges import EdgeFit
from splaser_plugin.weights.matrices import Skipped

ROOT = Path(__file__).parents[1]
EXAMPLE_PAIRS = ROOT / "examples" / "data" / "pairs.jsonl"
EXAMPLE_HELD_OUT = ROOT / "examples" / "data" / "held_out.jsonl"

QUICK = {"embedder": "self", "max_new_tokens": 6, "candidates": 6, "device": "cpu", "edge": "mp"}
"""Options of a laser run of the tiny model that ends in a second and keeps something."""
TO_RESUME = {**QUICK, "edge": "iqr", "seed": 1, "held_out_fraction": 0.5, "guard": "margin:5.0"}
"""Options of a laser run with every kind of measurement, whose journal is cut by the tests."""
TO_COMPRESS = {"objective": "compress", "budget": 0.04, "tolerance": 5.0, "calibration_tokens": 200, "save": "factored"}
"""Options of a laser run that measures what a reduction goes by."""
FLAGS = ["--embedder", "self", "--max-new-tokens", "6", "--candidates", "4", "--device", "cpu", "--edge", "mp"]
"""`QUICK` with fewer candidates, on the command line."""
THREE_PAIRS = [
    {"prompt": "What is the capital of France?", "chosen": "Paris.", "rejected": "Bananas."},
    {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "Ask somebody else."},
    {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "Go away."},
]
"""Pairs with which such a run keeps something."""
PROSE = 6 * "\n".join(
    f"{number}. A text about the {thing} of the {place}, which nobody has read to its end."
    for number, (thing, place) in enumerate([(t, p) for t in ("roofs", "rivers", "songs") for p in ("north", "isles")])
)


def _is_written(dtype: torch.dtype) -> bool:
    try:
        return bool(safetensors.torch.save({"": torch.zeros(1, dtype=dtype)}))
    except KeyError:
        return False


WRITTEN = {name: dtype for name, dtype in DTYPES.items() if _is_written(dtype)}
"""What the safetensors library can write; its first versions lack some."""
VOCABULARY = 2048
"""Tokens of the tiny models: SmolLM2's first, which are those merged first."""


# --- models


def cut_tokenizer(source: Path, folder: Path, size: int) -> Path:
    """Save a tokenizer's first `size` tokens, and the merges that make them."""
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder)
    stored = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    kept = {token: number for token, number in stored["model"]["vocab"].items() if number < size}
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in stored["model"]["merges"]]
    stored["model"]["merges"] = [merge for merge in merges if {*merge, "".join(merge)} <= kept.keys()]
    stored["model"]["vocab"] = kept
    (folder / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    return folder


def tiny_llama(seed: int = 0, vocabulary: int = VOCABULARY, **changes: Any):
    """A two-block Llama that speaks the vocabulary of the tests' tokenizer."""
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


def states(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's tensors."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """The names of the tensors that differ in a bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- folders


def save_single(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A checkpoint in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return folder


def save_sharded(folder: Path, shards: list[dict[str, Tensor]]) -> Path:
    """A checkpoint in several files, with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        shard_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        safetensors.torch.save_file(tensors, folder / shard_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard_name))
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def save_rows(path: Path, rows: Iterable[object]) -> Path:
    """A jsonl file of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def hub_snapshot(cache: Path, name: str) -> Path:
    """Where the hub's cache has this model, by the layout it has; the folder itself is still to be made."""
    commit = "a" * 40
    repository = cache / f"models--{name.replace('/', '--')}"
    for folder in ("snapshots", "refs"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


# --- scans


SHAPES = {"self_attn.q_proj": (16, 16), "mlp.down_proj": (16, 24)}
"""The shapes of the matrices that `blocks` makes."""


def fit(snr: float | None, *, scale: float = 1.0, threshold: float = 1.0, rank: int = 3) -> EdgeFit:
    """What an edge found in a matrix of this SNR."""
    ratio = None if snr is None else snr * scale
    return EdgeFit(sigma=1.0, threshold=threshold, rank=rank, snr=snr, snr_ratio=ratio, reason=None)


def entry(name: str, snr: float | None, *, kind: str | None = None, shape=(16, 24), smallest: float = 0.5, **fits):
    """A scanned matrix of this SNR by every edge, but for those whose fit is given."""
    segments = name.split(".")
    block = next((int(segment) for segment in segments if segment.isdecimal()), None)
    edges = {"iqr": fit(snr), "mp": fit(snr), "gavish-donoho": fit(snr)} | fits
    kind = kind or (name if block is None else ".".join(segments[segments.index(str(block)) + 1 :]))
    return MatrixScan(name, kind, block, shape, 4.0, smallest, edges, ())


def scan_of(*matrices: MatrixScan, skipped: tuple[Skipped, ...] = ()) -> Scan:
    """A scan with these matrices."""
    return Scan("a/model", "", "iqr", matrices, skipped)


def blocks(snrs: Mapping[str, list[float | None]]) -> list[MatrixScan]:
    """Scanned matrices of a model by their type, the SNRs in the order of the blocks."""
    return [
        entry(f"model.layers.{block}.{kind}", snr, shape=SHAPES.get(kind, (16, 24)))
        for kind, values in snrs.items()
        for block, snr in enumerate(values)
    ]


# --- processes

SPLASER = [sys.executable, "-c", "from splaser_plugin.cli.app import main; main()"]
"""The command line in a process of its own."""


def torchrun() -> list[str]:
    """Two processes by torchrun, which looks for a free port by itself."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


def accelerate() -> list[str]:
    """`accelerate launch`, whose only launcher of several local processes is called multi_gpu; they use the CPU."""
    flags = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    free_port = ["--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *flags.split(), *free_port]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Inside, no file can be written past that many bytes, as on a full disk; the test is skipped on Windows."""
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def run_python(script: str, *arguments: str, **environment: str) -> str:
    """What a script prints in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def wandb_history(folder: Path) -> bytes:
    """What W&B has stored of the one offline run in this folder, once its service has ended: until then it writes.

    Without the header of each block of the file, which cuts records in two.
    """
    import wandb

    wandb.teardown()
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    stored, block, header = file.read_bytes(), 2**15, 7
    return stored[:block] + b"".join(stored[at + header : at + block] for at in range(block, len(stored), block))
