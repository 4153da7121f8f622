"""Scans and results to report on, made up without a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from splaser_plugin.checkpoints.naming import type_in_block
from splaser_plugin.scanning.records import Scan, matrix_scan
from splaser_plugin.weights.matrices import Matrix, Skipped

SMALL: Mapping[str, tuple[int, int]] = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "mlp.down_proj": (64, 160),
}
LARGE: Mapping[str, tuple[int, int]] = {
    "self_attn.q_proj": (8192, 8192),
    "self_attn.k_proj": (1024, 8192),
    "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192),
    "mlp.gate_proj": (28672, 8192),
    "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
}
"""The matrices of a block of Llama 3 70B."""


def made_up_scan(blocks: int, shapes: Mapping[str, tuple[int, int]] = SMALL, model: str = "somebody/model") -> Scan:
    """A scan whose spectra are smooth noise with some larger values, in another measure for each matrix."""
    random = np.random.default_rng(0)
    matrices = []
    for block in range(blocks):
        for kind, shape in shapes.items():
            count = min(shape)
            noise = np.sort(random.uniform(0.2, 2.0, count))[::-1]
            spikes = random.integers(1, count // 2)
            values = noise * np.where(np.arange(count) < spikes, random.uniform(1.5, 4.0), 1.0)
            name = f"model.layers.{block}.{kind}"
            matrices.append(matrix_scan(Matrix(name, f"{name}.weight", type_in_block(name), block, shape), values))
    skipped = (Skipped("model.embed_tokens", "an embedding"),)
    return Scan(model, "0" * 64, "iqr", tuple(matrices), skipped, version="0.1.0")


def made_up_results(scan: Scan, *, pairs: int = 20, held_out: int = 8) -> dict[str, Any]:
    """The content of a results.json: one candidate of each way to end, and a held-out verdict."""
    random = np.random.default_rng(1)

    def scores(count: int, gain: float, word: str) -> dict[str, Any]:
        values = (random.normal(0.2, 0.05, count) + gain).tolist()
        answers = [f"Answer {place} is {word}." for place in range(count)]
        return {"score": float(np.mean(values)), "per_pair": values, "answers": answers, "generated_tokens": count}

    baseline, final = scores(pairs, 0.0, "old"), scores(pairs, 0.1, "new")
    ends = {"kept": final["per_pair"], "restored": baseline["per_pair"], "stopped": final["per_pair"][:10]}
    candidates = []
    for matrix, (outcome, values) in zip(scan.matrices, [*ends.items(), ("failed", [])], strict=False):
        best = baseline["per_pair"] if outcome == "kept" else final["per_pair"]
        candidates.append(
            {
                "name": matrix.name,
                "rank": 5,
                "full_rank": min(matrix.shape),
                "snr": 0.5,
                "verdict": outcome,
                "score": float(np.mean(values)) if values else None,
                "best_before": float(np.mean(best[: len(values)])) if values else None,
                "reason": "answers are empty" if outcome == "failed" else None,
                "pairs_scored": list(range(len(values))),
                "per_pair": values,
                "generated_tokens": 10,
                "elapsed_s": 1.0,
            }
        )
    base, result = scores(held_out, 0.0, "old"), scores(held_out, 0.1, "new")
    differences = np.subtract(result["per_pair"], base["per_pair"])
    texts = [{"prompt": f"Question {n}?", "chosen": f"Yes {n}.", "rejected": None} for n in range(pairs + held_out)]
    return {
        "schema": "splaser.results/1",
        "model": scan.model,
        "pairs": {"source": "Intel/orca_dpo_pairs", "used": pairs + held_out, "dropped": {}},
        "baseline": baseline,
        "final": final,
        "generated_tokens": 100,
        "candidates": candidates,
        "held_out": {
            "pairs": held_out,
            "split": f"{held_out} pairs; {pairs} to search on",
            "verdict": "better",
            "difference": float(differences.mean()),
            "interval": [0.05, 0.15],
            "better": int((differences > 0).sum()),
            "worse": int((differences < 0).sum()),
            "equal": 0,
            "base": base,
            "result": result,
        },
        "texts": {"search": texts[:pairs], "held_out": texts[pairs:]},
    }


def replaced(content: Any, old: str, new: str) -> Any:
    """JSON content with `new` for `old` in every text but keys."""
    if isinstance(content, str):
        return content.replace(old, new)
    if isinstance(content, list):
        return [replaced(value, old, new) for value in content]
    if isinstance(content, dict):
        return {key: replaced(value, old, new) for key, value in content.items()}
    return content
