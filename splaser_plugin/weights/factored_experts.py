"""Experts of a mixture, of which each has its own layers, so that some or all of them can be factored."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

EACH = "each_"
"""Before a stack's name, that of the list of its layers. Without it transformers' own conversions of stacks, which go
by the name, would take the layers for one."""


class FactoredExperts(nn.Module):
    """What stands in the place of an experts module of transformers whose stacks are no longer one tensor each.

    It computes what that module does, an expert at a time, as its eager implementation. The biases stay stacked.
    """

    plain: Any
    """The experts module itself, on the meta device; no submodule, so that its weights are none of this one's."""

    def __init__(self, plain: nn.Module) -> None:
        """plain: the experts module, of which `can_be_split` is true. Its weights are left where they are.

        The layers are empty linear ones at first, on the meta device or where the stacks are.
        """
        super().__init__()
        self.__dict__["plain"] = copy.deepcopy(plain).to("meta")
        for name, stack in plain.named_parameters(recurse=False):
            if name not in stacks_of(plain):
                self.register_parameter(name, nn.Parameter(stack.detach()))
                continue
            rows, columns = stack.shape[1:]
            outputs, inputs = (columns, rows) if self.is_transposed else (rows, columns)
            with torch.device("meta"):
                layers = nn.ModuleList(nn.Linear(inputs, outputs, bias=False) for _ in range(len(stack)))
            self.add_module(EACH + name, layers.to(stack.dtype))

    @property
    def is_transposed(self) -> bool:
        """Whether the stacks hold the experts' matrices as (inputs, outputs)."""
        return bool(self.plain.is_transposed)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: (tokens, hidden). top_k_index, top_k_weights: (tokens, experts of each)."""
        plain = self.plain
        up, down = (getattr(self, EACH + name) for name in stacks_of(plain))
        result = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= len(up):  # the place of experts that another process computes
                continue
            token, choice = torch.where(top_k_index == expert)
            inner = self._with_bias(up, expert, hidden_states[token], stacks_of(plain)[0])
            inner = plain._apply_gate(inner) if plain.has_gate else plain.act_fn(inner)
            outer = self._with_bias(down, expert, inner, stacks_of(plain)[1])
            outer = outer * top_k_weights[token, choice, None]
            result.index_add_(0, token, outer.to(result.dtype))
        return result

    def _with_bias(self, layers: nn.ModuleList, expert: int, values: Tensor, stack: str) -> Tensor:
        values = layers[expert](values)
        return values + getattr(self, f"{stack}_bias")[expert] if self.plain.has_bias else values

    @property
    def is_plain(self) -> bool:
        """Whether all its layers are plain ones, so that `dense` can make the stacks again."""
        layers = (layer for name in stacks_of(self.plain) for layer in getattr(self, EACH + name))
        return all(type(layer) is nn.Linear for layer in layers)

    def dense(self) -> nn.Module:
        """The experts module itself, its stacks filled from plain layers."""
        plain = copy.deepcopy(self.plain)
        for name in list(plain._parameters):
            if name not in stacks_of(plain):
                plain.register_parameter(name, getattr(self, name))
                continue
            layers = getattr(self, EACH + name)
            weights = [layer.weight.detach().mT if self.is_transposed else layer.weight.detach() for layer in layers]
            needs_gradient = any(layer.weight.requires_grad for layer in layers)
            plain.register_parameter(name, nn.Parameter(torch.stack(weights), requires_grad=needs_gradient))
        return plain.train(self.training)


def can_be_split(module: Any) -> bool:
    """Whether it is an experts module whose forward pass follows transformers' interface of experts.

    Modules outside of it (as Llama 4's), and those that normalise after each expert, keep their stacks whole.
    """
    has_interface = all(hasattr(module, name) for name in ("_apply_gate", "has_gate", "has_bias", "is_transposed"))
    if not has_interface or getattr(module, "has_post_expert_norm", False):
        return False
    parameters = dict(module.named_parameters(recurse=False))
    expected = {*stacks_of(module), *(f"{name}_bias" for name in stacks_of(module) if module.has_bias)}
    return set(parameters) == expected and all(parameters[name].ndim == 3 for name in stacks_of(module))


def stacks_of(module: Any) -> tuple[str, str]:
    """Names of the parameters that hold the first and the second matrix of each expert."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
