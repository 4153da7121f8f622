"""A weight that is stored as codes with scales, and how it is made of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from splaser_plugin.checkpoints.header import EXPONENTS, StoredTensor
from splaser_plugin.errors import CheckpointError
from splaser_plugin.files.text import shown

if TYPE_CHECKING:
    from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The 4-bit floats without their sign (OCP Microscaling Formats 1.0, section 5.3.3)."""
FP8 = torch.float8_e4m3fn
OF_ACTIVATIONS = frozenset(
    {f"{side}_{what}" for side in ("input", "output", "q", "k", "v") for what in ("scale", "zero_point")}
    | {"input_global_scale", "output_global_scale", "activation_scale"}
)
"""Last segments of what a quantised layer has besides its weight."""
NEXT_STEP = "Give the model in bfloat16 or float32, as it was before it was quantised."


@dataclass(frozen=True)
class QuantisedWeight(ABC):
    """A weight, or a stack of experts' weights, that a checkpoint holds as codes and what belongs to them."""

    codes: StoredTensor
    scales: StoredTensor
    beside: tuple[StoredTensor, ...] = field(default=(), kw_only=True)
    """What belongs to the codes and not to the weights, as scales of activations do."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights."""
        return self.codes.shape

    @property
    def stored_as(self) -> str:
        """For people."""
        return f"{dtype_name(self.codes)} with scales"

    def parts(self, expert: int | None) -> list[StoredTensor]:
        """What `weights` is made of: one expert's where that can be read alone, else all."""
        return [self.codes, self.scales]

    @abstractmethod
    def weights(self, *parts: Tensor) -> Tensor:
        """The weights, of `shape`, in float32."""


@dataclass(frozen=True)
class ScaledBlocks(QuantisedWeight):
    """A matrix, or a stack (experts, rows, columns), of 8-bit floats, each to be multiplied by its block's scale."""

    block: tuple[int, int]
    """Rows and columns that share a scale; the last blocks may be cut off."""

    def parts(self, expert: int | None) -> list[StoredTensor]:
        if expert is None or len(self.shape) == 2:
            return super().parts(expert)
        both = (self.codes, self.scales)
        return [part.rows(expert, expert + 1) if len(part.shape) == 3 else part for part in both]

    def weights(self, *parts: Tensor) -> Tensor:
        codes, scales = parts
        weights = self._numbers(codes)
        height, width = self.block
        rows, columns = self.shape[-2:]
        blocks = (*codes.shape[:-2], *grid_of((rows, columns), self.block))
        grid = _of_scales(scales)
        grid = grid.expand(blocks) if grid.numel() == 1 else grid.view(blocks)
        of_rows = grid.repeat_interleave(height, dim=-2)[..., :rows, :]
        for column in range(grid.shape[-1]):
            weights[..., column * width : (column + 1) * width] *= of_rows[..., column : column + 1]
        return weights

    def _numbers(self, codes: Tensor) -> Tensor:
        return codes.float()


@dataclass(frozen=True)
class PackedBlocks(ScaledBlocks):
    """The same of 4-bit floats (e2m1), two in a byte, the lower half first: the experts of DeepSeek-V4."""

    @property
    def shape(self) -> tuple[int, ...]:
        *outer, columns = self.codes.shape
        return *outer, 2 * columns

    @property
    def stored_as(self) -> str:
        return "float4_e2m1 with scales"

    def _numbers(self, codes: Tensor) -> Tensor:
        return four_bit_floats(codes.view(torch.uint8))


@dataclass(frozen=True)
class PackedExperts(QuantisedWeight):
    """A stack of experts in MXFP4, as of gpt-oss.

    codes: (experts, columns, groups, 16), two in a byte. scales: (experts, columns, groups). A group is 32 rows.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(experts, rows, columns)."""
        experts, columns, groups, width = self.codes.shape
        return experts, groups * width * 2, columns

    def parts(self, expert: int | None) -> list[StoredTensor]:
        both = [self.codes, self.scales]
        return both if expert is None else [part.rows(expert, expert + 1) for part in both]

    def weights(self, *parts: Tensor) -> Tensor:
        """By transformers' own conversion."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        codes, scales = parts
        return convert_moe_packed_tensors(codes, scales, dtype=torch.float32)


def four_bit_floats(codes: Tensor) -> Tensor:
    """Of bytes that hold two each along the last dimension, the lower half first: their numbers in float32."""
    halves = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    sizes = torch.tensor(E2M1)[(halves & 7).long()]
    return torch.where(halves > 7, -sizes, sizes)


def _of_scales(scales: Tensor) -> Tensor:
    """Scales in float32. Bytes and `EXPONENTS` are powers of two, 2^(byte - 127), and 255 is no number (OCP
    Microscaling Formats 1.0, section 5.4.1).
    """
    if scales.dtype not in (torch.uint8, EXPONENTS):
        return scales.float()
    exponents = scales.view(torch.uint8).int()
    # by way of float64, as 2^-127 is below the smallest normal number of float32
    powers = torch.ldexp(torch.ones(exponents.shape, dtype=torch.float64), exponents - 127).float()
    return powers.masked_fill(exponents == 255, math.nan)


def grid_of(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks a matrix has, down and across."""
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def of_activations(tensors: Mapping[str, StoredTensor], start: str) -> tuple[StoredTensor, ...]:
    """What stands beside a layer's weight for what goes in and comes out. start: of its names, `...q_proj.`."""
    return tuple(tensors[f"{start}{last}"] for last in sorted(OF_ACTIVATIONS) if f"{start}{last}" in tensors)


def dtype_name(stored: StoredTensor) -> str:
    """As torch calls it, without its prefix."""
    return str(stored.dtype).removeprefix("torch.")


def not_understood(stored: StoredTensor, what: str, expected: str) -> CheckpointError:
    """The error for a tensor that doesn't have the form that its format asks for."""
    return CheckpointError(
        f"{stored.shard}: tensor {shown(stored.name)} ({dtype_name(stored)}) is {what}, expected {expected}: "
        f"quantised weights that can't be read. {NEXT_STEP}"
    )
