"""Layers that compute with a matrix stored in fewer numbers than its own."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from splaser_plugin.weights.factored_format import TWO_FACTORS
from splaser_plugin.weights.gauge import Gauge, gauge, others_of

LOW_RANK = 32
"""A rank is low for a layer where its square is below that many times the outputs, or inputs, to be put in order: then
moving a token's numbers takes longer than the products it saves, on a processor (tests/benchmarks/factored.py)."""
MANY_TOKENS = 8
"""Tokens are many above that many times the rank, or above the rank in training, where moving them back takes longer:
then putting the weights in order for this one call takes less time."""


class FactoredLinear(nn.Linear):
    """A linear layer of low rank that doesn't hold its whole weight.

    in_features and out_features are those of the whole map, which is all that PEFT's LoRA needs.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        kind: type[nn.Module] = nn.Linear,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """kind: the class of the plain layer that it stands for, which `dense` makes again."""
        nn.Module.__init__(self)  # nn.Linear's own would make the whole weight
        self.in_features = in_features
        self.out_features = out_features
        self.kind = kind
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    @property
    @abstractmethod
    def form(self) -> str:
        """How it is stored, one of `splaser_plugin.weights.factored_format.FORMS`."""

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @abstractmethod
    def product(self) -> Tensor:
        """The whole weight, (outputs, inputs), rounded once to the layer's dtype."""

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """(outputs, rank) and (rank, inputs), whose product is the whole weight before it is rounded."""

    def dense(self) -> nn.Module:
        """The plain layer of the same map: its weight is `product`, its bias the same parameter."""
        from transformers.pytorch_utils import Conv1D

        values = self.product()
        if issubclass(self.kind, Conv1D):
            values = values.mT.contiguous()
        with torch.device("meta"):
            plain: Any = (
                self.kind(self.out_features, self.in_features)
                if issubclass(self.kind, Conv1D)
                else self.kind(self.in_features, self.out_features, bias=False)
            )
        plain.weight = nn.Parameter(values, requires_grad=self.weight.requires_grad)
        plain.bias = self.bias
        return plain.train(self.training)

    def joined(self, left: Tensor, right: Tensor) -> nn.Module:
        """The layer whose map is this one's plus left @ right, in the same dtype; a plain one at full rank.

        left: (outputs, ranks). right: (ranks, inputs). The ranks add up, so that nothing but rounding is lost.
        """
        own_left, own_right = (factor.double() for factor in self.factors())
        both = torch.cat([own_left, left.to(own_left)], dim=1), torch.cat([own_right, right.to(own_right)])
        if both[0].shape[1] < min(self.out_features, self.in_features):
            layer: Any = GaugeLinear.of(gauge(*both, self.weight.dtype), self.bias, self.kind)
            return layer.train(self.training)
        plain: Any = self.dense()
        change = (left.double() @ right.double()).to(plain.weight)
        plain.weight.data += change if isinstance(plain, nn.Linear) else change.mT
        return plain

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, stored as {self.form}"


class GaugeLinear(FactoredLinear):
    """A linear layer of rank r with r (inputs + outputs - r) weights, see `splaser_plugin.weights.gauge`.

    By rows it computes the pivot outputs R x, from those all others, L (R x), and puts them in their places; by
    columns it gathers the inputs into r sums, which the pivot columns take to the outputs. Either is r^2 products a
    token less than two plain factors.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, by_rows: bool, **options: Any) -> None:
        """options: those of `FactoredLinear`."""
        super().__init__(in_features, out_features, **options)
        self.by_rows = by_rows
        skeleton, interpolation, places = (
            ((rank, in_features), (out_features - rank, rank), out_features)
            if by_rows
            else ((out_features, rank), (rank, in_features - rank), in_features)
        )
        placed = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.weight = nn.Parameter(torch.empty(skeleton, **placed))
        self.interpolation = nn.Parameter(torch.empty(interpolation, **placed))
        self.order: Tensor
        """int32: by rows the place of each output among the pivots and the others, one after the other; by columns
        the inputs in that order."""
        self.register_buffer("order", torch.empty(places, device=options.get("device"), dtype=torch.int32))

    @classmethod
    def of(cls, matrix: Gauge, bias: nn.Parameter | None = None, kind: type[nn.Module] = nn.Linear) -> GaugeLinear:
        """The layer of this matrix (outputs, inputs), on its device and in its dtype, with the given bias itself."""
        outputs, inputs = matrix.shape
        layer = cls(inputs, outputs, matrix.rank, by_rows=matrix.by_rows, bias=False, kind=kind, device="meta")
        layer.weight = nn.Parameter(matrix.skeleton)
        layer.interpolation = nn.Parameter(matrix.interpolation)
        layer.register_parameter("bias", bias)
        layer.order = order_of(matrix)
        return layer

    @property
    def form(self) -> str:
        return "rows" if self.by_rows else "columns"

    @property
    def rank(self) -> int:
        return self.weight.shape[0 if self.by_rows else 1]

    @property
    def gauge(self) -> Gauge:
        """The matrix, without its bias: the layer's own tensors."""
        places = torch.argsort(self.order) if self.by_rows else self.order
        return Gauge(places[: self.rank].long(), self.weight.detach(), self.interpolation.detach(), self.by_rows)

    def product(self) -> Tensor:
        return self.gauge.product()

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.gauge.factors()

    def forward(self, input: Tensor) -> Tensor:
        weight, interpolation, order = self.weight, self.interpolation, self.order  # each look-up takes its time
        flat = input.reshape(-1, self.in_features)  # torch selects columns of a 2-D tensor ten times as fast
        rank = weight.shape[0 if self.by_rows else 1]
        many = rank if flat.requires_grad else MANY_TOKENS * rank
        if flat.shape[0] > many and rank**2 < LOW_RANK * len(order):
            left, right = self._ordered()
            outputs = functional.linear(functional.linear(flat, right), left, self.bias)
        elif self.by_rows:
            pivots = functional.linear(flat, weight)
            others = functional.linear(pivots, interpolation)
            outputs = torch.cat((pivots, others), 1).index_select(1, order)
            outputs = outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)
        else:
            ordered = flat.index_select(1, order)
            sums = torch.addmm(ordered[:, :rank], ordered[:, rank:], interpolation.mT)
            outputs = functional.linear(sums, weight, self.bias)
        return outputs.reshape(*input.shape[:-1], self.out_features)

    def _ordered(self) -> tuple[Tensor, Tensor]:
        """Two plain factors: at a low rank it is less to order them than many tokens."""
        identity = torch.eye(self.rank, device=self.weight.device, dtype=self.weight.dtype)
        if self.by_rows:
            return torch.cat([identity, self.interpolation]).index_select(0, self.order), self.weight
        columns = torch.cat([identity, self.interpolation], dim=1)
        return self.weight, columns.index_select(1, torch.argsort(self.order))


class TwoFactorLinear(FactoredLinear):
    """A linear layer whose weight is weight @ right_factor, as splaser 0.1 stored them: r (inputs + outputs) weights.

    weight: (out_features, rank). right_factor: (rank, in_features).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, **options: Any) -> None:
        """options: those of `FactoredLinear`."""
        super().__init__(in_features, out_features, **options)
        placed = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.weight = nn.Parameter(torch.empty(out_features, rank, **placed))
        self.right_factor = nn.Parameter(torch.empty(rank, in_features, **placed))

    @property
    def form(self) -> str:
        return TWO_FACTORS

    @property
    def rank(self) -> int:
        return self.right_factor.shape[0]

    @torch.no_grad()
    def product(self) -> Tensor:
        """Multiplied in float64, where products of bfloat16 and float16 numbers are exact."""
        device = torch.device("cpu") if self.weight.device.type == "mps" else self.weight.device
        left, right = (factor.to(device).double() for factor in self.factors())
        return (left @ right).to(self.weight)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.weight.detach(), self.right_factor.detach()

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(functional.linear(input, self.right_factor), self.weight, self.bias)


def order_of(matrix: Gauge) -> Tensor:
    """The buffer of a `GaugeLinear` that says which rows or columns the pivots are: int32."""
    size = matrix.shape[0 if matrix.by_rows else 1]
    places = torch.cat([matrix.pivots, others_of(matrix.pivots, size)])
    return (torch.argsort(places) if matrix.by_rows else places).int()
