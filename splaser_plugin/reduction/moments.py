"""Statistics of what each weight matrix is for: what it reads, and how much the model's predictions hang on its output.

For y = W x: C = E[x x'] over the tokens that reach the matrix, and G = the sum over those tokens of g g', divided by
the number of predictions, with g the gradient of the summed losses with respect to y. The labels are drawn from the
model's own predictions, so that G is the Fisher information and has nothing to do with how well the model predicts.
A truncation needs no more of them than two squares of the matrix's short side: the moments on that side, and the
weight weighed by those of the other, W' G W or W C W'. Those are what is added up, from W' g and from W x, which the
model computes anyway.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from splaser_plugin.checkpoints.naming import without_expert_numbers
from splaser_plugin.distributed import add_up, gather, my_part
from splaser_plugin.errors import ModelError
from splaser_plugin.generation.evaluation import evaluating
from splaser_plugin.generation.teacher_forcing import forced_logits
from splaser_plugin.progress import SILENT, Advance, Progress
from splaser_plugin.reduction.calibration import Row
from splaser_plugin.reduction.products import Product, watching
from splaser_plugin.spectra.spectrum import exact_products
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.matrices import Matrix, Skipped

GROUP_BYTES = 2**31
"""Most memory for the sums of the matrices that share a pass over the rows."""
OUTLIER = 10.0
"""A token whose inputs have a mean square above that many times the row's median is scaled down to it: what is written
at an attention sink would rule the moments of all others. Gradients are left as they are: bounding them costs more."""
STRIP = 192
"""Columns of a sum that are added to at once."""


@dataclass(frozen=True)
class Moments:
    """Of one matrix W, its short side being its columns (read W' where they aren't), in float32 on the model's device.

    Normalised so that 1/2 tr(dW' G dW C) is in nats a prediction.
    """

    short: Tensor
    """Second moments on the short side, (short, short): C or G."""
    gram: Tensor
    """W' M W for the second moments M on the long side, (short, short)."""
    long_mean: float
    """Mean of M's diagonal."""
    short_noise: float
    """Squared error, in the Frobenius norm, that is expected of `short` since it is a mean over so few tokens; infinite
    for a single one."""
    gram_noise: float
    """The same of `gram`."""
    short_is_inputs: bool
    """Whether the short side are the inputs, so that `short` is C and M is G, or the other way round."""
    tokens: int
    """How many tokens reached the matrix."""
    reads: str
    """The same for all matrices that read the very same inputs: the name of one of them."""

    def why_unweighed(self, *, with_gradients: bool) -> str:
        """Why they predict no cost at any rank; empty where they do. with_gradients: whether G weighs, too."""
        of_short = float(self.short.diagonal().sum())
        of_inputs, of_gradients = (of_short, self.long_mean) if self.short_is_inputs else (self.long_mean, of_short)
        if not of_inputs:
            return "the calibration rows give it nothing but zeros to read"
        if with_gradients and not of_gradients:
            return "no prediction of the calibration rows hangs on it"
        return ""


def measure(
    weights: Weights,
    matrices: Sequence[Matrix],
    rows: Sequence[Row],
    *,
    samples: int = 1,
    seed: int = 0,
    group_bytes: int = GROUP_BYTES,
    progress: Progress = SILENT,
) -> Iterator[tuple[Matrix, Moments | Skipped]]:
    """Measure the moments of each matrix on the rows.

    Memory beside the model and one row's activations: two squares of the short side in float32 for each matrix of a
    group, at most `group_bytes` together (but at least one matrix), and those that the caller keeps. Each group takes a
    pass over the rows. A block's matrices stay in one group where they fit, and those that read the same inputs share
    their moments. Rows go one at a time, so nothing is padded. Several processes share the rows, and all get the same
    numbers.

    Args:
        weights: The model's, dense; under LoRA adapters the merged weights are what is measured.
        matrices: Which of them.
        rows: Token ids, each no longer than the model's context.
        samples: Labels drawn for each prediction, with one backward pass each.
        seed: Of the labels.
        group_bytes: See above.
        progress: Told of each row of each group.

    Yields:
        Every matrix, in their order, with its moments; or with the reason why it has none: no token reached it, or
        the model multiplies by it in a way that can't be followed.

    Raises:
        ModelError: The model is sharded over processes, computes inf or nan on a row, or writes over what it reads.
    """
    check_measurable(weights)
    groups = _groups(matrices, group_bytes)
    with progress.phase("statistics", len(groups) * len(my_part(rows))) as advance:
        for group in groups:
            yield from _measure(weights, group, rows, samples, seed, advance)


def _measure(
    weights: Weights, group: Sequence[Matrix], rows: Sequence[Row], samples: int, seed: int, advance: Advance
) -> Iterator[tuple[Matrix, Moments | Skipped]]:
    """The moments of matrices that share a pass. A function of its own, so that its sums are gone before the next."""
    sums = _add_up(weights, group, rows, samples, seed, advance)
    predictions = samples * sum(row.predictions for row in rows)
    for of_one in sums.values():
        of_one.normalise(predictions, samples)
    for matrix in group:
        mine = sums[matrix.name]
        yield matrix, mine.moments(sums.get(mine.counts.short_of, mine))


def check_measurable(weights: Weights) -> None:
    """Raises ModelError for a model of which no process has whole matrices and gradients, all on devices."""
    if weights.is_sharded:
        raise ModelError(
            "the statistics of a reduction need whole matrices and gradients, and this model is sharded over "
            "processes. Use --reduce svd, or run splaser on the saved model."
        )
    if weights.is_offloaded:
        raise ModelError(
            "the statistics of a reduction need gradients, and offloaded weights have none. Use --reduce svd, or "
            "devices that have room for the whole model."
        )


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label for each prediction, as likely as the model holds it to be.

    Args:
        logits: (predictions, vocabulary).
        generator: On the CPU, so that every device draws alike.

    Returns:
        (predictions,) int64.
    """
    likelihood = logits.detach().float().softmax(-1).cumsum(-1)
    uniform = torch.rand(len(logits), 1, generator=generator).to(logits.device) * likelihood[:, -1:]
    return torch.searchsorted(likelihood, uniform, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


def _groups(matrices: Sequence[Matrix], group_bytes: int) -> list[list[Matrix]]:
    groups: list[list[Matrix]] = []
    room = 0
    for _, block in itertools.groupby(matrices, key=lambda matrix: matrix.block):
        together = list(block)
        whole = sum(map(_bytes, together))
        if whole <= group_bytes and whole > room:
            groups.append([])
            room = group_bytes
        for matrix in together:
            if not groups or _bytes(matrix) > room:
                groups.append([])
                room = group_bytes
            groups[-1].append(matrix)
            room -= _bytes(matrix)
    return groups


def _bytes(matrix: Matrix) -> int:
    return 8 * min(matrix.shape) ** 2


class _Sums:
    """What is added up for one matrix."""

    def __init__(self, weights: Weights, matrix: Matrix) -> None:
        self._weights = weights
        self._matrix = matrix
        self._upright = matrix.shape[0] >= matrix.shape[1]
        parameter = weights.parameters[matrix.parameter]
        self._is_adapted = weights.effective(matrix.parameter).data_ptr() != parameter.data_ptr()
        short, device = min(matrix.shape), parameter.device
        self.short = torch.zeros(short, short, device=device)
        self.gram = torch.zeros(short, short, device=device)
        self.short_noise = self.gram_noise = 0.0
        self.counts = _Counts()

    def add_inputs(self, product: Product, readers: Sequence[_Sums]) -> None:
        """What a product reads. readers: those that were given the same inputs before, in this pass."""
        counts = self.counts
        counts.tokens += len(product.inputs)
        counts.short_is_inputs = self._upright == product.columns_are_inputs
        counts.reads = self._agreed(counts.reads, next(iter(readers), self))
        if counts.short_is_inputs:
            owner = next((reader for reader in readers if reader.counts.short_is_inputs), self)
            counts.short_of = self._agreed(counts.short_of, owner)
            if owner is not self:
                return
        inputs = product.inputs.float()
        scales = _bounds(inputs)
        if counts.short_is_inputs:
            counts.short_fourth += _add(self.short, inputs * scales)
        else:
            counts.long_trace += float((inputs * scales).square().sum())
            counts.gram_fourth += _add(self.gram, self._carried(inputs, product.outputs) * scales)

    def _agreed(self, before: str, now: _Sums) -> str:
        if before not in ("", now._matrix.name):
            raise ModelError(
                f"{self._matrix.name} reads the same as {before} in some calibration rows and not in others, so its "
                "statistics can't be measured. Exclude it, or use --reduce svd."
            )
        return now._matrix.name

    def add_gradients(self, product: Product) -> None:
        """What comes back through a product."""
        counts, gradients = self.counts, product.output_gradients.float()
        if counts.short_is_inputs:
            counts.long_trace += float(gradients.square().sum())
            counts.gram_fourth += _add(self.gram, self._carried(gradients, product.input_gradients))
        else:
            counts.short_fourth += _add(self.short, gradients)

    def _carried(self, values: Tensor, computed: Tensor | None) -> Tensor:
        """Values of the long side, (tokens, long), times the weight. computed: what the model has got there."""
        if computed is not None and not self._is_adapted:
            return computed.float()
        with exact_products(values.device, torch.float32):
            weight = self._weights.read(self._matrix).float()
            return values @ (weight if self._upright else weight.mT)

    def normalise(self, predictions: int, samples: int) -> None:
        """Turn sums into means over tokens, where they are of inputs, and over predictions, where of gradients."""
        tokens = max(1, self.counts.tokens)
        (of_short, short_count), (of_long, long_count) = (tokens, tokens), (predictions, tokens * samples)
        if not self.counts.short_is_inputs:
            (of_short, short_count), (of_long, long_count) = (of_long, long_count), (of_short, short_count)
        for total in (self.short, self.gram):
            total.triu_().add_(total.triu(1).mT)
        self.short_noise = _noise(self.short, self.counts.short_fourth, short_count) / of_short**2
        self.gram_noise = _noise(self.gram, self.counts.gram_fourth, long_count) / of_long**2
        self.short /= of_short
        self.gram /= of_long
        self.counts.long_trace /= of_long

    def moments(self, owner: _Sums) -> Moments | Skipped:
        """Once normalised. owner: the one whose sums on the short side are its own, too."""
        if not self.counts.tokens:
            return Skipped(self._matrix.name, self._why_unseen())
        return Moments(
            owner.short,
            self.gram,
            self.counts.long_trace / max(self._matrix.shape),
            owner.short_noise,
            self.gram_noise,
            self.counts.short_is_inputs,
            self.counts.tokens,
            self.counts.reads,
        )

    def _why_unseen(self) -> str:
        segments = self._matrix.name.split(".")
        if self._matrix.expert is not None or without_expert_numbers(segments) != segments:
            return "no calibration token was routed to this expert"
        return "the model never multiplies by this matrix as it is, so what it reads isn't known"


@dataclass
class _Counts:
    tokens: int = 0
    long_trace: float = 0.0
    short_fourth: float = 0.0
    """Sum over tokens of |v|^4, of the vectors v that `short` is the sum of v v' of."""
    gram_fourth: float = 0.0
    short_is_inputs: bool = True
    reads: str = ""
    """Name of the first matrix that was given the same inputs."""
    short_of: str = ""
    """Name of the first of those that adds up their moments; "" for a matrix whose short side are the outputs."""

    def add(self, other: _Counts) -> None:
        if other.tokens:
            self.tokens += other.tokens
            self.long_trace += other.long_trace
            self.short_fourth += other.short_fourth
            self.gram_fourth += other.gram_fourth
            self.short_is_inputs = other.short_is_inputs
            self.reads, self.short_of = other.reads, other.short_of


def _add(total: Tensor, values: Tensor) -> float:
    """Add the sum over tokens of v v' to the upper triangle of `total`. Returns the sum of |v|^4.

    In strips, so that little more than that triangle is computed. values: (tokens, size).
    """
    with exact_products(total.device, torch.float32):
        for start in range(0, len(total), STRIP):
            total[start : start + STRIP, start:].addmm_(values[:, start : start + STRIP].mT, values[:, start:])
    return float(values.square().sum(1).square().sum())


def _noise(total: Tensor, fourth: float, tokens: int) -> float:
    """Squared error expected of a sum of v v' over tokens that were drawn independently. fourth: the sum of |v|^4.

    It is estimated from how they differ, without bias; infinite for a single token, which says nothing of it.
    """
    if tokens < 2:
        return math.inf
    return max(0.0, fourth - float(total.square().sum()) / tokens) * tokens / (tokens - 1)


def _bounds(values: Tensor) -> Tensor:
    """What to scale each token by so that it is no outlier, see OUTLIER: (tokens, 1). values: (tokens, size)."""
    squares = values.square().sum(1, keepdim=True)
    present = squares[squares > 0]
    if len(present) == 0:
        return torch.ones_like(squares)
    limit = OUTLIER * present.median()
    return (limit / squares.clamp(min=limit)).sqrt()


def _add_up(
    weights: Weights, group: Sequence[Matrix], rows: Sequence[Row], samples: int, seed: int, advance: Advance
) -> dict[str, _Sums]:
    """The sums of each matrix, by its name, over all rows of all processes."""
    sums = {matrix.name: _Sums(weights, matrix) for matrix in group}
    readers: dict[Any, list[_Sums]] = {}
    inputs_are_new = True

    def see(matrix: Matrix, product: Product) -> None:
        mine, inputs = sums[matrix.name], product.inputs
        if inputs_are_new:
            same = readers.setdefault((inputs.data_ptr(), inputs.shape, inputs.stride()), [])
            mine.add_inputs(product, same)
            same.append(mine)
        mine.add_gradients(product)

    def add_up_mine() -> list[list[_Counts]]:
        nonlocal inputs_are_new
        with watching(weights, group, see), evaluating(weights.model):
            for place in my_part(range(len(rows))):
                logits = _predict(weights.model, rows[place])
                generator = torch.Generator().manual_seed(seed + place)
                for sample in range(samples):
                    inputs_are_new = sample == 0
                    loss = functional.cross_entropy(logits, draw(logits, generator), reduction="sum")
                    if loss.requires_grad:  # not where no token reaches a matrix of this group
                        loss.backward(retain_graph=sample + 1 < samples)
                readers.clear()
                advance(1)
        return [[sum.counts for sum in sums.values()]]

    counts = gather(add_up_mine)
    for place, (name, moments) in enumerate(sums.items()):
        add_up(moments.short)
        add_up(moments.gram)
        moments.counts = _Counts()
        for process in counts:
            moments.counts.add(process[place])
        if not (torch.isfinite(moments.short).all() and torch.isfinite(moments.gram).all()):
            raise ModelError(
                f"{name} reads or gets inf or nan in the calibration rows: the model can't be reduced by what it "
                "computes. Load it in float32 or bfloat16, or use --reduce svd."
            )
    return sums


def _predict(model: torch.nn.Module, row: Row) -> Tensor:
    """Logits of the row's predictions, (predictions, vocabulary), float32."""
    asked, said = row.tokens[: row.first + 1], row.tokens[row.first + 1 :]
    return forced_logits(model, [asked], [(*said, 0)])[0].float()
