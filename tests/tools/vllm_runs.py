"""Run by test_vllm.py in vLLM's environment: what both engines answer, search and refuse, as JSON in the last line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from splaser_plugin import CompareConfig, LaserConfig, compare, laser
from splaser_plugin.data.pairs import load_pairs
from splaser_plugin.errors import SplaserError
from splaser_plugin.generation.generator import Generator
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.generation.vllm import Vllm
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import load_model

PAIRS = "pairs.jsonl"
SHORT = {"max_new_tokens": 12, "device": "cpu", "dtype": "float32"}


def answers(folder: str) -> Any:
    """Of both engines: first, after each of some changes, and after each was taken back; and what is refused."""
    model, tokenizer = load_model(folder, device="cpu", dtype="float32")
    prompter = Prompter(tokenizer, context=256)
    prompts = [prompter.tokens(pair.messages) for pair in load_pairs(PAIRS).pairs[:5]]
    loop, other = (Generator(model, prompter, max_new_tokens=12, batch_size=3) for _ in range(2))
    other.use_vllm(128)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    found: dict[str, Any] = {"threads": torch.get_num_threads() - threads}
    torch.set_num_threads(threads)

    def both() -> list[list[tuple[int, ...]]]:
        return [[answer.tokens for answer in each.answer(prompts)] for each in (loop, other)]

    found["before"] = both()
    weights = Weights(model)
    matrices = [matrix for matrix in weights.matrices()[0] if matrix.block == 1]
    found["changed"], found["restored"] = {}, {}
    for matrix in matrices:
        with weights.trying(matrix) as attempt:
            attempt.reduce(2)
            found["changed"][matrix.name] = both()
        found["restored"][matrix.name] = both()
    tokens = found["before"][0][0]
    ends = [2, max(tokens, key=tokens.index)]
    loop.engine.ends = other.engine._ends = ends
    found["ends"], found["ended"] = ends, both()
    with weights.trying(matrices[0]):
        weights.write(matrices[0], torch.full(matrices[0].shape, math.nan))
        found["nan"] = said(lambda: other.answer(prompts))
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    found["norm"] = said(lambda: other.answer(prompts))
    xglm = transformers.XGLMConfig(vocab_size=64, d_model=32, ffn_dim=64, num_layers=1, attention_heads=2)
    strange = transformers.XGLMForCausalLM(xglm)
    found["strange"] = said(lambda: Vllm(strange, [2], longest=32, batch_size=2))
    return found


def search(folder: str, embedder: str) -> Any:
    """Recipe and scores of a run with each engine, in one process, and of comparisons of what they wrote."""
    found = {}
    for engine in ("transformers", "vllm"):
        config = LaserConfig(**SHORT, engine=engine, embedder="self", candidates=6, edge="mp")
        result = laser(folder, PAIRS, config=config, output=engine)
        stored = json.loads((Path(engine) / "results.json").read_text())
        scores = {key: stored[key] for key in ("baseline", "final", "held_out")}
        steps = [(step.name, step.rank) for step in result.recipe.steps]
        compared = CompareConfig(**SHORT, engine=engine, embedder=embedder)
        values = [model.semantic.values for model in compare([folder, engine], PAIRS, config=compared).models]
        found[engine] = {"engine": result.engine, "steps": steps, "scores": scores, "compared": values}
    return found


def said(work: Callable[[], object]) -> str:
    """The error that it ends with."""
    try:
        work()
    except SplaserError as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    print(json.dumps({"answers": answers, "search": search}[sys.argv[1]](*sys.argv[2:])))
