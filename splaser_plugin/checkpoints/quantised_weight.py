"""A weight that is stored as codes with scales, and how it is made of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from splaser_plugin.checkpoints.header import StoredTensor
from splaser_plugin.errors import CheckpointError
from splaser_plugin.files.text import shown

if TYPE_CHECKING:
    from torch import Tensor

NEXT_STEP = "Give the model in bfloat16 or float32, as it was before it was quantised."


@dataclass(frozen=True)
class QuantisedWeight(ABC):
    """A weight, or a stack of experts' weights, that a checkpoint holds as codes and what belongs to them."""

    codes: StoredTensor
    scales: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights."""
        return self.codes.shape

    @property
    def stored_as(self) -> str:
        """For people."""
        return f"{dtype_name(self.codes)} with scales"

    @property
    def unused(self) -> tuple[StoredTensor, ...]:
        """What belongs to the codes and not to the weights, as scales of activations do."""
        return ()

    def parts(self, expert: int | None) -> list[StoredTensor]:
        """What `weights` is made of. Raises CheckpointError where one expert's alone can't be read."""
        if expert is not None:
            raise CheckpointError(
                f"{self.codes.shard}: tensor {shown(self.codes.name)} holds several experts as "
                f"{dtype_name(self.codes)} with scales, which can't be read. {NEXT_STEP}"
            )
        return [self.codes, self.scales]

    @abstractmethod
    def weights(self, *parts: Tensor) -> Tensor:
        """The weights, of `shape`, in float32."""


@dataclass(frozen=True)
class ScaledBlocks(QuantisedWeight):
    """A matrix of 8-bit floats, each of which is to be multiplied by the scale of its block."""

    block: tuple[int, int]
    """Rows and columns that share a scale; the last blocks may be cut off."""

    def weights(self, *parts: Tensor) -> Tensor:
        codes, scales = parts
        weights = codes.float()
        height, width = self.block
        grid = scales.float().view(grid_of(self.shape, self.block))
        of_rows = grid.repeat_interleave(height, dim=0)[: len(weights)]
        for column in range(grid.shape[1]):
            weights[:, column * width : (column + 1) * width] *= of_rows[:, column : column + 1]
        return weights


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


def grid_of(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks a matrix has, down and across."""
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def dtype_name(stored: StoredTensor) -> str:
    """As torch calls it, without its prefix."""
    return str(stored.dtype).removeprefix("torch.")


def not_understood(stored: StoredTensor, what: str, expected: str) -> CheckpointError:
    """The error for a tensor that doesn't have the form that its format asks for."""
    return CheckpointError(
        f"{stored.shard}: tensor {shown(stored.name)} ({dtype_name(stored)}) is {what}, expected {expected}: "
        f"quantised weights that can't be read. {NEXT_STEP}"
    )
