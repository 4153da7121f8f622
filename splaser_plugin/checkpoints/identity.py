"""Which weights a scan or a recipe was made of: one digest, the same on disk and in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

SAMPLED_VALUES = 2048


def sampled_places(count: int) -> Tensor:
    """Which of a parameter's `count` values stand for it: the 2048 in the middle, or all of fewer.

    They lie together, so that they are one read from disk, and of a stack of experts in one or two of them.
    """
    size = min(count, SAMPLED_VALUES)
    start = (count - size) // 2
    return torch.arange(start, start + size)


def identity_of(parameters: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> str:
    """sha256 (hex) over the names and shapes of all parameters and some values of each.

    The values tell two fine-tunes of one architecture apart; reading all of them would take as long as a scan. The
    dtype isn't part of it: weights that were only stored in a wider one are the same.

    Args:
        parameters: Name, shape, and the values at `sampled_places`, of each parameter; tied ones under every name.
    """
    digests: dict[str, bytes] = {}
    for name, shape, values in parameters:
        described = f"{name} {tuple(shape)}\n".encode()
        digests[name] = hashlib.sha256(described + values.double().cpu().numpy().tobytes()).digest()
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()
