"""The linear layer that computes with a matrix stored by its pivot rows or columns."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from splaser_plugin.reduction.gauge import Gauge, others_of


class GaugeLinear(nn.Linear):
    """A linear layer of rank r with r (inputs + outputs - r) weights, see `splaser_plugin.reduction.gauge`.

    By rows it computes the pivot outputs R x, from those all others, L (R x), and puts them in their places; by
    columns it gathers the inputs into r sums, which the pivot columns take to the outputs. Either is r^2 products a
    token less than two plain factors.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        by_rows: bool,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make the whole weight
        self.in_features = in_features
        self.out_features = out_features
        self.by_rows = by_rows
        skeleton, interpolation, size = (
            ((rank, in_features), (out_features - rank, rank), out_features)
            if by_rows
            else ((out_features, rank), (rank, in_features - rank), in_features)
        )
        self.weight = nn.Parameter(torch.empty(skeleton, device=device, dtype=dtype))
        self.interpolation = nn.Parameter(torch.empty(interpolation, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.order: Tensor
        self.register_buffer("order", torch.empty(size, device=device, dtype=torch.int32))

    @classmethod
    def of(cls, gauge: Gauge, bias: nn.Parameter | None = None) -> GaugeLinear:
        """The layer of this matrix, on its device and in its dtype, with the given bias itself."""
        outputs, inputs = gauge.shape
        layer = cls(inputs, outputs, gauge.rank, by_rows=gauge.by_rows, bias=False, device="meta")
        layer.weight = nn.Parameter(gauge.skeleton)
        layer.interpolation = nn.Parameter(gauge.interpolation)
        layer.register_parameter("bias", bias)
        places = torch.cat([gauge.pivots, others_of(gauge.pivots, outputs if gauge.by_rows else inputs)])
        layer.order = (torch.argsort(places) if gauge.by_rows else places).int()
        return layer

    @property
    def rank(self) -> int:
        return self.weight.shape[0 if self.by_rows else 1]

    @property
    def gauge(self) -> Gauge:
        """The matrix, without its bias: the layer's own tensors."""
        places = torch.argsort(self.order) if self.by_rows else self.order
        return Gauge(places[: self.rank].long(), self.weight.detach(), self.interpolation.detach(), self.by_rows)

    def forward(self, input: Tensor) -> Tensor:
        if self.by_rows:
            pivots = functional.linear(input, self.weight)
            others = functional.linear(pivots, self.interpolation)
            outputs = torch.cat([pivots, others], dim=-1).index_select(-1, self.order)
            return outputs if self.bias is None else outputs + self.bias
        ordered = input.index_select(-1, self.order)
        sums = ordered[..., : self.rank] + functional.linear(ordered[..., self.rank :], self.interpolation)
        return functional.linear(sums, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, by_rows={self.by_rows}"
