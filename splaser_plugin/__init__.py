"""Find the weight matrices worth training, and reduce the noisy ones where that makes answers better."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "CompareConfig": "splaser_plugin.config.stages",
    "LaserConfig": "splaser_plugin.config.stages",
    "ScanConfig": "splaser_plugin.config.stages",
    "SplaserError": "splaser_plugin.errors",
    "Scan": "splaser_plugin.scanning.scan",
    "laser": "splaser_plugin.jobs.laser",
    "run_scan": "splaser_plugin.scanning.scan",
    "apply_recipe": "splaser_plugin.jobs.apply",
    "compare_models": "splaser_plugin.jobs.compare",
    "load_pairs": "splaser_plugin.data.pairs",
    "load": "splaser_plugin.weights.factored_folder",
    "expand": "splaser_plugin.weights.factored",
    "LaserCallback": "splaser_plugin.integrations.trainer",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and only that: `import splaser_plugin` itself loads nothing heavy."""
    if name not in _HOMES:
        raise AttributeError(f"module 'splaser_plugin' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
