"""What each weight matrix of a model is multiplied by, and the gradient of what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from splaser_plugin.errors import ModelError
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.matrices import Matrix


@dataclass(frozen=True)
class Product:
    """One product y = W x with a matrix, with at least one token."""

    inputs: Tensor
    """(tokens, inputs)."""
    outputs: Tensor | None
    """(tokens, outputs). None where there are no fewer than inputs, a bias is in them, or the model wrote over them."""
    input_gradients: Tensor
    """(tokens, inputs): what goes back through this product alone."""
    output_gradients: Tensor
    """(tokens, outputs)."""
    columns_are_inputs: bool
    """Whether the matrix's columns, as it is stored, are the inputs."""


See = Callable[[Matrix, Product], None]
"""Called in the backward pass."""

_Argument = tuple[int, str]
"""Its place and its name."""
_BY_ROWS_OF_OUTPUTS: dict[Any, tuple[_Argument, ...]] = {functional.linear: ((0, "input"), (1, "weight"), (2, "bias"))}
_BY_ROWS_OF_INPUTS: dict[Any, tuple[_Argument, ...]] = {
    torch.matmul: ((0, "input"), (1, "other")),
    torch.Tensor.matmul: ((0, "self"), (1, "other")),
    torch.Tensor.__matmul__: ((0, "self"), (1, "other")),
    torch.mm: ((0, "input"), (1, "mat2")),
    torch.Tensor.mm: ((0, "self"), (1, "mat2")),
    torch.bmm: ((0, "input"), (1, "mat2")),
    torch.Tensor.bmm: ((0, "self"), (1, "mat2")),
    torch.addmm: ((1, "mat1"), (2, "mat2"), (0, "input")),
    torch.Tensor.addmm: ((1, "mat1"), (2, "mat2"), (0, "self")),
}
"""Functions that multiply by a weight, to the inputs, the weight and any bias among their arguments."""


class _Products(TorchFunctionMode):
    """Tells of each product with one of the matrices: those of `torch.nn.functional.linear`, matmul and their like.

    A weight is known by its address, so that a linear layer, a Conv1D, the layer inside PEFT's and an expert's slice
    of a fused parameter are all found in the same way.
    """

    def __init__(self, weights: Weights, matrices: Sequence[Matrix], see: See) -> None:
        super().__init__()
        self._see = see
        self._at: dict[int, list[tuple[Matrix, Tensor]]] = {}
        for matrix in matrices:
            stored = matrix.view(weights.parameters[matrix.parameter].detach())
            self._at.setdefault(stored.data_ptr(), []).append((matrix, stored))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        by_rows_of_outputs = func in _BY_ROWS_OF_OUTPUTS
        arguments = _BY_ROWS_OF_OUTPUTS.get(func) or _BY_ROWS_OF_INPUTS.get(func)
        if arguments is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        inputs, weight, *biases = (args[place] if place < len(args) else kwargs.get(name) for place, name in arguments)
        if not (isinstance(inputs, Tensor) and isinstance(weight, Tensor)):
            return func(*args, **kwargs)
        slices: list[tuple[Tensor, Tensor, Any]] = [(weight, inputs, ...)]
        if weight.ndim == 3 and inputs.ndim == 3:
            slices = [(weight[place], inputs[place], place) for place in range(len(weight))]
        seen = [
            (*found, read := _flat(part.detach()), read._version, place)
            for piece, part, place in slices
            if part.numel() and (found := self._find(piece))
        ]
        if not seen:
            return func(*args, **kwargs)
        # A view for this product alone, whose gradient is then its own; and there is one where nothing before it has.
        mine = inputs.view_as(inputs) if inputs.requires_grad else inputs.detach().requires_grad_().view_as(inputs)
        place, name = arguments[0]
        if place < len(args):
            args = (*args[:place], mine, *args[place + 1 :])
        else:
            kwargs = {**kwargs, name: mine}
        outputs = func(*args, **kwargs)
        is_biased = any(bias is not None for bias in biases)
        kept = outputs.detach() if outputs.shape[-1] < inputs.shape[-1] and not is_biased else None
        kept_version = outputs._version
        output_gradients: list[Tensor] = []

        def see(input_gradients: Tensor) -> None:
            untouched = kept if kept is not None and kept._version == kept_version else None
            gradients = output_gradients.pop()
            for matrix, as_stored, read, version, place in seen:
                if read._version != version:
                    raise ModelError(
                        f"{matrix.name}: the model writes over its inputs after it has read them, so they can't be "
                        "measured. Exclude it, or use --reduce svd."
                    )
                product = Product(
                    read,
                    None if untouched is None else _flat(untouched[place]),
                    _flat(input_gradients[place]),
                    _flat(gradients[place]),
                    by_rows_of_outputs == as_stored,
                )
                self._see(matrix, product)

        outputs.register_hook(output_gradients.append)
        mine.register_hook(see)
        return outputs

    def _find(self, weight: Tensor) -> tuple[Matrix, bool] | None:
        """Which matrix that is, and whether its rows are the weight's rows."""
        for matrix, stored in self._at.get(weight.data_ptr(), ()) if weight.ndim == 2 else ():
            if weight.shape == stored.shape and weight.stride() == stored.stride():
                return matrix, True
            if weight.mT.shape == stored.shape and weight.mT.stride() == stored.stride():
                return matrix, False
        return None


def _flat(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


@contextmanager
def watching(weights: Weights, matrices: Sequence[Matrix], see: See) -> Iterator[None]:
    """Inside, a forward and a backward pass of the model tell of every product with one of the matrices.

    No parameter gets a gradient, and the backward pass goes only as deep as the first of the matrices. Fused experts
    are computed one after the other meanwhile. All is afterwards as before.

    Raises:
        ModelError: From the backward pass, when a product's inputs were changed in place after it.
    """
    before = [(parameter, parameter.requires_grad) for parameter in weights.model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        with one_expert_at_a_time(weights.model), torch.enable_grad(), _Products(weights, matrices, see):
            yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@contextmanager
def one_expert_at_a_time(model: nn.Module) -> Iterator[None]:
    """Inside, transformers' fused experts are a loop over slices of their parameters."""
    configs: dict[int, Any] = {
        id(config): config for module in model.modules() if _switchable(config := getattr(module, "config", None))
    }
    before = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, was in before:
            config._experts_implementation = was


def _switchable(config: Any) -> bool:
    return getattr(config, "_experts_implementation", None) is not None
