"""The model inside what accelerate, torch and trainers wrap around it."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrapped(model: nn.Module) -> Any:
    """The model without the wrapping of DDP, DataParallel, DeepSpeed's engine or a compiler.

    Its parameters are the same, so whoever computes with the wrapped model goes on with the changed weights.
    """
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)
