"""The weights of a model under LoRA adapters, as it computes with them: W + BA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from splaser_plugin.checkpoints.roles import plain_name
from splaser_plugin.errors import ModelError
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.matrices import Matrix


def weights_of(model: Any) -> Weights:
    """The weights of a model as it computes with them, adapted or not. Raises ModelError as the two kinds do."""
    return MergedWeights(model) if hasattr(model, "peft_config") else Weights(model)


class MergedWeights(Weights):
    """Reads W + BA, and writes W so that W + BA is what was asked for; the adapters stay as they are.

    model: a `peft.PeftModel`. Raises ModelError for adapters other than plain LoRA.
    """

    def __init__(self, model: Any) -> None:
        from peft.tuners.lora import LoraLayer
        from peft.tuners.tuners_utils import BaseTunerLayer

        super().__init__(model.get_base_model())
        if self.is_sharded:
            raise ModelError(
                f"{type(self.model).__name__} has adapters and is sharded over processes, which can't be lasered in "
                "place. Save the adapter, and run splaser laser with `--adapter DIR` on the base model."
            )
        self._layers: dict[str, Any] = {}
        for name, module in self.model.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            if not isinstance(module, LoraLayer) or module.lora_variant or any(module.lora_bias.values()):
                raise ModelError(
                    f"{name} has an adapter that is no plain LoRA ({type(module).__name__}), which can't be lasered in "
                    "place. Merge the adapter, save the model, and run splaser laser on it."
                )
            if not module.merged:
                self._layers[f"{name}.weight"] = module

    def effective(self, name: str) -> Tensor:
        weight = super().effective(name)
        return weight + self._delta(name) if name in self._layers else weight

    @torch.no_grad()
    def write(self, matrix: Matrix, values: Tensor) -> None:
        if matrix.parameter in self._layers:
            values = values - matrix.view(self._delta(matrix.parameter))
        super().write(matrix, values)

    def keep_factors(self) -> None:
        raise ModelError(
            "the model has adapters, so its matrices can't be kept as factors. Use --save dense, or merge the adapter "
            "and run splaser laser on the saved model."
        )

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        named = ((plain_name(name), each) for name, each in self.model.state_dict().items())
        state = {name: each for name, each in named if name is not None}
        return {name: self.effective(name) if name in self._layers else each for name, each in state.items()}

    def _delta(self, name: str) -> Tensor:
        layer = self._layers[name]
        deltas = [layer.get_delta_weight(adapter) for adapter in layer.active_adapters if adapter in layer.scaling]
        return torch.stack(deltas).sum(0).to(layer.weight.dtype)
