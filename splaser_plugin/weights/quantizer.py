"""What makes transformers load factored models by itself: a quantization method of the name `splaser`.

Nothing is quantised. transformers lets a quantization method change a model's layers after it is built and before its
weights are loaded, by what `quantization_config` in config.json says, which is just what a factored model needs.
`splaser_plugin.weights.registration` registers the method wherever splaser_plugin is imported; without it,
transformers warns that it doesn't know `splaser` and stops at the first tensor of an unexpected shape. A loaded model
keeps no trace of the method but its configuration, so that training and saving treat it as the plain model it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer

from splaser_plugin.checkpoints.checkpoint import Checkpoint, open_checkpoint
from splaser_plugin.errors import CheckpointError
from splaser_plugin.files.text import shown
from splaser_plugin.weights.factored import factored_layers, install, settle
from splaser_plugin.weights.factored_config import FactoredConfig
from splaser_plugin.weights.factored_format import METHOD, OLD_KEY, stored_layers
from splaser_plugin.weights.factored_layers import GaugeLinear


class FactoredQuantizer(HfQuantizer):
    """Puts factored layers into a model that transformers is about to load."""

    is_trainable = True
    is_qat_trainable = True

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        folder = Path(checkpoint_files[0]).parent if checkpoint_files else Path(model.config.name_or_path or ".")
        layers = stored_layers({"quantization_config": self.quantization_config.to_dict()}, folder)
        prefix = f"{model.base_model_prefix}."
        if not hasattr(model, model.base_model_prefix):  # AutoModel, without the head that the names were made with
            layers = {name.removeprefix(prefix): stored for name, stored in layers.items()}
        install(model, layers, f"{folder / 'config.json'}: layers")
        if checkpoint_files and all(name.endswith(".safetensors") for name in checkpoint_files):
            check_stored(model, open_checkpoint(folder), prefix)

    def postprocess_model(self, model: Any, **_: Any) -> None:
        check_orders(model)
        del model.hf_quantizer, model.is_quantized, model.quantization_method
        if hasattr(model.config, OLD_KEY):
            delattr(model.config, OLD_KEY)
        settle(model)


def check_stored(model: Any, checkpoint: Checkpoint, prefix: str = "") -> None:
    """Raise CheckpointError, before any weights are loaded, when the checkpoint's tensors aren't what the model needs.

    Every tensor of a factored layer has to be there. transformers reports what else is missing, but not every version
    compares the shapes of a model with a quantization method.

    prefix: what may stand before the model's names in the checkpoint.
    """
    layer_of = {f"{name}.{part}": name for name, layer in factored_layers(model).items() for part in layer.state_dict()}
    found = {name: checkpoint.tensors.get(name) or checkpoint.tensors.get(prefix + name) for name in model.state_dict()}
    # a layer of which nothing is there has another name on disk, which transformers changes when it loads it
    there = {layer_of[name] for name, stored in found.items() if stored is not None and name in layer_of}
    for name, expected in model.state_dict().items():
        stored = found[name]
        if stored is None:
            if layer_of.get(name) in there:
                raise CheckpointError(f"{checkpoint.folder}: tensor {shown(name)} is missing. Save the model again.")
            continue
        where = f"{stored.shard}: tensor {shown(name)}"
        if stored.shape != tuple(expected.shape):
            raise wrong_shape(where, stored.shape, tuple(expected.shape))
        if name in layer_of and stored.dtype.is_floating_point != expected.dtype.is_floating_point:
            wanted = "floating point" if expected.dtype.is_floating_point else str(expected.dtype)
            raise CheckpointError(f"{where} is {stored.dtype}, expected {wanted}. Save the model again.")


def wrong_shape(where: str, got: tuple[int, ...], expected: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(f"{where} has shape {got}, expected {expected} by config.json. Save the model again.")


def check_orders(model: Any) -> None:
    """Raise CheckpointError when a loaded layer's pivots are no choice of its rows or columns."""
    for name, layer in factored_layers(model).items():
        if isinstance(layer, GaugeLinear) and not layer.order.is_meta:
            order = layer.order.long().cpu()
            if not torch.equal(order.sort().values, torch.arange(len(order))):
                raise CheckpointError(
                    f"{model.config.name_or_path}: tensor '{name}.order' holds not each place once. "
                    "Save the model again."
                )


def register() -> None:
    """Make the method known to transformers; once is enough."""
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(FactoredConfig)
        register_quantizer(METHOD)(FactoredQuantizer)
