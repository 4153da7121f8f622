"""The published arithmetic written out plainly, slow and separate from the package, for tests to compare with."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import Tensor


def singular_values(weight: Tensor) -> Tensor:
    return torch.linalg.svdvals(weight.double())


def thresholds(weight: Tensor) -> dict[str, float]:
    S = singular_values(weight)
    rows, columns = weight.shape
    beta = min(rows, columns) / max(rows, columns)
    sigma = (torch.quantile(S, 0.75) - torch.quantile(S, 0.25)).item() / 1.349
    entry_noise = torch.quantile(S, 0.5).item() / math.sqrt(mp_median(beta) * max(rows, columns))
    donoho = 2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1))
    return {
        "iqr": sigma * (1 + math.sqrt(beta)),
        "mp": entry_noise * (math.sqrt(rows) + math.sqrt(columns)),
        "gavish-donoho": entry_noise * math.sqrt(max(rows, columns)) * math.sqrt(donoho),
    }


def snr_and_rank(weight: Tensor, threshold: float) -> tuple[float, int]:
    S = singular_values(weight)
    is_signal = S.gt(threshold)
    return (S[is_signal].sum() / S[~is_signal].sum()).item(), int(is_signal.sum())


def mp_median(beta: float) -> float:
    """Median of the Marchenko-Pastur law from its density, by numerical integration and root finding."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def above(x: float) -> float:
        def density(t: float) -> float:
            return math.sqrt((high - t) * (t - low)) / (2 * math.pi * beta * t)

        return quad(density, x, high, epsabs=1e-11, epsrel=1e-11, limit=500)[0]

    return brentq(lambda x: above(x) - 0.5, low + 1e-9 * (high - low), high, xtol=1e-14)


def truncate(weight: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def one_token_at_a_time(model, prompter, pair, text):
    """The slow way: a forward pass of one row for each token, no padding, no batch."""
    ids = prompter.tokens(pair.messages)
    log_probabilities = []
    for token in prompter.tokenizer(text, add_special_tokens=False)["input_ids"]:
        if prompter.context is not None and len(ids) >= prompter.context:
            break
        logits = model(torch.tensor([ids])).logits[0, -1].double()
        log_probabilities.append((logits[token] - logits.exp().sum().log()).item())
        ids.append(token)
    return sum(log_probabilities) / len(log_probabilities)


def as_transformers(codes: Tensor, scales: Tensor) -> Tensor:
    """8-bit floats times their scales by transformers' own code; skips the test where that knows no such scales."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    if not hasattr(Fp8Dequantize, "_dequantize_one"):
        pytest.skip("this version of transformers can't dequantise so")
    return Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
