"""Small checkpoints to scan, and what a scan reports of its work."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from splaser_plugin.progress import Progress


class Notes(Progress):
    """What a run reports: facts by label, and how many matrices it computed."""

    def __init__(self):
        self.facts = {}
        self.computed = 0

    def fact(self, label, value):
        self.facts[label] = value

    @contextmanager
    def phase(self, name, total):
        yield self._advance

    def _advance(self, steps):
        self.computed += steps


def layers(count=6, side=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (side, 2 * side)
    return {
        f"model.layers.{number}.mlp.up_proj.weight": torch.randn(shape, generator=generator) for number in range(count)
    }


def mixture(experts=5, rows=24, columns=40):
    """Two blocks with fused experts, some of them alike in shape to the weights beside them."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"mlp.experts.down_proj": (experts, columns, rows), "mlp.experts.gate_up_proj": (experts, rows, columns)}
    shapes |= {"mlp.router.weight": (rows, columns), "self_attn.q_proj.weight": (rows, rows)}
    return {
        f"model.layers.{block}.{name}": torch.randn(shape, generator=generator).bfloat16()
        for block in range(2)
        for name, shape in shapes.items()
    }
