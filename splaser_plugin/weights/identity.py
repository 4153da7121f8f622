"""Which weights a scan or a recipe was made of: one digest, the same on disk and in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

SAMPLED_VALUES = 16


def sampled_places(count: int) -> Tensor:
    """Which of `count` values of a parameter stand for it: 16 places, evenly spaced from the first to the last."""
    return torch.linspace(0, max(0, count - 1), SAMPLED_VALUES, dtype=torch.float64).long()


def identity_of(parameters: Iterable[tuple[str, Sequence[object], Tensor]]) -> str:
    """sha256 (hex) over the names and shapes of all parameters and 16 values of each.

    The values tell two fine-tunes of one architecture apart; reading all of them would take as long as a scan. The
    dtype isn't part of it: weights that were only stored in a wider one are the same.

    Args:
        parameters: Name, what describes it (its shape), and the values at `sampled_places`, of each parameter; tied
            ones under every name.
    """
    digest = hashlib.sha256()
    for name, described, values in sorted(parameters, key=lambda parameter: parameter[0]):
        digest.update(f"{' '.join([name, *map(str, described)])}\n".encode())
        digest.update(values.double().cpu().numpy().tobytes())
    return digest.hexdigest()
