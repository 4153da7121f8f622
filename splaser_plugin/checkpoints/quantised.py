"""Weights that are stored as codes with scales: which layouts are understood, and the weights that they stand for.

Understood are 8-bit floats with a scale for each block, row or tensor, as of DeepSeek and MXFP8, DeepSeek-V4's 4-bit
experts, MXFP4 experts as of gpt-oss, and the formats of compressed-tensors and ModelOpt. All else is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from splaser_plugin.checkpoints.checkpoint import Checkpoint, read_groups
from splaser_plugin.checkpoints.compressed import compressed_weights
from splaser_plugin.checkpoints.header import EXPONENTS, StoredTensor
from splaser_plugin.checkpoints.modelopt import METHOD as MODELOPT
from splaser_plugin.checkpoints.modelopt import is_modelopt, modelopt_weights
from splaser_plugin.checkpoints.quantised_weight import (
    FP8,
    NEXT_STEP,
    PackedBlocks,
    PackedExperts,
    QuantisedWeight,
    ScaledBlocks,
    dtype_name,
    grid_of,
    not_understood,
    of_activations,
)
from splaser_plugin.errors import CheckpointError
from splaser_plugin.files.text import printable, shown

if TYPE_CHECKING:
    from torch import Tensor

SCALE = re.compile(r"scale|absmax|SCB", re.IGNORECASE)
"""In the last segment of what stands beside quantised weights."""
FP8_METHODS = frozenset({"fp8", "fbgemm_fp8"})
SCALE_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def quantised_weights(checkpoint: Checkpoint) -> Mapping[str, QuantisedWeight]:
    """What is quantised, by the name of the weight; empty for plain weights.

    Raises CheckpointError when the weights are quantised in a way that isn't understood.
    """
    settings = _settings(checkpoint.config)
    method = quantisation(checkpoint.config) or (MODELOPT if is_modelopt(checkpoint.folder) else "")
    found: Mapping[str, QuantisedWeight] = {}
    if method in FP8_METHODS:
        found = _fp8(checkpoint, settings)
    elif method == "mxfp4":
        found = _mxfp4(checkpoint)
    elif method == "compressed-tensors":
        found = compressed_weights(checkpoint, settings or {})
    elif method == MODELOPT:
        found = modelopt_weights(checkpoint)
    if method and not found:
        raise CheckpointError(
            f"{checkpoint.folder}: its weights are quantised ({method}), as its configuration says, in a way that "
            f"can't be read. {NEXT_STEP}"
        )
    _check_holds_weights(with_weights(checkpoint, found))
    return found


def with_weights(checkpoint: Checkpoint, quantised: Mapping[str, QuantisedWeight]) -> Checkpoint:
    """The checkpoint as if it had the weights in float32 in the place of codes and scales; not to be read from."""
    stored = {part.name for weight in quantised.values() for part in (*weight.parts(None), *weight.beside)}
    weights = {
        name: replace(weight.codes, name=name, dtype=torch.float32, shape=weight.shape)
        for name, weight in quantised.items()
    }
    return replace(
        checkpoint,
        tensors={name: tensor for name, tensor in checkpoint.tensors.items() if name not in stored} | weights,
    )


def stored_as(quantised: Iterable[QuantisedWeight]) -> str:
    """How these weights are stored, for people; empty for none."""
    counts = Counter(weight.stored_as for weight in quantised)
    return ", ".join(f"{count:,} tensors in {how}" for how, count in counts.items())


def read_weights(
    checkpoint: Checkpoint, quantised: Mapping[str, QuantisedWeight], names: Sequence[str], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a checkpoint by their names, on the CPU: quantised weights as what they stand for, in `dtype`.

    All else comes as it is stored. One tensor more than the caller holds is in memory, see `read_groups`.
    """
    parts = [quantised[name].parts(None) if name in quantised else [checkpoint.tensors[name]] for name in names]
    for name, tensors in zip(names, read_groups(checkpoint, parts), strict=True):
        yield name, quantised[name].weights(*tensors).to(dtype) if name in quantised else tensors[0]


def _check_holds_weights(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError at the first tensor that holds codes with scales beside them instead of weights."""
    tensors = checkpoint.tensors
    scaled = {name.rpartition(".")[0] for name in tensors if SCALE.search(name.rpartition(".")[2])}
    for name, stored in tensors.items():
        is_code = not stored.dtype.is_floating_point or stored.dtype.itemsize == 1
        if len(stored.shape) >= 2 and is_code and scaled & {name, name.rpartition(".")[0]}:
            method = quantisation(checkpoint.config)
            raise CheckpointError(
                f"{stored.shard}: tensor {shown(name)} is {dtype_name(stored)} with scales "
                f"beside it: quantised weights{f' ({method})' if method else ''}, which can't be read. {NEXT_STEP}"
            )


def quantisation(config: Mapping[str, Any]) -> str:
    """The method by which config.json says the weights are quantised; empty for none."""
    settings = _settings(config)
    return "" if settings is None else printable(str(settings.get("quant_method") or "unknown method"), 40)


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What config.json says of the quantisation; None for nothing."""
    for part in (config, config.get("text_config"), config.get("llm_config")):
        stored = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(stored, dict):
            return stored
    return None


def _fp8(checkpoint: Checkpoint, settings: Mapping[str, Any] | None) -> dict[str, ScaledBlocks]:
    """transformers' layout: `weight` with `weight_scale_inv` for each block of `weight_block_size`, or for the tensor
    where there is no such size; or `weight_scale` for each row or for the tensor. A stack of experts has a scale for
    each block of each expert. DeepSeek-V4 calls the scales `scale`, and packs 4-bit floats of its experts into int8,
    with a scale for each 32 of a row. Scales are floats, or powers of two where `scale_fmt` is ue8m0.
    """
    block = _block(checkpoint, settings or {})
    scale_dtypes = SCALE_DTYPES | {EXPONENTS} if torch.uint8 != EXPONENTS else SCALE_DTYPES
    if (settings or {}).get("scale_fmt") == "ue8m0":
        scale_dtypes |= {torch.uint8}
    tensors = checkpoint.tensors
    found: dict[str, ScaledBlocks] = {}
    for name, codes in tensors.items():
        names = (f"{name}_scale_inv", f"{name}_scale", re.sub(r"\.weight$", ".scale", name))
        beside = [tensors[scale] for scale in names if scale in tensors and scale != name]
        is_packed = codes.dtype == torch.int8 and len(beside) == 1 and beside[0].name == names[2]
        is_float = codes.dtype.is_floating_point and codes.dtype.itemsize == 1 and codes.dtype != EXPONENTS
        if not (is_float or is_packed):
            continue
        if (is_float and codes.dtype != FP8) or len(codes.shape) not in (2, 3) or 0 in codes.shape or len(beside) != 1:
            raise not_understood(codes, f"of shape {codes.shape} with {len(beside)} scale tensors beside it", "one")
        (scales,) = beside
        if is_packed:
            shapes = {(*codes.shape[:-1], codes.shape[-1] // 16): (1, 32)} if codes.shape[-1] % 16 == 0 else {}
        else:
            shapes = _blocks_by_scales(codes, scales.name == names[1], block)
        if scales.dtype not in scale_dtypes or scales.shape not in shapes:
            raise not_understood(
                codes,
                f"of shape {codes.shape} with scales of shape {scales.shape} in {dtype_name(scales)}",
                f"float scales of shape {next(iter(shapes))}" if shapes else "whole groups of 32",
            )
        kind = PackedBlocks if is_packed else ScaledBlocks
        found[name] = kind(
            codes, scales, shapes[scales.shape], beside=of_activations(tensors, f"{name.rpartition('.')[0]}.")
        )
    used = {weight.scales.name for weight in found.values()}
    for name, stored in tensors.items():
        if name.endswith(("_scale_inv", ".weight_scale")) and name not in used:
            raise not_understood(stored, "a scale without a weight in 8-bit floats", "both")
    return found


def _blocks_by_scales(
    codes: StoredTensor, has_rows: bool, block: tuple[int, int] | None
) -> dict[tuple[int, ...], tuple[int, int]]:
    """The block that shares a scale, by the shape that the scales may have."""
    *experts, rows, columns = codes.shape
    if experts:
        return {(*experts, *grid_of((rows, columns), block or (rows, columns))): block or (rows, columns)}
    whole, row = (rows, columns), (1, columns)
    shapes: dict[tuple[int, ...], tuple[int, int]] = {(): whole, (1,): whole, (1, 1): whole}
    if has_rows:
        return {(rows,): row, (rows, 1): row, **shapes}
    return shapes if block is None else {grid_of((rows, columns), block): block}


def _mxfp4(checkpoint: Checkpoint) -> dict[str, PackedExperts]:
    """gpt-oss' layout: `gate_up_proj_blocks` with `gate_up_proj_scales`, and so for `down_proj`."""
    found = {}
    for name, codes in checkpoint.tensors.items():
        if name.endswith("_blocks"):
            scales = checkpoint.tensors.get(f"{name.removesuffix('_blocks')}_scales")
            is_known = len(codes.shape) == 4 and codes.shape[3] == 16 and codes.dtype == torch.uint8
            if scales is None or not is_known or scales.dtype != torch.uint8 or scales.shape != codes.shape[:3]:
                beside = "no scales" if scales is None else f"scales of shape {scales.shape} in {dtype_name(scales)}"
                raise not_understood(codes, f"of shape {codes.shape} with {beside}", "MXFP4 as of gpt-oss")
            found[name.removesuffix("_blocks")] = PackedExperts(codes, scales)
    for name, stored in checkpoint.tensors.items():
        if name.endswith("_scales") and name.removesuffix("_scales") not in found:
            raise not_understood(stored, "scales without blocks", "both")
    return found


def _block(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> tuple[int, int] | None:
    block = settings.get("weight_block_size")
    if block is None:
        return None
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: weight_block_size is {shown(block)}, expected two positive "
            f"integers. {NEXT_STEP}"
        )
    return block[0], block[1]
