"""Registers the factored format with transformers, without importing it: `import splaser_plugin` stays light.

If transformers' table of quantization methods is loaded already, the method is added to it at once; if not, as soon as
something loads it. So it doesn't matter which of the two a program imports first.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLE = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register the method now, or when transformers' table of methods is loaded."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from splaser_plugin.weights.quantizer import register

    register()


class _Finder(MetaPathFinder):
    """Finds the table where every other finder does, and wraps its loader; steps aside then."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> object:
        """What else the loader has: the source code, for tracebacks."""
        return getattr(self._loader, name)
