"""Which matrices of a model can be stored as factors, and factored models turned into plain ones.

A matrix of rank r, below the full one, takes r (n + m - r) numbers (see `splaser_plugin.weights.gauge`) instead of
n m. What is stored so is the whole weight of a linear layer, or one expert's matrix where transformers' interface of
experts lets the module compute with layers. An embedding is looked up by rows, so it stays whole, and a tied weight
is never reduced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from splaser_plugin.distributed import input_device
from splaser_plugin.errors import CheckpointError, nearest
from splaser_plugin.files.text import shown
from splaser_plugin.weights.factored_experts import EACH, FactoredExperts, can_be_split, stacks_of
from splaser_plugin.weights.factored_format import TWO_FACTORS, Stored, written
from splaser_plugin.weights.factored_layers import FactoredLinear, GaugeLinear, TwoFactorLinear
from splaser_plugin.weights.matrices import Matrix

_Model = TypeVar("_Model", bound=nn.Module)


def is_smaller(shape: tuple[int, int], rank: int) -> bool:
    """Whether a matrix of that rank is stored in fewer numbers than its own: at every rank below full."""
    return rank < min(shape)


def is_factorable(model: nn.Module, matrix: Matrix) -> bool:
    """Whether the matrix can be stored as factors once its rank is below full."""
    module_name, _, attribute = matrix.parameter.rpartition(".")
    module: Any = model.get_submodule(module_name)
    if matrix.expert is not None:
        is_split = can_be_split(module) and attribute in stacks_of(module)
        return is_split and _is_saved_as(model, f"{layer_name(matrix)}.weight", f".{EACH}{attribute}.")
    is_layer = attribute == "weight" and _is_layer(module)
    return is_layer and module_name in _called(model) and _is_saved_as(model, matrix.parameter, "")


def layer_name(matrix: Matrix) -> str:
    """The name of the module that has this matrix in a factored model."""
    if matrix.expert is None:
        return matrix.name
    experts, _, stack = matrix.parameter.rpartition(".")
    return f"{experts}.{EACH}{stack}.{matrix.expert}"


def is_transposed(model: nn.Module, matrix: Matrix) -> bool:
    """Whether a factorable matrix is stored as (inputs, outputs)."""
    if matrix.expert is None:
        return matrix.transposed
    experts: Any = model.get_submodule(matrix.parameter.rpartition(".")[0])
    return bool(experts.is_transposed)


def install(model: Any, layers: Mapping[str, Stored], where: str) -> None:
    """Put empty factored layers in the places of the plain ones of a model whose weights aren't loaded yet.

    Args:
        model: On the meta device.
        layers: By the names of the modules they are to be.
        where: What the errors begin with: the file that lists the layers.

    Raises:
        CheckpointError: The model has no such layer, or none of that rank, or its weight is tied.
    """
    for name in list(layers):
        experts = name.rpartition(f".{EACH}")[0]
        module = dict(model.named_modules()).get(experts) if experts else None
        if module is not None and not isinstance(module, FactoredExperts) and can_be_split(module):
            _put(model, experts, FactoredExperts(module))
    known: dict[str, Any] = {name: module for name, module in model.named_modules() if _is_layer(module)}
    tied = getattr(model, "all_tied_weights_keys", {})
    tied = {*tied, *tied.values()}
    for name, stored in layers.items():
        if name not in known:
            raise CheckpointError(f"{where}: {shown(name)} is no linear layer of this model; {nearest(name, known)}.")
        if f"{name}.weight" in tied:
            raise CheckpointError(
                f"{where}: {name} shares its weight with another layer, so it can't be factored. Save the model again."
            )
        _put(model, name, _empty(known[name], stored, f"{where}: {name}"))


def expand(model: _Model) -> _Model:
    """Turn every factored layer of a loaded model into a plain one, in place, under PEFT too.

    Args:
        model: A model of `splaser_plugin.load`, or one that has adapters on it. Experts that have adapters are put
            back into their stacks only once those are merged: call it again then.

    Returns:
        The model.
    """
    for name, layer in factored_layers(model).items():
        _put(model, name, layer.dense())
    settle(model)
    return model


def factored_layers(model: nn.Module) -> dict[str, FactoredLinear]:
    """The model's factored layers by their names."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, FactoredLinear)}


def settle(model: Any) -> None:
    """After its layers were changed: make experts whole of which none is factored, and bring the configuration, which
    `save_pretrained` writes, up to date.
    """
    from splaser_plugin.weights.factored_config import FactoredConfig

    for name, module in list(model.named_modules()):
        if isinstance(module, FactoredExperts) and module.is_plain:
            _put(model, name, module.dense())
            for owner in model.modules():  # those that loading used know no stacks; saving finds the model's own
                owner.__dict__.pop("_weight_conversions", None)
    layers = {name: Stored(layer.form, layer.rank) for name, layer in factored_layers(model).items()}
    if layers:
        model.config.quantization_config = FactoredConfig(written(layers))
    elif isinstance(getattr(model.config, "quantization_config", None), FactoredConfig):
        del model.config.quantization_config


def _called(model: nn.Module) -> frozenset[str]:
    """Names of the linear layers that one forward pass calls: Mamba's mixer reads the weight of its `dt_proj` instead.

    All of them where the model can't be run on two tokens alone.
    """
    if model not in _CALLED:
        _CALLED[model] = _called_anew(model)
    return _CALLED[model]


_CALLED: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


@torch.no_grad()
def _called_anew(model: Any) -> frozenset[str]:
    from transformers.pytorch_utils import Conv1D

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D))}
    called: set[str] = set()
    hooks = [layer.register_forward_hook(lambda *_, name=name: called.add(name)) for name, layer in layers.items()]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        ids = torch.zeros((1, 2), dtype=torch.long, device=input_device(model))
        model(input_ids=ids, use_cache=False)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
        return frozenset(layers)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return frozenset(called)


def _is_saved_as(model: Any, parameter: str, part: str) -> bool:
    """Whether transformers saves the parameter as one tensor, with `part` in its name as it is here.

    What it joins or cuts can't be factors, nor could layers be found again by a name that its patterns caught.
    """
    if not hasattr(model, "base_model_prefix"):
        return True
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    reverse = [conversion.reverse_transform() for conversion in reversed(conversions)]
    name = parameter
    for conversion in reverse:
        if isinstance(conversion, WeightConverter) and conversion.rename_source_key(parameter)[1] is not None:
            return False
        name = conversion.rename_source_key(name)[0]
    return part in name


def _is_layer(module: nn.Module) -> bool:
    """Whether it is a plain linear layer whose forward pass is y = W x + b, and nothing else."""
    from transformers.pytorch_utils import Conv1D

    kind: Any = type(module)
    if not issubclass(kind, (nn.Linear, Conv1D)) or issubclass(kind, FactoredLinear):
        return False
    return kind.forward in (nn.Linear.forward, Conv1D.forward) or kind.__name__ == "FalconLinear"


def _empty(layer: Any, stored: Stored, where: str) -> FactoredLinear:
    """A factored layer in the place of this one."""
    from transformers.pytorch_utils import Conv1D

    rows, columns = layer.weight.shape
    most = min(rows, columns) - (stored.form != TWO_FACTORS)
    if stored.rank > most:
        raise CheckpointError(f"{where}: rank {stored.rank}, but its shape ({rows}, {columns}) allows at most {most}.")
    inputs, outputs = (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)
    options: dict[str, Any] = {
        "bias": layer.bias is not None,
        "kind": type(layer),
        "device": layer.weight.device,
        "dtype": layer.weight.dtype,
    }
    if stored.form == TWO_FACTORS:
        return TwoFactorLinear(inputs, outputs, stored.rank, **options)
    return GaugeLinear(inputs, outputs, stored.rank, by_rows=stored.form == "rows", **options)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
