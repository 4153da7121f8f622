"""What a model's folder has beside the weights that its loader takes: kept in what is written of the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from splaser_plugin.checkpoints.checkpoint import Checkpoint, open_checkpoint
from splaser_plugin.checkpoints.folder import INDEX_NAME, SINGLE_NAME
from splaser_plugin.checkpoints.modelopt import SETTINGS_FILE
from splaser_plugin.checkpoints.quantised import read_weights, with_weights
from splaser_plugin.checkpoints.quantised_weight import QuantisedWeight
from splaser_plugin.checkpoints.skeleton import unplaced
from splaser_plugin.weights.model_source import ModelSource

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".index.json")
"""How files end that hold weights, or say where they are."""
OWN_FILES = frozenset(
    {"README.md", "journal.jsonl", "recipe.json", "report.html", "results.json", "run.yaml", "scan.json"}
)
"""What a run of splaser wrote about another model."""
SHARD = "model-{:05}-of-{:05}.safetensors"


@dataclass(frozen=True)
class Rest:
    """Tensors and files of a model's folder that the loaded model doesn't hold."""

    checkpoint: Checkpoint
    quantised: Mapping[str, QuantisedWeight]
    dtype: torch.dtype
    """Of quantised weights, once they are dequantised."""
    tensors: tuple[str, ...]
    """Names of tensors that the loader leaves out, as it does layers for multi-token prediction."""

    @property
    def note(self) -> str:
        """The tensors for people; empty where there are none."""
        if not self.tensors:
            return ""
        return f"{len(self.tensors)} tensors that transformers leaves out of this model: {self.tensors[0]}, ..."

    def write(self, folder: Path) -> None:
        """Add the rest to a folder that `save_pretrained` has written the model to."""
        left_out = OWN_FILES | ({SETTINGS_FILE} if self.quantised else set())
        for file in sorted(self.checkpoint.folder.iterdir()):
            is_other = file.is_file() and not file.name.endswith(WEIGHTS) and file.name not in left_out
            if is_other and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
        if self.tensors:
            self._write_tensors(folder)

    def _write_tensors(self, folder: Path) -> None:
        checkpoint = open_checkpoint(folder)
        kept = [name for name in self.tensors if name not in checkpoint.tensors]
        tensors = dict(read_weights(self.checkpoint, self.quantised, kept, self.dtype))
        shards = list(checkpoint.shard_bytes)
        names = {shard: SHARD.format(place, len(shards) + 1) for place, shard in enumerate(shards, 1)}
        where = {name: names[stored.shard] for name, stored in checkpoint.tensors.items()}
        for shard in shards:
            shard.rename(folder / names[shard])
        last = SHARD.format(len(shards) + 1, len(shards) + 1)
        save_file(tensors, folder / last, metadata={"format": "pt"})
        total = sum(file.stat().st_size for file in folder.glob("model-*.safetensors"))
        index = {"metadata": {"total_size": total}, "weight_map": {**where, **dict.fromkeys(tensors, last)}}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (folder / SINGLE_NAME).unlink(missing_ok=True)


def rest_of(source: ModelSource, model: Any) -> Rest | None:
    """What `model`, loaded from there, left of the folder; None where its weights are in no checkpoint."""
    if source.checkpoint is None:
        return None
    unplaced_names = unplaced(model, with_weights(source.checkpoint, source.quantised))
    return Rest(source.checkpoint, source.quantised, model.dtype, unplaced_names)
