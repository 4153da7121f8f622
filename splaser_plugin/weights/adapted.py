"""The weights of a model under LoRA adapters, as it computes with them: W + BA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call

from splaser_plugin.checkpoints.roles import has_adapters, plain_name
from splaser_plugin.distributed import is_main, reshard, whole
from splaser_plugin.errors import ModelError
from splaser_plugin.files.json import read_json
from splaser_plugin.weights.in_memory import Weights, gathered
from splaser_plugin.weights.matrices import Matrix
from splaser_plugin.weights.rest import Rest


def weights_of(model: Any, *, rest: Rest | None = None) -> Weights:
    """The weights of a model as it computes with them, adapted or not. Raises ModelError as the two kinds do."""
    return MergedWeights(model, rest=rest) if has_adapters(model) else Weights(model, rest=rest)


class MergedWeights(Weights):
    """Reads W + BA, and writes W so that W + BA is what was asked for; the adapters stay as they are.

    model: a `peft.PeftModel`. Raises ModelError for adapters other than plain LoRA, and for LoRA on a weight that
    another layer uses too.
    """

    def __init__(self, model: Any, *, rest: Rest | None = None) -> None:
        _check_kind(model)
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ModelError(
                f"{type(model.get_base_model()).__name__} has adapters and offloaded weights, which can't be changed "
                "together. Merge the adapter, save the model, and run splaser laser on it."
            )
        super().__init__(model.get_base_model(), root=model, rest=rest)
        self._layers: dict[str, Any] = {}
        for name, module in self.model.named_modules():
            if _is_adapted(module, name) and not module.merged:
                own = getattr(module, "parameter_name", "weight")
                self._layers[str(plain_name(f"{name}.{own}"))] = module
        sharers: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            sharers.setdefault(id(parameter), []).append(name)
        for name in self._layers:
            others = [other for other in sharers[id(self.parameters[name])] if other != name]
            if others:
                raise ModelError(
                    f"{name} has an adapter and is the same weight as {others[0]}, which has none, so that no whole "
                    "model can hold both. Leave it out of target_modules, or untie the two."
                )
        if isinstance(self._root, FSDPModule):
            with torch.no_grad():  # the first forward pass decides which module is FSDP's root: this one has to be
                model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(iter(self.parameters.values())).device))
            reshard(self.model)
            self._gather_root()

    def effective(self, name: str) -> Tensor:
        weight = super().effective(name)
        return weight + self._delta(name) if name in self._layers else weight

    @torch.no_grad()
    def write(self, matrix: Matrix, values: Tensor) -> None:
        if matrix.parameter in self._layers:
            values = values - matrix.view(self._delta(matrix.parameter))
        super().write(matrix, values)
        self._gather_root()

    def put_back(self, matrix: Matrix, held: Tensor) -> None:
        super().put_back(matrix, held)
        self._gather_root()

    def _gather_root(self) -> None:
        """Gather what of the base model is sharded as a part of the PeftModel, whose forward pass isn't called."""
        if isinstance(self._root, FSDPModule):
            self._root.unshard()

    def keep_factors(self) -> None:
        raise ModelError(
            "the model has adapters, so its matrices can't be kept as factors. Use --save dense, or merge the adapter "
            "and run splaser laser on the saved model."
        )

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """What a plain checkpoint of the merged model holds."""
        reshard(self._root)
        named = ((plain_name(name), tensor) for name, tensor in self.model.state_dict().items())
        state = {name: tensor for name, tensor in named if name is not None}
        state = {name: _for_saving(self, name) if name in self.parameters else tensor for name, tensor in state.items()}
        self._gather_root()
        return state

    def _delta(self, name: str) -> Tensor:
        """What the active adapters of one layer add to its weight, in the weight's shape and dtype."""
        layer = self._layers[name]
        deltas = [_delta_of(layer, adapter) for adapter in layer.active_adapters if adapter in layer.scaling]
        if not deltas:
            return torch.zeros_like(super().effective(name))
        return torch.stack(deltas).sum(0).to(self.parameters[name].dtype)


class BaseWeights(Weights):
    """The weights that adapters are trained on, without what the adapters have or replace.

    model: a `peft.PeftModel`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model.get_base_model(), root=model)
        named = ((_base_name(name), tensor) for name, tensor in self.model.named_parameters(remove_duplicate=False))
        self.parameters = {name: tensor for name, tensor in named if name is not None}

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """What a plain checkpoint of the base model holds."""
        reshard(self._root)
        named = ((_base_name(name), tensor) for name, tensor in self.model.state_dict().items())
        state = {name: tensor for name, tensor in named if name is not None}
        return {name: _for_saving(self, name) if name in self.parameters else tensor for name, tensor in state.items()}


def restore_base(model: Any, folder: Path) -> None:
    """Give the base model under adapters the matrices of a lasered base that `BaseWeights` was saved as.

    Raises ModelError when it isn't there, or its recipe is damaged.
    """
    file = folder / "recipe.json"
    if not file.is_file():
        raise ModelError(
            f"the adapter was trained on a lasered base, and {folder} isn't there any more. Put it back, or begin anew."
        )
    recipe = read_json(file, ModelError)
    try:
        settings, steps = dict(recipe["settings"]), {step["name"] for step in recipe["steps"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{file}: no recipe. Put the folder back as it was, or begin anew.") from error
    weights = BaseWeights(model)
    kind: Any = next(base for base in type(weights.model).__mro__ if not issubclass(base, FSDPModule))
    stored = kind.from_pretrained(folder, dtype=next(iter(weights.parameters.values())).dtype)
    chosen = settings.get("include", ()), settings.get("exclude", ()), settings.get("towers", False)
    matrices, _ = weights.matrices(*chosen)
    for matrix in matrices:
        if matrix.name in steps:
            device = weights.parameters[matrix.parameter].device
            weights.write(matrix, matrix.view(gathered(stored.get_parameter(matrix.parameter))).to(device))


def _for_saving(weights: Weights, name: str) -> Tensor:
    value = weights.effective(name)
    if not weights.is_sharded:
        return value
    return value.cpu() if is_main() else torch.empty(0)


def _base_name(name: str) -> str | None:
    """What a plain base model calls a weight that adapters are trained on; None for what is the adapters'."""
    segments = name.split(".")
    if "modules_to_save" in segments or any(segment.startswith(("lora_", "ranknum")) for segment in segments):
        return None
    return ".".join(segment for segment in segments if segment not in ("base_layer", "original_module"))


class _Delta(nn.Module):
    """A layer's `get_delta_weight` as a forward pass, so that `functional_call` can give it other weights."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, adapter: str) -> Tensor:
        delta: Tensor = self.layer.get_delta_weight(adapter)
        return delta


def _delta_of(layer: nn.Module, adapter: str) -> Tensor:
    adapters = {f"layer.{name}": tensor for name, tensor in layer.named_parameters() if name.startswith("lora_")}
    with whole(adapters.values()):
        values = {name: gathered(tensor) for name, tensor in adapters.items()}
        return functional_call(_Delta(layer), values, (adapter,))


def _check_kind(model: Any) -> None:
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ModelError(
            f"{type(model).__name__} got its adapter by add_adapter, so that what it computes can't be saved whole. "
            "Make the adapted model with peft.get_peft_model."
        )
    for name in model.active_adapters:
        config = model.peft_config[name]
        if config.is_prompt_learning:
            raise ModelError(
                f"the model has a trained prompt ({type(config).__name__}), which no weight holds: the lasered model "
                "would answer without it. Only LoRA can be lasered in place."
            )


def _is_adapted(module: nn.Module, name: str) -> bool:
    """Whether it has a LoRA adapter. Raises ModelError for an adapter of another kind."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(module, BaseTunerLayer):
        return False
    layer: Any = module
    if not isinstance(module, LoraLayer):
        raise _no_plain_lora(name, type(module).__module__.split(".")[-2])
    if layer.lora_variant:
        kind = type(next(iter(layer.lora_variant.values()))).__name__
        raise _no_plain_lora(name, kind.removesuffix("Variant").removesuffix("Linear"))
    if any(layer.lora_bias.values()):
        raise _no_plain_lora(name, "lora_bias")
    return True


def _no_plain_lora(name: str, kind: str) -> ModelError:
    return ModelError(
        f"{name} has an adapter that is no plain LoRA but {kind}, which can't be lasered in place. "
        "Merge the adapter, save the model, and run splaser laser on it."
    )
