"""The device that was asked for."""

from __future__ import annotations

import torch

from splaser_plugin.distributed import best_device
from splaser_plugin.errors import ConfigError
from splaser_plugin.files.text import first_line_of


def pick_device(name: str) -> torch.device:
    """`auto`, or a device by its torch name. Raises ConfigError when there is no such device here."""
    if name == "auto":
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: not usable here ({first_line_of(error)}). Try --device cpu.") from error
    return device
