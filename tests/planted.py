"""Scorers whose scores are planted, what tests read off a search by them, and weights of a planted rank."""

from __future__ import annotations

import numpy as np
import torch

from splaser_plugin.progress import Progress
from splaser_plugin.scoring.scores import Scores
from splaser_plugin.search.search import SearchResult


class Column:
    """A scorer that reads planted values, and keeps what it was asked for."""

    name = "column"

    def __init__(self, values):
        self.values = values
        self.size = len(values)
        self.asked = []

    def score(self, items, like=None):
        self.asked += items
        return Scores(tuple(items), tuple(self.values[item] for item in items))


def whole(values) -> Scores:
    """The scores of all items."""
    return Column(values).score(range(len(values)))


def noise(size: int, mean: float, seed: int = 0) -> list[float]:
    """Scores of that mean with a standard deviation of 0.1."""
    return np.random.default_rng(seed).normal(mean, 0.1, size).tolist()


class Planted:
    """A scorer that knows how much each matrix, once changed, adds to the score; pairs differ by some noise."""

    name = "planted"

    def __init__(self, model, effects, *, size=2, noise=0.0):
        self.before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.model = model
        self.effects = effects
        self.size = size
        spread = torch.randn(len(effects), size, generator=torch.Generator().manual_seed(0)) * noise
        self.noise = dict(zip(effects, (spread - spread.mean(1, keepdim=True)).tolist(), strict=True))
        self.asked = 0

    def changed(self):
        parameters = self.model.named_parameters()
        names = [name for name, parameter in parameters if not torch.equal(parameter, self.before[name])]
        return [name.removesuffix(".weight") for name in names]

    def score(self, items, like=None):
        self.asked += len(items)
        changed = [name for name in self.changed() if name in self.effects]
        values = [sum(self.effects[name] + self.noise[name][item] for name in changed) for item in items]
        return Scores(tuple(items), tuple(map(float, values)))


def shorter_is_better(model, tokenizer, pairs):
    """A user's own scoring function: it reads the model, so that its scores change with the model."""
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    return [weight.abs().mean() / len(pair.prompt) for pair in pairs]


def outcomes(found: SearchResult) -> list[str]:
    """Of every trial, in their order."""
    return [trial.judgement.outcome for trial in found.trials]


class Facts(Progress):
    """Keeps the facts that a run reports."""

    def __init__(self):
        self.facts = []

    def fact(self, label, value):
        self.facts.append((label, value))


def low_rank(rows: int, columns: int) -> torch.Tensor:
    """Of rank 3, without rounding."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-2, 3, size, generator=generator).bfloat16() for size in ((rows, 3), (3, columns)))
    return left @ right
