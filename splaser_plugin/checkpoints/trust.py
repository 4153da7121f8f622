"""What of an untrusted folder may be loaded, checked before transformers, PEFT or sentence-transformers read it.

Weights are safetensors whose headers agree with their files; pickles, which can run code, only where they are
allowed. Code that comes with a model is never run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

from splaser_plugin.checkpoints.checkpoint import Checkpoint, open_checkpoint
from splaser_plugin.checkpoints.folder import PICKLED_WEIGHTS, SINGLE_NAME, ModelFolder, read_object
from splaser_plugin.checkpoints.header import StoredTensor, read_header
from splaser_plugin.errors import CheckpointError, EmbedderError, SplaserError
from splaser_plugin.files.reading import open_file
from splaser_plugin.files.text import shown

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ADAPTER_CONFIG, ADAPTER, PICKLED_ADAPTER = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LEFT_BY_TRAINERS = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth")
"""Pickles of a checkpoint that only a training which goes on reads."""
READ_BY_TRANSFORMERS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


@overload
def check_model_folder(folder: ModelFolder) -> Checkpoint: ...


@overload
def check_model_folder(folder: ModelFolder, *, allow_pickle: bool) -> Checkpoint | None: ...


def check_model_folder(folder: ModelFolder, *, allow_pickle: bool = False) -> Checkpoint | None:
    """The weights of the model in `folder`; None where they are pickled and `allow_pickle`.

    Raises CheckpointError, naming the file and the tensor, when it isn't to be loaded: weights that are missing,
    damaged, at odds with their index, or pickled; a configuration that names other files or more layers than there
    are tensors; an adapter beside the model.
    """
    pickled = folder.has_only_pickles
    if pickled and not allow_pickle:
        raise CheckpointError(
            _refused_pickle(next(folder.path / name for name in PICKLED_WEIGHTS if name in folder.sizes))
        )
    config = folder.config or read_object(folder.path / "config.json")  # raises where there is no such file
    for name in READ_BY_TRANSFORMERS:
        if name in folder.sizes:
            read_object(folder.path / name)
    if config.get("transformers_weights") is not None:
        raise CheckpointError(
            f"{folder.path / 'config.json'}: transformers_weights names another file "
            f"({shown(config['transformers_weights'])}). Take that key out."
        )
    if ADAPTER_CONFIG in folder.sizes:
        raise CheckpointError(
            f"{folder.path / ADAPTER_CONFIG}: an adapter beside the model. Put it in a folder of its own, for "
            "--adapter."
        )
    if pickled:
        return None
    checkpoint = open_checkpoint(folder)
    _check_layers(config, len(checkpoint.tensors), folder.path)
    return checkpoint


def check_adapter_folder(folder: Path, *, allow_pickle: bool = False) -> list[StoredTensor] | None:
    """The tensors of the PEFT adapter in `folder`; None where they are pickled and `allow_pickle`.

    Raises CheckpointError, naming the file and the tensor, when it isn't to be loaded.
    """
    config = read_object(folder / ADAPTER_CONFIG)
    for name in READ_BY_TRANSFORMERS:
        if (folder / name).exists():
            read_object(folder / name)
    if config.get("megatron_config") is not None:  # PEFT would import the module that megatron_core names
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: megatron_config can't be used here. Take that key out.")
    if (folder / ADAPTER).exists():
        return read_file_header(folder / ADAPTER, CheckpointError)
    if not (folder / PICKLED_ADAPTER).exists():
        raise CheckpointError(f"{folder}: there is no {ADAPTER}. Give a folder that PEFT saved.")
    if not allow_pickle:
        raise CheckpointError(_refused_pickle(folder / PICKLED_ADAPTER))
    return None


def check_embedder_folder(folder: Path, *, allow_pickle: bool = False) -> None:
    """Raises EmbedderError when the sentence-transformers model in `folder` isn't to be loaded."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.suffix == ".safetensors":
            read_file_header(file, EmbedderError)
        elif file.suffix in PICKLES and not allow_pickle and not _is_never_read(file):
            raise EmbedderError(_refused_pickle(file))


def _is_never_read(file: Path) -> bool:
    """Of a pickled file beside an embedder's: what a trainer left, and weights that are there as safetensors, too."""
    return LEFT_BY_TRAINERS.fullmatch(file.name) is not None or file.with_name(SINGLE_NAME).exists()


def read_file_header(file: Path, error: type[SplaserError]) -> list[StoredTensor]:
    """The tensors of one safetensors file, all checked. Raises `error`."""
    try:
        with open_file(file, CheckpointError) as opened:
            return read_header(opened, os.fstat(opened.fileno()).st_size, file)
    except CheckpointError as problem:
        raise error(str(problem)) from problem


def _check_layers(config: Mapping[str, Any], tensors: int, folder: Path) -> None:
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > tensors:
        raise CheckpointError(
            f"{folder / 'config.json'}: num_hidden_layers is {shown(layers)}, but there are only {tensors} tensors. "
            "It belongs to another model."
        )


def _refused_pickle(file: Path) -> str:
    return (
        f"{file}: pickled weights can run code when they are read, so only safetensors are. If you trust them, pass "
        "--allow-pickle."
    )
