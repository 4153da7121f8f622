"""PEFT: the `LoraConfig` that adapts exactly the chosen matrices, and merging into factored layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from splaser_plugin.errors import ModelError
from splaser_plugin.integrations.configs.adapter import adapter_config
from splaser_plugin.scanning.selection import Selection

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


def lora_config(
    selection: Selection,
    *,
    rank: int = 32,
    alpha: int | None = None,
    dropout: float = 0.0,
    rank_pattern: bool = False,
    **options: Any,
) -> LoraConfig:
    """A `peft.LoraConfig` whose targets are the full names of the chosen matrices, and of stacks of experts.

    Args:
        selection: The chosen matrices.
        rank: Of each adapter; see `selection.matched_rank` for one that keeps the number of parameters.
        alpha: Twice the rank by default.
        dropout: Share of each adapter's inputs, 0 to 1, that is set to zero in training.
        rank_pattern: Give each matrix a rank in proportion to its rank above the edge instead, see `rank_patterns`.
        **options: Other arguments of `LoraConfig`.

    Returns:
        What `peft.get_peft_model` and trainers take.

    Raises:
        MatrixError: A chosen matrix can't have an adapter, or PEFT would adapt others than the chosen ones of the
            scanned model (checked where that is on this machine; elsewhere names that PEFT may take for experts are
            refused).
        RankError: A rank is out of range.
        ConfigError: There is dropout with experts.
    """
    from peft import LoraConfig

    from splaser_plugin.integrations.check import check_adapters, empty_model_of, named_for_peft

    empty = empty_model_of(selection.model)
    selection = named_for_peft(selection, empty)
    values = adapter_config(selection, rank=rank, alpha=alpha, dropout=dropout, rank_pattern=rank_pattern)
    # known by the class, and set by PEFT from the model itself
    del values["peft_type"], values["base_model_name_or_path"]
    values.update(options)
    check_adapters(selection, selection.model, empty, **values)
    return LoraConfig(**values)


def adapted_modules(model: nn.Module) -> list[str]:
    """Names, in the base model, of what has a LoRA adapter, in the model's order: modules, and stacks of experts."""
    from peft import PeftModel

    from splaser_plugin.integrations.check import adapted_layers

    return list(adapted_layers(model.get_base_model() if isinstance(model, PeftModel) else model))


def merge_and_unload(model: Any) -> Any:
    """PEFT's own `merge_and_unload`, for a model of `splaser_plugin.load` too, whose layers stay factored.

    Where W = left right, W + s B A is `[left, s B] [right; A]`: the ranks add up. A layer whose rank would be full
    becomes a plain one.

    Args:
        model: A `peft.PeftModel`.

    Returns:
        The base model.

    Raises:
        ModelError: When a factored layer has an adapter other than plain LoRA.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from splaser_plugin.weights.factored import settle
    from splaser_plugin.weights.factored_layers import FactoredLinear

    base = model.get_base_model()
    for name, adapted in list(base.named_modules()):
        if isinstance(adapted, BaseTunerLayer) and isinstance(adapted.get_base_layer(), FactoredLinear):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, _merged(adapted, name))
    merged = model.merge_and_unload()
    settle(merged)
    return merged


def _merged(adapted: Any, name: str) -> nn.Module:
    """The layer of one factored layer and its adapters."""
    import torch
    from peft.tuners.lora import LoraLayer

    is_lora = isinstance(adapted, LoraLayer)
    if not is_lora or adapted.lora_variant or any(adapted.lora_bias.values()):
        raise ModelError(
            f"{name} has an adapter that is no plain LoRA ({type(adapted).__name__}), which can't join its factors. "
            "Call splaser_plugin.expand(model) first, then PEFT's merge_and_unload."
        )
    active = [active_adapter for active_adapter in adapted.active_adapters if active_adapter in adapted.scaling]
    left = [adapted.lora_B[adapter].weight.detach() * adapted.scaling[adapter] for adapter in active]
    right = [adapted.lora_A[adapter].weight.detach() for adapter in active]
    layer: Any = adapted.get_base_layer()
    return layer.joined(torch.cat(left, dim=1), torch.cat(right)) if active else layer
