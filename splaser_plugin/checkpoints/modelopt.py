"""Weights that NVIDIA's ModelOpt has quantised, as its unified export for transformers writes them.

Read are, of linear layers, NVFP4 (4-bit floats with a scale for each 16 along the inputs, and one for the tensor),
MXFP8, and 8-bit floats with a scale for the tensor, each row or each block of 128 x 128; of stacks of experts, NVFP4
and 8-bit floats with a scale for the tensor. All else is refused. See https://nvidia.github.io/Model-Optimizer
(Unified HuggingFace Checkpoint).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from splaser_plugin.checkpoints.checkpoint import Checkpoint
from splaser_plugin.checkpoints.header import StoredTensor
from splaser_plugin.checkpoints.quantised_weight import (
    FP8,
    QuantisedWeight,
    ScaledBlocks,
    dtype_name,
    four_bit_floats,
    grid_of,
    not_understood,
    of_activations,
)
from splaser_plugin.errors import CheckpointError
from splaser_plugin.files.json import read_json

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "modelopt"
SETTINGS_FILE = "hf_quant_config.json"
"""What ModelOpt writes beside config.json; before its version 0.37 nothing stood in config.json itself."""
GROUP = 16
BLOCK = (128, 128)
NOT_ALONE = {
    "pre_quant_scale": "scaled by its layer's inputs (pre_quant_scale, as of AWQ)",
    "svdquant_lora_a": "a part of its layer (beside svdquant_lora_a, as of SVDQuant)",
}
"""What a layer may have besides, so that its codes and scales aren't all of its weight."""
EXPECTED = "ModelOpt's NVFP4, MXFP8 or FP8"


@dataclass(frozen=True)
class Nvfp4(QuantisedWeight):
    """Two 4-bit floats in a byte, the lower half first: `codes` (rows, columns / 2), `scales` (rows, columns / 16).

    Of a stack of experts, which is stored as (experts, inputs, outputs), they lie along the inputs: `codes`
    (experts, inputs / 2, outputs), `scales` (experts, inputs / 16, outputs).
    """

    overall: StoredTensor
    """The tensor's own scale, one number."""

    @property
    def shape(self) -> tuple[int, ...]:
        if len(self.codes.shape) == 2:
            return self.codes.shape[0], 2 * self.codes.shape[1]
        experts, packed, outputs = self.codes.shape
        return experts, 2 * packed, outputs

    @property
    def stored_as(self) -> str:
        return "NVFP4 (ModelOpt)"

    def parts(self, expert: int | None) -> list[StoredTensor]:
        both = [self.codes, self.scales]
        if expert is not None and len(self.codes.shape) == 3:
            both = [part.rows(expert, expert + 1) for part in both]
        return [*both, self.overall]

    def weights(self, *parts: Tensor) -> Tensor:
        codes, scales, overall = parts
        if codes.ndim == 3:
            codes, scales = codes.transpose(1, 2), scales.transpose(1, 2)
        found = four_bit_floats(codes)
        found *= (scales.float() * overall.float()).repeat_interleave(GROUP, dim=-1)
        return found.transpose(1, 2).contiguous() if codes.ndim == 3 else found


def is_modelopt(folder: Path) -> bool:
    """Whether ModelOpt's own file says that it has quantised what is in the folder.

    Raises CheckpointError where there is such a file and it can't be read.
    """
    file = folder / SETTINGS_FILE
    settings = read_json(file, CheckpointError) if file.exists() else None
    return isinstance(settings, dict) and isinstance(settings.get("quantization"), dict)


def modelopt_weights(checkpoint: Checkpoint) -> dict[str, QuantisedWeight]:
    """What is quantised, by the name of the weight. Raises CheckpointError for a layout that isn't understood."""
    tensors = checkpoint.tensors
    found: dict[str, QuantisedWeight] = {}
    used: set[str] = set()
    for name, codes in tensors.items():
        stem = name if name.endswith(".weight") else f"{name}_weight"
        scales = tensors.get(f"{stem}_scale")
        if scales is None:
            continue
        start = stem.removesuffix("weight")
        for other, what in NOT_ALONE.items():
            if f"{start}{other}" in tensors:
                raise not_understood(codes, what, EXPECTED)
        beside = of_activations(tensors, start)
        weight = _weight(codes, scales, tensors.get(f"{stem}_scale_2"), beside)
        if weight is None:
            what = f"of shape {codes.shape} with scales of shape {scales.shape} in {dtype_name(scales)}"
            raise not_understood(codes, what, EXPECTED)
        found[name] = weight
        used |= {part.name for part in (*weight.parts(None), *beside)}
    for name, stored in tensors.items():
        if name.endswith(("weight_scale", "weight_scale_2", "pre_quant_scale")) and name not in used:
            raise not_understood(stored, "a scale without a weight", "both")
    return found


def _weight(
    codes: StoredTensor, scales: StoredTensor, overall: StoredTensor | None, beside: tuple[StoredTensor, ...]
) -> QuantisedWeight | None:
    """The weight in the layout that dtypes and shapes tell; None where it is none that is known."""
    shape = codes.shape
    if len(shape) not in (2, 3) or 0 in shape:
        return None
    if codes.dtype == torch.uint8 and scales.dtype == FP8 and overall is not None and _is_number(overall):
        packed = 1 if len(shape) == 2 else -2
        groups = list(shape)
        groups[packed], left = divmod(2 * shape[packed], GROUP)
        return Nvfp4(codes, scales, overall, beside=beside) if scales.shape == tuple(groups) and not left else None
    if codes.dtype != FP8 or overall is not None:
        return None
    rows, columns = shape[-2:]
    down, across = grid_of((rows, columns), BLOCK)
    block: tuple[int, int] | None = None
    if scales.dtype.is_floating_point and scales.dtype.itemsize > 1:
        if _is_number(scales):
            block = (rows, columns)
        elif scales.shape in ((rows,), (rows, 1)) and len(shape) == 2:
            block = (1, columns)
        elif len(shape) == 2 and scales.shape in ((down, across), (down, 1, across, 1)):
            block = BLOCK
    elif scales.dtype == torch.uint8 and len(shape) == 2 and scales.shape == (rows, columns / 32):
        block = (1, 32)
    return None if block is None else ScaledBlocks(codes, scales, block, beside=beside)


def _is_number(stored: StoredTensor) -> bool:
    return stored.shape in ((), (1,)) and stored.dtype.is_floating_point
