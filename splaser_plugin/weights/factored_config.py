"""What a factored model's configuration says to transformers: apart from `factored`, as it imports half of it."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from splaser_plugin.weights.factored_format import METHOD


class FactoredConfig(QuantizationConfigMixin):
    """How the layers of a model are stored: `quantization_config` of its config.json."""

    def __init__(self, layers: Any = None, quant_method: str = METHOD, **_: Any) -> None:
        """layers: as in config.json, checked only when a model is loaded with them."""
        self.quant_method: Any = quant_method
        self.layers = layers
