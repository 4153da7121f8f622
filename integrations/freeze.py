"""Full fine-tuning of some matrices of a loaded model, the rest frozen."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from splaser_plugin.checkpoints.roles import has_adapters
from splaser_plugin.errors import MatrixError, ModelError, nearest
from splaser_plugin.weights.matrices import module_name

WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer"})


class FreezeCallback(TrainerCallback):
    """Freezes all but the named matrices when the trainer is made, before its optimizer is.

    Args:
        names: Of modules and stacks of experts, as `Selection.names` gives them.

    Raises:
        MatrixError: The model lacks one of them.
        ModelError: The model has adapters.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = list(names)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **rest: Any
    ) -> None:
        freeze_all_but(model, self.names)


def freeze_all_but(model: nn.Module, names: Collection[str]) -> None:
    """Let only the weights of these modules, and these stacks of experts, be trained.

    Args:
        model: A loaded model; its parameters' `requires_grad` is set.
        names: Modules and stacks, as `Selection.names` gives them.

    Returns:
        Nothing.

    Raises:
        MatrixError: When the model lacks one of them.
        ModelError: When it has adapters: they would be frozen.
    """
    check_without_adapters(model)
    parameters = {_plain(name): parameter for name, parameter in model.named_parameters()}
    wanted = {f"{name}.weight" if f"{name}.weight" in parameters else name for name in names}
    missing = sorted(wanted - parameters.keys())
    if missing:
        modules = [name.removesuffix(".weight") for name in parameters]
        raise MatrixError(
            f"{len(missing)} of {len(names)} chosen matrices aren't in this model: {missing[0]}; "
            f"{nearest(missing[0], modules)}. Use the scan of the model that is trained."
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in wanted)


def check_without_adapters(model: nn.Module) -> None:
    """Raise ModelError for a model with adapters, of which freezing would train the base."""
    if has_adapters(model):
        raise ModelError(
            "freezing is for full fine-tuning, and this model has adapters. Give PEFT the LoraConfig of "
            "splaser_plugin.lora_config instead."
        )


def head_of(model: Any) -> list[nn.Parameter]:
    """What a task adds to a base model, as a classifier's head: not trained yet. Nothing of a language model."""
    base = getattr(model, "base_model", model)
    if base is model or model.get_output_embeddings() is not None:
        return []
    of_base = {id(parameter) for parameter in base.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in of_base]


def check_trained(model: nn.Module, names: Collection[str]) -> None:
    """Make sure that the named matrices are trained, whole or by LoRA, and nothing else.

    Raises ModelError that names what is trained beside them, or what of them is not.
    """
    trained = {
        module_name(_plain(_adapted_by(model, name)))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    wanted = set(names)
    for what, wrong in (("isn't trained", wanted - trained), ("is trained, too", trained - wanted)):
        if wrong:
            raise ModelError(
                f"{min(wrong)} {what}, as {len(wrong)} in all: expected exactly the {len(wanted)} chosen matrices. "
                "Look for other options that freeze or train weights."
            )


def _adapted_by(model: nn.Module, name: str) -> str:
    """The name of the parameter that an adapter's parameter changes; of another its own."""
    layer, is_adapter, _ = name.partition(".lora_")
    return f"{layer}.{getattr(model.get_submodule(layer), 'parameter_name', 'weight')}" if is_adapter else name


def _plain(name: str) -> str:
    """The parameter's name in the base model, without what PEFT and wrappers put into it."""
    segments = name.removeprefix("base_model.model.").split(".")
    return ".".join(segment for segment in segments if segment not in WRAPPERS)
