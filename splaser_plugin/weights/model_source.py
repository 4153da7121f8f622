"""Where a model is loaded from: a folder, a .gguf file or the hub, checked before anything of it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from splaser_plugin.checkpoints.checkpoint import Checkpoint
from splaser_plugin.checkpoints.folder import ModelFolder, inspect, resolve_model
from splaser_plugin.checkpoints.quantised import quantised_weights, stored_as
from splaser_plugin.checkpoints.quantised_weight import QuantisedWeight
from splaser_plugin.checkpoints.trust import ADAPTER_CONFIG, check_model_folder
from splaser_plugin.errors import CheckpointError
from splaser_plugin.files.output import MARK
from splaser_plugin.files.sources import looks_like_path, path_of
from splaser_plugin.weights.factored_format import stored_layers

GGUF_PART = re.compile(r"-\d{5}-of-(?!00001\b)\d{5}\.gguf$")


@dataclass(frozen=True)
class ModelSource:
    """What `load_model` loads, found and checked by `find_model` in one visit."""

    name: str
    """As it was given."""
    folder: Path
    gguf: str = ""
    """Name of the .gguf file in the folder; empty where it isn't that."""
    checkpoint: Checkpoint | None = None
    """The weights; None where they are in a .gguf file or pickled."""
    weight_bytes: int = 0
    """Their size on disk."""
    quantised: Mapping[str, QuantisedWeight] = field(default_factory=dict)
    """Those weights that are stored as codes with scales, by name; they are loaded as what they stand for."""
    read: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False, compare=False)
    """What `splaser_plugin.weights.loading` has read of it, once each: the configuration, and tokenizers, by the
    adapter's folder, empty for none."""

    def dequantised_note(self, dtype: torch.dtype) -> str:
        """What a model of that dtype, loaded from quantised weights, is: for people."""
        name = str(dtype).removeprefix("torch.")
        return f"{stored_as(self.quantised.values())}, loaded as the weights they stand for and written in {name}"


def find_model(name: str | Path, *, allow_pickle: bool = False) -> ModelSource:
    """Where a model is to be loaded from, once what is there was checked.

    Raises CheckpointError when there is nothing there that `load_model` loads.
    """
    path = path_of(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"{name}: there is no such file. Check the path.")
        if GGUF_PART.search(path.name):
            raise CheckpointError(
                f"{name}: a part of a split file, which can't be loaded. Merge its parts first, with llama.cpp's "
                "`llama-gguf-split --merge FIRST_PART WHOLE.gguf`."
            )
        return ModelSource(str(name), path.parent, path.name, weight_bytes=path.stat().st_size)
    if path.is_dir():
        folder = inspect(path)
        _check_is_model(name, folder)
    elif path.exists() or looks_like_path(name):
        raise CheckpointError(f"{name}: there is no such model folder. Check the path.")
    else:
        folder = inspect(resolve_model(str(name), allow_pickle=allow_pickle))
    if "modules.json" in folder.sizes:
        raise CheckpointError(
            f"{name}: this is a sentence-transformers model, which gives no answers. Give a causal language model."
        )
    checkpoint = check_model_folder(folder, allow_pickle=allow_pickle)
    quantised = (
        {} if checkpoint is None or stored_layers(checkpoint.config, folder.path) else quantised_weights(checkpoint)
    )
    return ModelSource(
        str(name), folder.path, checkpoint=checkpoint, weight_bytes=folder.weight_bytes, quantised=quantised
    )


def _check_is_model(name: str | Path, folder: ModelFolder) -> None:
    if "config.json" not in folder.sizes:
        if ADAPTER_CONFIG in folder.sizes:
            raise CheckpointError(
                f"{name}: this folder has an adapter and no model. Give the base model, and this as --adapter."
            )
        if MARK in folder.sizes:
            raise CheckpointError(
                f"{name}: this laser run kept nothing, so it wrote no model. Give the base model: it would have "
                "written that."
            )
        if "snapshots" in folder.names:
            raise CheckpointError(
                f"{name}: this is a repository of the hub's cache. Give the folder snapshots/HASH in it."
            )
        raise CheckpointError(f"{name}: this folder has no config.json. Give a folder saved by save_pretrained.")
    if not folder.matching("*.safetensors") and not folder.matching("pytorch_model*.bin"):
        raise CheckpointError(f"{name}: this folder has no weights (*.safetensors). Save the model there first.")
