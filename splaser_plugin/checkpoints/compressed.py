"""Weights in a format of compressed-tensors, dequantised by that library.

The library's decompressors and names of tensors are used; see https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from splaser_plugin.checkpoints.checkpoint import Checkpoint, read_groups
from splaser_plugin.checkpoints.header import StoredTensor
from splaser_plugin.checkpoints.quantised_weight import (
    NEXT_STEP,
    OF_ACTIVATIONS,
    QuantisedWeight,
    not_understood,
)
from splaser_plugin.errors import CheckpointError
from splaser_plugin.files.text import first_line_of, shown

if TYPE_CHECKING:
    from torch import Tensor

NVFP4 = "nvfp4-pack-quantized"
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", NVFP4)


@dataclass(frozen=True)
class CompressedWeight(QuantisedWeight):
    """A matrix in one of `FORMATS`."""

    format: str
    scheme: Any
    """compressed_tensors.quantization.QuantizationScheme."""
    tensors: Mapping[str, StoredTensor]
    """By their names in the layer, as `weight_scale`."""
    shape_of_weights: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns)."""
        return self.shape_of_weights

    @property
    def stored_as(self) -> str:
        return f"{self.format} ({self.scheme.weights.num_bits} bits)"

    def parts(self, expert: int | None) -> list[StoredTensor]:
        return list(self.tensors.values())

    def weights(self, *parts: Tensor) -> Tensor:
        """By the library, with scales in float32, in which it computes then."""
        state = dict(zip(self.tensors, parts, strict=True))
        if self.format == NVFP4:
            return _of_nvfp4(state)
        state["weight_scale"] = state["weight_scale"].float()
        found: Tensor = _decompressor(self.format).decompress(state, self.scheme)["weight"]
        return found.float()


def compressed_weights(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, CompressedWeight]:
    """What is quantised, by the name of the weight.

    Raises CheckpointError when the library is missing, and for a format or layout that isn't understood.
    """
    config = _configuration(checkpoint, settings)
    layers: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in checkpoint.tensors.items():
        layer, _, last = name.rpartition(".")
        layers.setdefault(layer, {})[last] = stored
    quantised = {layer: mine for layer, mine in layers.items() if "weight_scale" in mine}
    shapes = _packed_shapes(checkpoint, [mine["weight_shape"] for mine in quantised.values() if "weight_shape" in mine])
    beside = {
        layer: tuple(stored for name, stored in mine.items() if name in OF_ACTIVATIONS)
        for layer, mine in layers.items()
    }
    found = {}
    for layer, mine in quantised.items():
        scales = mine["weight_scale"]
        scheme = _scheme_of(config, layer, scales)
        layout = scheme.format or config.format
        if layout not in FORMATS:
            raise not_understood(scales, f"of a layer in {shown(layout)}", f"one of {', '.join(FORMATS)}")
        names = [name for name in _decompressor(layout).compression_param_names(scheme) if name.startswith("weight")]
        absent = set(names) - mine.keys()
        more = {name for name in mine if name.startswith("weight_")} - set(names)
        if absent or more:
            what = f"without {min(absent)}" if absent else f"with {min(more)} beside it"
            raise not_understood(scales, f"of a layer {what}", f"{', '.join(names)} ({layout})")
        codes = mine[names[0]]
        rows, columns = shapes.get(f"{layer}.weight_shape") or codes.shape[-2:]
        found[f"{layer}.weight"] = CompressedWeight(
            codes,
            scales,
            layout,
            scheme,
            {name: mine[name] for name in names},
            (rows, columns * 2 if layout == NVFP4 else columns),
            # an attention's scales of keys and values are unused with the first of its layers
            beside=beside.pop(layer) + beside.pop(layer.rpartition(".")[0], ()),
        )
    return found


def _configuration(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Any:
    """config.json's settings as the library reads them."""
    try:
        from compressed_tensors.quantization import QuantizationConfig
    except ImportError as error:
        raise CheckpointError(
            f"{checkpoint.folder}: its weights are quantised by compressed-tensors. Install what reads those: "
            "pip install 'splaser_plugin[compressed-tensors]' (Python 3.11 or later)."
        ) from error
    if settings.get("sparsity_config"):
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: sparse formats of compressed-tensors can't be read. {NEXT_STEP}"
        )
    try:
        return QuantizationConfig.model_validate(dict(settings))
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: compressed-tensors doesn't know its quantization_config "
            f"({first_line_of(error)}). {NEXT_STEP}"
        ) from error


def _scheme_of(config: Any, layer: str, scales: StoredTensor) -> Any:
    """The scheme of a layer's group: one that names it goes before one that names its class."""
    groups = config.config_groups.values()
    named = [group for group in groups if any(_names(target, layer) for target in group.targets)]
    of_class = [group for group in groups if any(not target.startswith("re:") for target in group.targets)]
    schemes = [group for group in named or of_class if group.weights is not None]
    if len(schemes) != 1:
        raise not_understood(scales, f"of a layer that {len(schemes)} groups of config.json quantise", "one")
    return schemes[0]


def _names(target: str, layer: str) -> bool:
    return re.match(target[3:], layer) is not None if target.startswith("re:") else target == layer


def _packed_shapes(checkpoint: Checkpoint, stored: Sequence[StoredTensor]) -> dict[str, tuple[int, int]]:
    """(rows, columns) as these tensors say them, by their names."""
    found = {}
    for part, (shape,) in zip(stored, read_groups(checkpoint, [[part] for part in stored]), strict=True):
        if shape.shape != (2,) or shape.is_floating_point() or (shape < 1).any():
            raise not_understood(part, f"the shape {shown(shape.tolist())}", "rows and columns")
        rows, columns = shape.tolist()
        found[part.name] = (rows, columns)
    return found


def _decompressor(layout: str) -> Any:
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(layout)


def _of_nvfp4(state: Mapping[str, Tensor]) -> Tensor:
    """The library computes this in bfloat16: a 4-bit float, times its group's scale, by the scale of the tensor."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    packed, scales = state["weight_packed"], state["weight_scale"].float() / state["weight_global_scale"].float()
    values = unpack_fp4_from_uint8(packed, packed.shape[0], packed.shape[1] * 2, dtype=torch.float32)
    return values * scales.repeat_interleave(values.shape[1] // scales.shape[1], dim=1)
