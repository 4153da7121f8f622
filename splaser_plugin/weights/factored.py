"""Matrices as two thin factors, layers that compute with them, and plain layers back.

A matrix of n rows and m columns and rank r takes r (n + m) numbers as factors, fewer than its own n m where r is
below n m / (n + m). Only whole weights of linear layers are kept that way. An expert's matrix is a slice of
a fused parameter, and an embedding is looked up by rows, so neither has a layer that could be two; a tied weight
is never reduced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from splaser_plugin.spectra import spectrum
from splaser_plugin.weights.matrices import Matrix

CONFIG_KEY = "splaser_factored"
"""In config.json: module name to rank, for each factored layer."""


@dataclass(frozen=True)
class Factors:
    """A linear map as left @ right, in the model's dtype."""

    left: Tensor
    """(outputs, rank)"""
    right: Tensor
    """(rank, inputs)"""

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    @torch.no_grad()
    def product(self) -> Tensor:
        """(outputs, inputs), multiplied in float64 and rounded once to the factors' dtype.

        Products of bfloat16 and float16 numbers are exact there, so that the order in which a device adds
        them hardly ever shows.
        """
        place = torch.device("cpu") if self.left.device.type == "mps" else self.left.device
        product = self.left.to(place).double() @ self.right.to(place).double()
        return product.to(self.left.dtype).to(self.left.device)


def factorize(weight: Tensor, rank: int) -> Factors:
    """The best approximation of a weight (outputs, inputs) by a matrix of that rank, as factors in its dtype.

    Raises RankError and SpectrumError as `spectrum.truncate` does.
    """
    return balanced(*spectrum.factors(weight, rank), weight.dtype)


def balanced(left: Tensor, right: Tensor, dtype: torch.dtype) -> Factors:
    """left (outputs, rank) and right (rank, inputs) in that dtype, with the same product.

    Each factor takes the square roots of the singular values, so that rounding and float16's range cost both
    the same.
    """
    lengths = left.norm(dim=0) * right.norm(dim=1)
    left = left * _ratio(lengths.sqrt(), left.norm(dim=0))
    right = right * _ratio(lengths.sqrt(), right.norm(dim=1))[:, None]
    return Factors(left.to(dtype).contiguous(), right.to(dtype).contiguous())


def _ratio(wanted: Tensor, got: Tensor) -> Tensor:
    return torch.where(got > 0, wanted / got, torch.zeros_like(got))


def is_smaller(shape: tuple[int, int], rank: int) -> bool:
    """Whether two factors of that rank hold fewer numbers than the matrix: below n m / (n + m)."""
    rows, columns = shape
    return rank * (rows + columns) < rows * columns


def is_factorable(model: nn.Module, matrix: Matrix, rank: int) -> bool:
    """Whether the matrix, at that rank, takes less room as factors, and is the whole weight of a linear layer."""
    return is_smaller(matrix.shape, rank) and is_layer(model, matrix)


def is_layer(model: nn.Module, matrix: Matrix) -> bool:
    """Whether the matrix is the whole weight of a linear layer that the model calls, and that is saved as it is."""
    from transformers.pytorch_utils import Conv1D

    if matrix.expert is not None:
        return False
    module, _, attribute = matrix.parameter.rpartition(".")
    is_linear = attribute == "weight" and type(model.get_submodule(module)) in (nn.Linear, Conv1D)
    return is_linear and module in _called(model) and not _is_converted(model, matrix.parameter)


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

    layers = {name: each for name, each in model.named_modules() if isinstance(each, (nn.Linear, Conv1D))}
    called: set[str] = set()
    hooks = [each.register_forward_hook(lambda *_, name=name: called.add(name)) for name, each in layers.items()]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        ids = torch.zeros((1, 2), dtype=torch.long, device=next(model.parameters()).device)
        model(input_ids=ids, use_cache=False)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
        return frozenset(layers)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return frozenset(called)


def _is_converted(model: Any, parameter: str) -> bool:
    """Whether transformers joins or cuts the parameter when it saves the model, which factors can't be."""
    if not hasattr(model, "base_model_prefix"):
        return False
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    converters = [each.reverse_transform() for each in conversions if isinstance(each, WeightConverter)]
    return any(each.rename_source_key(parameter)[1] is not None for each in converters)


class FactoredLinear(nn.Linear):
    """A linear layer whose weight is weight @ right_factor: y = (x right_factor') weight' + bias.

    weight: (out_features, rank). right_factor: (rank, in_features). in_features and out_features are those of
    the whole map, which is all that PEFT's LoRA needs. from_conv1d: it stands for a transformers' Conv1D.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        from_conv1d: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make the whole weight
        self.in_features = in_features
        self.out_features = out_features
        self.from_conv1d = from_conv1d
        self.weight = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.right_factor = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    @property
    def factors(self) -> Factors:
        return Factors(self.weight.detach(), self.right_factor.detach())

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(functional.linear(input, self.right_factor), self.weight, self.bias)

    def joined(self, left: Tensor, right: Tensor) -> FactoredLinear:
        """The layer whose map is this one's plus left @ right: their ranks add up, and nothing is approximated."""
        rank = self.right_factor.shape[0] + right.shape[0]
        layer = FactoredLinear(
            self.in_features, self.out_features, rank, bias=False, from_conv1d=self.from_conv1d, device="meta"
        )
        factors = self.factors
        layer.weight = nn.Parameter(torch.cat([factors.left, left.to(factors.left.dtype)], dim=1))
        layer.right_factor = nn.Parameter(torch.cat([factors.right, right.to(factors.right.dtype)]))
        layer.bias = self.bias
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.right_factor.shape[0]}"


def as_stored(values: Tensor, matrix: Matrix) -> Tensor:
    """A linear map (outputs, inputs) as the matrix's parameter has it, or the other way round."""
    return values.mT if matrix.transposed else values


def expand(model: Any) -> Any:
    """Turn every factored layer of a loaded model into a dense one, in place, under PEFT too. Returns the model."""
    for module in list(model.modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, FactoredLinear):
                setattr(module, child, dense_layer(layer))
    list_layers(model)
    return model


def list_layers(model: Any) -> None:
    """Write the names and ranks of the model's factored layers into its configuration, for `save_pretrained`."""
    ranks = {name: each.factors.rank for name, each in model.named_modules() if isinstance(each, FactoredLinear)}
    if ranks:
        setattr(model.config, CONFIG_KEY, ranks)
    elif hasattr(model.config, CONFIG_KEY):
        delattr(model.config, CONFIG_KEY)


def dense_layer(layer: FactoredLinear) -> nn.Module:
    """The plain layer of the same map: its weight is the factors' product, its bias the same parameter."""
    from transformers.pytorch_utils import Conv1D

    values = layer.factors.product()
    with torch.device("meta"):
        dense: Any = (
            Conv1D(layer.out_features, layer.in_features)
            if layer.from_conv1d
            else nn.Linear(layer.in_features, layer.out_features, bias=False)
        )
    values = values.mT.contiguous() if layer.from_conv1d else values
    dense.weight = nn.Parameter(values, requires_grad=layer.weight.requires_grad)
    dense.bias = layer.bias
    return dense.train(layer.training)
