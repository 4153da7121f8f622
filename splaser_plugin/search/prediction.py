"""What a truncation of each matrix is predicted to do to the margin, from one backward pass for each of some pairs.

A weight W = sum sigma_i u_i v_i' without the components of a set D is W + dW, dW = -sum over D of sigma_i u_i v_i'.
First order: a pair's margin M changes by about <dM/dW, dW> = -sum over D of sigma_i u_i' (dM/dW) v_i. The mean over
some pairs says little of others where the pairs disagree; their standard error tells.
How far it reaches: the layer's output W x changes by dW x, whose mean square over the pairs' tokens is the sum over D
of the mean of (sigma_i v_i' x)^2, since the u_i are orthonormal.
Where the matrix is reduced by its statistics, see `splaser_plugin.reduction.truncation`, dW is that of its projection,
-sum over D of W b_i d_i' with the columns b_i of its basis and the rows d_i' of the dual one, and how far it reaches is
the cost of the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from splaser_plugin.distributed import gather, my_part
from splaser_plugin.errors import ModelError
from splaser_plugin.generation.evaluation import evaluating
from splaser_plugin.generation.teacher_forcing import forced_means
from splaser_plugin.progress import SILENT, Progress
from splaser_plugin.reduction.measured_reducer import MeasuredReducer
from splaser_plugin.scoring.margin import MarginScorer
from splaser_plugin.spectra.spectrum import components, exact_products
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.matrices import Matrix
from splaser_plugin.weights.zero import is_trained_by_deepspeed

_Sums: TypeAlias = tuple[np.ndarray, np.ndarray, float]
"""Of one matrix: slopes, squares, and the number of tokens."""

GROUP_BYTES = 2**30
"""Most memory for the singular vectors of the matrices that share a pass over the pairs."""
STANDARD_ERRORS = 2.0
"""How many of them a prediction stays below the mean: few of all samples of pairs put the mean that far too high."""
OUTPUT_WEIGHT = 0.1
"""Nats a token that a prediction takes off where the layer's whole output is lost: chosen on one half of the
truncations of `tests/benchmarks/ranking.py`, and judged on the other."""
DIVERGENCE_WEIGHT = 1.0
"""What a prediction takes off for each nat a token that a reduction by statistics is to cost, in the margin's own unit:
1 wasn't fitted."""


@dataclass(frozen=True)
class Sensitivity:
    """What each singular component of one matrix does, largest singular value first."""

    slopes: np.ndarray
    """sigma_i u_i' (dM/dW) v_i for the margin M of each pair: (pairs, short), in nats a token."""
    energies: np.ndarray
    """Mean square of what the component adds to the layer's output: (short,), in the output's unit squared."""
    divergences: np.ndarray | None = None
    """How far each rank from 0 to the full one is expected to move the model's predictions: (short + 1,), in nats a
    token; None where that wasn't measured."""

    def changes(self, rank: int) -> np.ndarray:
        """First-order change of each pair's margin, in nats a token, when only `rank` components stay: (pairs,)."""
        return -self.slopes[:, rank:].sum(1)

    def first_order(self, rank: int) -> float:
        """The mean of `changes`."""
        return float(self.changes(rank).mean())

    def standard_error(self, rank: int) -> float:
        """Of the mean of `changes`, for a pair that is drawn like these; 0 for a single pair, which tells nothing."""
        changes = self.changes(rank)
        return float(changes.std(ddof=1)) / math.sqrt(len(changes)) if len(changes) > 1 else 0.0

    def output_lost(self, rank: int) -> float:
        """Mean square of the output's change over that of the output, 0 to 1, when only `rank` components stay."""
        whole = float(self.energies.sum())
        return float(self.energies[rank:].sum()) / whole if whole else 0.0

    def predicted(self, rank: int) -> float:
        """What candidates are ordered by: a cautious guess at the mean margin's change, in nats a token.

        The first order, less two standard errors for the pairs not seen, less what the first order doesn't know of:
        the divergence, or else a tenth of the output lost.
        """
        doubt = STANDARD_ERRORS * self.standard_error(rank)
        if self.divergences is not None:
            return self.first_order(rank) - doubt - DIVERGENCE_WEIGHT * float(self.divergences[rank])
        return self.first_order(rank) - doubt - OUTPUT_WEIGHT * self.output_lost(rank)


def check_predictable(weights: Weights) -> None:
    """Raises ModelError for a model in which no process has a whole gradient."""
    if weights.is_sharded or is_trained_by_deepspeed(weights.model):
        raise ModelError(
            "--rank-by gradient needs whole gradients, and this model is sharded over processes or trained by "
            "DeepSpeed. Use --rank-by snr, or run splaser laser on the saved model."
        )
    if weights.is_offloaded:
        raise ModelError(
            "--rank-by gradient needs gradients, and offloaded weights have none. Use --rank-by snr, or devices that "
            "have room for the whole model."
        )


def sensitivities(
    weights: Weights,
    scorer: MarginScorer,
    matrices: Sequence[Matrix],
    *,
    reducer: MeasuredReducer | None = None,
    progress: Progress = SILENT,
) -> dict[Matrix, Sensitivity]:
    """Sensitivities of the scorer's mean margin to each component of each matrix.

    reducer: how each matrix is reduced; None for the plain singular value decomposition.

    Memory beside the model and one pair's activations: the gradient of one parameter at a time, which is consumed
    as soon as it is whole, and singular vectors (float32, short side squared; two such squares with a reducer) of as
    many matrices as fit into 1 GiB, at least one parameter's. More matrices take more passes over the pairs, each only
    as deep as its own matrices.
    Experts stacked in one parameter, and layers that don't see every token, have no known inputs: their energies
    are those of inputs that are alike in all directions, sigma_i^2.
    Gradients, requires_grad and training modes are afterwards as before. Under several processes each works on a
    part of the pairs, and all get the same numbers.
    Raises ModelError as `check_predictable` does.
    """
    check_predictable(weights)
    groups = _groups(matrices, 4 if reducer is None else 8)
    found: dict[Matrix, Sensitivity] = {}
    with progress.phase("gradients", len(groups) * len(my_part(range(scorer.size)))) as advance:
        for group in groups:
            found |= _measure(weights, scorer, [_Part(weights, matrix, reducer) for matrix in group], advance)
    return found


def _groups(matrices: Sequence[Matrix], entry_bytes: int) -> list[list[Matrix]]:
    """Matrices, as they follow each other, whose squares of the short side fit into memory together."""
    groups: list[list[Matrix]] = [[]]
    room = GROUP_BYTES
    for added in _by_parameter(matrices).values():
        needed = sum(entry_bytes * min(matrix.shape) ** 2 for matrix in added)
        if groups[-1] and needed > room:
            groups.append([])
            room = GROUP_BYTES
        groups[-1] += added
        room -= needed
    return groups


def _by_parameter(matrices: Iterable[Matrix]) -> dict[str, list[Matrix]]:
    found: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        found.setdefault(matrix.parameter, []).append(matrix)
    return found


class _Part:
    """One matrix's components, and what is found for each of them, one pair after the other."""

    def __init__(self, weights: Weights, matrix: Matrix, reducer: MeasuredReducer | None) -> None:
        self.matrix = matrix
        self._weights = weights
        self._costs = reducer.costs[matrix] if reducer else None
        self._is_in_nats = reducer is not None and reducer.is_in_nats
        projection = reducer.decomposition(matrix, weights.read(matrix)).projection if reducer else None
        if projection is None:
            self.values, self._basis = components(weights.read(matrix))
            self._dual = self._basis
        else:
            self._basis, self._dual = projection.basis, projection.dual.mT
            self.values = self._basis.new_zeros(len(self._basis))
        self.slopes: list[Tensor] = []
        self.squares = torch.zeros_like(self.values)
        self.tokens = torch.zeros((), device=self.values.device)

    @property
    def _upright(self) -> bool:
        return self.matrix.shape[0] >= self.matrix.shape[1]

    def begin_pair(self) -> None:
        self.slopes.append(torch.zeros_like(self.values))

    @torch.no_grad()
    def add_gradient(self, gradient: Tensor) -> None:
        """Add sigma_i u_i' G v_i, which is v_i' (W' G) v_i, or u_i' (G W') u_i where the rows are the short side; in a
        projection b_i' (W' G) d_i, or b_i' (G W') d_i.
        """
        gradient = self.matrix.view(gradient).to(self._basis.dtype)
        weight = self._weights.read(self.matrix).to(self._basis.dtype)
        with exact_products(gradient.device, gradient.dtype):
            product = weight.mT @ gradient if self._upright else gradient @ weight.mT
            self.slopes[-1] += ((product @ self._dual) * self._basis).sum(0)

    @torch.no_grad()
    def add_inputs(self, inputs: Tensor, mask: Tensor) -> None:
        """Add (sigma_i v_i' x)^2 over the tokens that are no padding, unless costs are known.

        inputs: (..., inputs). mask: 1 for a token.
        """
        if self._costs is not None:
            return
        rows = inputs.reshape(-1, inputs.shape[-1]).to(self._basis.dtype)
        if len(rows) != mask.numel():
            return
        inputs_are_short = self._upright != self.matrix.transposed
        with exact_products(rows.device, rows.dtype):
            if inputs_are_short:
                projected = (rows @ self._basis) * self.values
            else:
                weight = self._weights.read(self.matrix).to(self._basis.dtype)
                projected = (rows @ (weight if self.matrix.transposed else weight.mT)) @ self._basis
        mask = mask.to(rows.device)
        self.squares += (projected * mask.reshape(-1, 1)).square_().sum(0)
        self.tokens += mask.sum()

    def sums(self) -> _Sums:
        slopes = torch.stack(self.slopes) if self.slopes else self.values.new_empty(0, len(self.values))
        return slopes.cpu().numpy(), self.squares.cpu().numpy(), float(self.tokens)

    def sensitivity(self, sums: Sequence[_Sums]) -> Sensitivity:
        """From the sums of all processes, whose pairs come by turns."""
        slopes = np.empty((sum(len(mine) for mine, _, _ in sums), len(self.values)))
        for process, (mine, _, _) in enumerate(sums):
            slopes[process :: len(sums)] = mine
        if self._costs is not None:
            return Sensitivity(slopes, -2 * np.diff(self._costs), self._costs if self._is_in_nats else None)
        tokens = sum(seen for _, _, seen in sums)
        squares = np.stack([squared for _, squared, _ in sums]).astype(np.float64).sum(0)
        return Sensitivity(slopes, squares / tokens if tokens else self.values.double().cpu().numpy() ** 2)


def _measure(
    weights: Weights, scorer: MarginScorer, parts: Sequence[_Part], advance: Callable[[int], None]
) -> dict[Matrix, Sensitivity]:
    of_matrix = {part.matrix: part for part in parts}
    by_parameter = {name: [of_matrix[matrix] for matrix in same] for name, same in _by_parameter(of_matrix).items()}

    def add_up_mine() -> list[list[_Sums]]:
        with _gradients_given_to(weights, by_parameter), _inputs_given_to(weights, by_parameter):
            for item in my_part(range(scorer.size)):
                for part in parts:
                    part.begin_pair()
                _backward(weights.model, scorer.prompts[item], scorer.answers[item])
                advance(1)
        return [[part.sums() for part in parts]]

    sums = gather(add_up_mine)
    return {part.matrix: part.sensitivity([sum[place] for sum in sums]) for place, part in enumerate(parts)}


def _backward(model: Any, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> None:
    """The gradient of one pair's margin. answers: chosen, and rejected if there is one."""
    with torch.enable_grad(), evaluating(model):
        chosen, *rejected = forced_means(model, [prompt] * len(answers), answers)
        margin = chosen - sum(rejected)
        if margin.requires_grad:  # not where the answers are empty
            margin.backward()


@contextmanager
def _gradients_given_to(weights: Weights, parts: Mapping[str, Sequence[_Part]]) -> Iterator[None]:
    """Inside, only these parameters get gradients, and each one's is gone as soon as its parts have added it."""

    def consume(parameter: Tensor, takers: Sequence[_Part]) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            for part in takers:
                part.add_gradient(gradient)

    wanted = {id(weights.parameters[name]): takers for name, takers in parts.items()}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in weights.model.parameters()]
    with ExitStack() as undo:
        for parameter, requires_grad, gradient in before:
            undo.callback(setattr, parameter, "grad", gradient)
            undo.callback(parameter.requires_grad_, requires_grad)
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in wanted)
            if id(parameter) in wanted:
                takers = wanted[id(parameter)]
                handle = parameter.register_post_accumulate_grad_hook(
                    lambda ready, takers=takers: consume(ready, takers)
                )
                undo.callback(handle.remove)
        yield


@contextmanager
def _inputs_given_to(weights: Weights, parts: Mapping[str, Sequence[_Part]]) -> Iterator[None]:
    """Inside, the inputs of each linear layer that holds one of these parameters are given to its part."""
    from transformers.pytorch_utils import Conv1D

    holders = {
        id(module.weight): module for module in weights.model.modules() if isinstance(module, (nn.Linear, Conv1D))
    }
    mask = torch.ones(())

    def see_mask(model: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        nonlocal mask
        mask = keywords["attention_mask"]

    with ExitStack() as undo:
        undo.callback(weights.model.register_forward_pre_hook(see_mask, with_kwargs=True).remove)
        for name, (part, *others) in parts.items():
            holder = holders.get(id(weights.parameters[name]))
            if holder is not None and not others:
                handle = holder.register_forward_pre_hook(
                    lambda module, inputs, part=part: part.add_inputs(inputs[0].detach(), mask)
                )
                undo.callback(handle.remove)
        yield
