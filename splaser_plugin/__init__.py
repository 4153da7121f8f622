"""Find the weight matrices worth training, and reduce the noisy ones where that makes answers better."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splaser_plugin.artifacts.recipe import Recipe as Recipe
    from splaser_plugin.config.stages import ApplyConfig as ApplyConfig
    from splaser_plugin.config.stages import CompareConfig as CompareConfig
    from splaser_plugin.config.stages import LaserConfig as LaserConfig
    from splaser_plugin.config.stages import ScanConfig as ScanConfig
    from splaser_plugin.config.stages import SelectConfig as SelectConfig
    from splaser_plugin.data.limits import TokenLimits as TokenLimits
    from splaser_plugin.data.pairs import PairSet as PairSet
    from splaser_plugin.data.pairs import load_pairs as load_pairs
    from splaser_plugin.errors import SplaserError as SplaserError
    from splaser_plugin.integrations.freeze import FreezeCallback as FreezeCallback
    from splaser_plugin.integrations.freeze import freeze_all_but as freeze_all_but
    from splaser_plugin.integrations.peft import lora_config as lora_config
    from splaser_plugin.integrations.peft import merge_and_unload as merge_and_unload
    from splaser_plugin.integrations.trainer import LaserCallback as LaserCallback
    from splaser_plugin.jobs.apply import ApplyResult as ApplyResult
    from splaser_plugin.jobs.apply import apply as apply
    from splaser_plugin.jobs.compare import Comparison as Comparison
    from splaser_plugin.jobs.compare import compare as compare
    from splaser_plugin.jobs.expand import expand as expand
    from splaser_plugin.jobs.importance import importances as importances
    from splaser_plugin.jobs.laser import laser as laser
    from splaser_plugin.jobs.result import LaserResult as LaserResult
    from splaser_plugin.progress import Bars as Bars
    from splaser_plugin.progress import Progress as Progress
    from splaser_plugin.scanning.agreement import Agreement as Agreement
    from splaser_plugin.scanning.agreement import agreements as agreements
    from splaser_plugin.scanning.records import Scan as Scan
    from splaser_plugin.scanning.scan import scan as scan
    from splaser_plugin.scanning.selection import Selection as Selection
    from splaser_plugin.scanning.selection import choose as choose
    from splaser_plugin.scanning.spectrum_format import load_scan as load_scan
    from splaser_plugin.weights.factored_folder import load as load

from splaser_plugin.weights.registration import register_with_transformers

__version__ = "0.1.0"

_HOMES = {
    "Agreement": "scanning.agreement",
    "ApplyConfig": "config.stages",
    "ApplyResult": "jobs.apply",
    "Bars": "progress",
    "CompareConfig": "config.stages",
    "Comparison": "jobs.compare",
    "FreezeCallback": "integrations.freeze",
    "LaserCallback": "integrations.trainer",
    "LaserConfig": "config.stages",
    "LaserResult": "jobs.result",
    "PairSet": "data.pairs",
    "Progress": "progress",
    "Recipe": "artifacts.recipe",
    "Scan": "scanning.records",
    "ScanConfig": "config.stages",
    "SelectConfig": "config.stages",
    "Selection": "scanning.selection",
    "SplaserError": "errors",
    "TokenLimits": "data.limits",
    "agreements": "scanning.agreement",
    "apply": "jobs.apply",
    "choose": "scanning.selection",
    "compare": "jobs.compare",
    "expand": "jobs.expand",
    "freeze_all_but": "integrations.freeze",
    "importances": "jobs.importance",
    "laser": "jobs.laser",
    "load": "weights.factored_folder",
    "load_pairs": "data.pairs",
    "load_scan": "scanning.spectrum_format",
    "lora_config": "integrations.peft",
    "merge_and_unload": "integrations.peft",
    "scan": "scanning.scan",
}

__all__ = ["__version__", *_HOMES]

register_with_transformers()


def __getattr__(name: str) -> Any:
    """Import what is asked for, and only that: `import splaser_plugin` itself loads nothing heavy."""
    if name not in _HOMES:
        raise AttributeError(f"module 'splaser_plugin' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
