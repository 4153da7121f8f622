"""What each parameter of a model is, by the module that holds it: a weight matrix, a stack of them, or neither."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

ROUTER = re.compile(r"Router|TopK\w*Gat|MoE?Gate")
"""In the class names of what sends tokens to experts."""
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_layer")
HEADS = frozenset({"lm_head", "embed_out", "head", "shared_head"})
OF_NO_LAYER = "a parameter that is no linear layer's weight"


@dataclass(frozen=True)
class Role:
    """One parameter of a model."""

    name: str
    """As in the state dict of the base model: without what PEFT puts into it."""
    shape: tuple[int, ...]
    parameter: Any
    """The same object for all names of a tied one."""
    reason: str | None
    """Why it is no matrix; None where it is one, or several."""
    experts: int | None = None
    """How many matrices are stacked in it, one an expert; None for a matrix of its own."""
    transposed: bool = False
    """Stored as (inputs, outputs), the other way round from a linear layer."""
    by_name: bool = False
    """Whether it may be had all the same by naming it: an embedding, a norm."""
    tower: str = ""
    """The part of a composite model it stands in: `vision_tower`; empty for the language model."""


def roles(model: nn.Module) -> list[Role]:
    """The role of every parameter, tied ones under each of their names, in the model's order."""
    tower_of = towers(model)
    found = []
    for path, module in model.named_modules(remove_duplicate=False):
        for last, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = plain_name(f"{path}.{last}" if path else last)
            if name is not None:
                role = _role(model, path, module, last, parameter)
                same = tied_parameter(model, name, parameter)
                found.append(Role(name, shape_of(parameter), same, *role, tower=tower_of(name)))
    return found


def tied_parameter(model: Any, name: str, parameter: Any) -> Any:
    """The parameter itself; of an offloaded one that is tied the one it is tied to.

    accelerate's hooks leave each module an empty parameter of its own, so that identity doesn't tell any more.
    """
    source = (getattr(model, "all_tied_weights_keys", None) or {}).get(name)
    if source is None or not parameter.is_meta or not hasattr(model, "_hf_hook"):
        return parameter
    return model.get_parameter(source)


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The parameter's shape, also while DeepSpeed keeps it in parts."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def plain_name(name: str) -> str | None:
    """What the base model calls a weight that PEFT has wrapped; None for what belongs to an adapter."""
    segments = name.split(".")
    if "original_module" in segments or any(segment.startswith(("lora_", "ranknum")) for segment in segments):
        return None
    if "modules_to_save" in segments:
        place = segments.index("modules_to_save")
        del segments[place : place + 2]
    return ".".join(segment for segment in segments if segment != "base_layer")


def _role(
    model: nn.Module, path: str, module: nn.Module, last: str, parameter: Any
) -> tuple[str | None, int | None, bool, bool]:
    """(reason, experts, transposed, by_name) of one parameter."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd
    from transformers.pytorch_utils import Conv1D

    kind, shape = type(module).__name__, shape_of(parameter)
    if last.endswith("bias"):
        return "a bias", None, False, False
    if 0 in shape:
        return "empty", None, False, False
    if isinstance(module, nn.Embedding):
        return ("an embedding" if len(shape) == 2 else f"{len(shape)}-D"), None, False, len(shape) == 2
    if isinstance(module, _ConvNd):
        return "a convolution", None, False, False
    if is_router(model, path):
        return "a router", None, False, False
    if len(shape) == 1:
        return "a vector (norm or scale)", None, False, True
    if isinstance(module, (nn.Linear, Conv1D)) and last == "weight" and len(shape) == 2:
        is_head = path.rpartition(".")[2] in HEADS
        return "a head" if is_head else None, None, isinstance(module, Conv1D), is_head
    count = _stacked(module, path, kind, shape)
    if count:
        return None, count, False, False
    if len(shape) == 3:
        return "3-D, and no stack of experts", None, False, False
    if len(shape) != 2:
        return f"{len(shape)}-D", None, False, False
    return ("a norm" if "Norm" in kind else OF_NO_LAYER), None, False, False


def has_adapters(model: Any) -> bool:
    """Whether PEFT wraps the model or layers of it. PEFT 0.18 leaves its configuration on a model that it unloaded."""
    if not hasattr(model, "peft_config"):
        return False
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules())


def is_router(model: nn.Module, path: str) -> bool:
    """Whether the module sends tokens to experts, or is a part of what does."""
    segments = path.split(".") if path else []
    module: Any = model
    for segment in segments:
        parent, module = module, getattr(module, segment)
        if ROUTER.search(type(module).__name__) or segment == "router":
            return True
    if not segments:
        return False
    weight = getattr(module, "weight", None)
    is_beside_experts = any("experts" in name for name, _ in parent.named_children())
    count = 0 if weight is None else shape_of(weight)[0]
    return is_beside_experts and segments[-1] == "gate" and count > 1


def _stacked(module: nn.Module, path: str, kind: str, shape: tuple[int, ...]) -> int | None:
    """How many experts' matrices lie in this parameter; None where it is no stack of them."""
    if len(shape) == 3:
        is_stack = "Expert" in kind or "experts" in path.split(".") or kind.endswith("Linear")
        return shape[0] if is_stack else None
    count = next((value for name in EXPERT_COUNTS if isinstance(value := getattr(module, name, None), int)), 0)
    return count if "Expert" in kind and count > 1 and shape[0] % count == 0 else None


def towers(model: nn.Module) -> Any:
    """The function from a parameter's name to the tower that it stands in, empty for the language model."""
    inside = language_model(model)
    foreign = dict(_foreign(model)) if inside is None else {}

    def tower_of(name: str) -> str:
        if inside is None:
            return next((label for path, label in foreign.items() if name.startswith(f"{path}.")), "")
        segments, place = name.split("."), 0
        if name.startswith(f"{inside}.") or (segments[-2:-1] and segments[-2] in HEADS):
            return ""
        for mine, other in zip(segments[:-2], inside.split("."), strict=False):
            if mine != other:
                break
            place += 1
        return segments[place]

    return tower_of


def language_model(model: Any) -> str | None:
    """Where the language model is in a composite model: `model.language_model`; None where it is all of it."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
        return None
    text = config.get_text_config(decoder=True)
    if text is config:
        return None
    for path, module in model.named_modules():
        if path and getattr(module, "config", None) is text and _has_blocks(module):
            return plain_name(path)
    for path, module in model.named_modules():
        mine = getattr(getattr(module, "config", None), "model_type", None)
        if path and mine is not None and mine == text.model_type and _has_blocks(module):
            return plain_name(path)
    return None


def _has_blocks(module: nn.Module) -> bool:
    from torch import nn

    return any(isinstance(inner, nn.ModuleList) for inner in module.modules())


def _foreign(model: Any) -> Iterator[tuple[str, str]]:
    """Path and label of models inside the model with configurations of their own, as an image tokenizer has one.

    There are none where nothing with blocks would be left beside them.
    """
    from torch import nn

    config = getattr(model, "config", None)
    found = [
        path
        for path, module in model.named_modules()
        if path and hasattr(module, "base_model_prefix") and type(module.config) is not type(config)
    ]
    outer = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    is_left = any(
        isinstance(module, nn.ModuleList) and not any(f"{path}.".startswith(f"{other}.") for other in outer)
        for path, module in model.named_modules()
    )
    if is_left and not getattr(config, "is_encoder_decoder", False):
        yield from ((path, path.rpartition(".")[2]) for path in outer)
