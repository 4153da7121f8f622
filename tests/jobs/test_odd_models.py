"""Weights and models of every odd kind: finite results, or a reason; bounded, and said so."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from splaser_plugin import LaserConfig, laser
from splaser_plugin.errors import ScoreError, SplaserError
from splaser_plugin.scanning.scan import scan as run_scan
from splaser_plugin.scoring.scores import Scores
from splaser_plugin.weights.in_memory import Weights
from tests.builders import FLAGS, VOCABULARY, tiny_llama

GENERATOR = torch.Generator().manual_seed(0)
NOISE = torch.randn(16, 24, generator=GENERATOR)
ODD = {
    "zeros": torch.zeros(16, 24),
    "equal": torch.ones(16, 24),
    "rank one": NOISE[:, :1] @ NOISE[:1],
    "row": NOISE[:1].clone(),
    "column": NOISE[:, :1].clone(),
    "one": NOISE[:1, :1].clone(),
    "denormal": NOISE * 1e-40,
    "huge bfloat16": (NOISE * 1e30).bfloat16(),
    "largest bfloat16": torch.full((16, 24), 3e38).bfloat16(),
    "float16": NOISE.half(),
    "largest float16": torch.full((16, 24), 65504.0).half(),
    "bfloat16": NOISE.bfloat16(),
    "float8 e4m3": NOISE.to(torch.float8_e4m3fn),
    "float8 e5m2": NOISE.to(torch.float8_e5m2),
    "float64": NOISE.double() * 1e200,
}


class Holder(torch.nn.Module):
    """A model of one block with one linear layer of these weights."""

    def __init__(self, weight):
        super().__init__()
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"up_proj": layer})])


@pytest.mark.parametrize("weight", ODD.values(), ids=ODD.keys())
def test_odd_weights_scan_alike_from_disk_and_loaded_with_finite_numbers_or_a_reason(weight, tmp_path):
    safetensors.torch.save_file({"layers.0.up_proj.weight": weight}, tmp_path / "model.safetensors")
    stored = run_scan(str(tmp_path), output=tmp_path / "scan.json")
    loaded = run_scan(Holder(weight))
    assert loaded.matrices == stored.matrices
    (matrix,) = stored.matrices
    for fit in matrix.edges.values():
        assert np.isfinite([fit.sigma, fit.threshold, fit.rank]).all()
        assert (fit.snr is None or fit.snr_ratio is None) == bool(fit.reason)
    text = (tmp_path / "scan.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


@pytest.mark.parametrize("weight", ODD.values(), ids=ODD.keys())
def test_reducing_odd_weights_gives_finite_ones_or_a_reason(weight):
    weights = Weights(Holder(weight.clone()))
    (matrix,), _ = weights.matrices()
    try:
        weights.reduce(matrix, 1)
    except SplaserError as error:
        assert "up_proj" in str(error)
    else:
        reduced = weights.read(matrix)
        assert reduced.dtype == weight.dtype
        assert reduced.double().isfinite().all()


QUICK = LaserConfig(embedder="self", max_new_tokens=6, candidates=3, device="cpu", edge="mp")


@pytest.mark.parametrize("kind", ["zeros", "equal", "denormal", "bfloat16", "float16"])
def test_a_laser_of_odd_weights_ends_with_finite_scores(kind, tokenizer, pairs):
    model = tiny_llama()
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.copy_({"zeros": weight * 0, "equal": weight * 0 + 1, "denormal": weight * 1e-40}.get(kind, weight))
    model = model.to({"bfloat16": torch.bfloat16, "float16": torch.float16}.get(kind, torch.float32))
    json.dumps(laser(model, pairs, config=QUICK, tokenizer=tokenizer).results(), allow_nan=False)


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def always(token):
    """A model whose every answer is this token, again and again."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(32, VOCABULARY, bias=True)
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[token] = 1
    return model


def test_a_model_that_says_nothing_is_scored_and_it_is_said(tokenizer, pairs):
    found = laser(always(2), pairs, config=QUICK, tokenizer=tokenizer).results()
    assert found["baseline"]["answers"] == ["", "", "", ""]
    assert (found["baseline"]["empty_answers"], found["baseline"]["cut_answers"]) == (4, 0)
    assert np.isfinite(found["baseline"]["score"])


def test_a_model_that_never_ends_is_cut_and_it_is_said(splaser, tokenizer, pairs_file, tmp_path):
    model = tiny_llama()
    with torch.no_grad():  # every hidden state points the same way, and so does one token that ends nothing
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(1e-3)
            layer.self_attn.o_proj.weight.mul_(1e-3)
        model.model.embed_tokens.weight.copy_(torch.ones(32) + 1e-3 * model.model.embed_tokens.weight)
        model.lm_head.weight.mul_(1e-3)
        model.lm_head.weight[100] = 1
    folder = saved(model, tokenizer, tmp_path / "model")
    code, printed, stderr = splaser("laser", folder, "--pairs", pairs_file, "-o", tmp_path / "out", "--json", *FLAGS)
    assert code == 0, stderr
    baseline = json.loads(printed)["baseline"]
    assert (baseline["empty_answers"], baseline["cut_answers"], baseline["generated_tokens"]) == (0, 4, 4 * 6)
    assert "of 4 the model left 0 empty and did not end 4, which were cut at --max-new-tokens" in stderr


@pytest.mark.parametrize("broken", ["lm_head", "norm"])
def test_a_model_whose_logits_are_nan_is_an_error_and_nothing_is_written(
    splaser, tokenizer, pairs_file, tmp_path, broken
):
    model = tiny_llama()
    with torch.no_grad():
        weight = model.lm_head.weight if broken == "lm_head" else model.model.norm.weight
        weight.fill_(3e38 if broken == "norm" else float("nan"))
    folder = saved(model, tokenizer, tmp_path / "model")
    code, printed, stderr = splaser("laser", folder, "--pairs", pairs_file, "-o", tmp_path / "out", *FLAGS)
    assert (code, printed) == (1, "")
    assert "ScoreError: the model's logits are nan" in stderr
    assert not (tmp_path / "out" / "recipe.json").exists()


class FailsWithReduced(torch.nn.Module):
    """An MLP that raises, or gives nan, once its weight is of low rank."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner = inner
        self.how = how
        self.whole = inner.up_proj.weight.detach().clone()

    def forward(self, states):
        if torch.equal(self.inner.up_proj.weight, self.whole):
            return self.inner(states)
        if self.how == "raises":
            raise IndexError("out of \x1b[31mreach")
        return self.inner(states) * float("nan")


@pytest.mark.parametrize(("how", "reason"), [("raises", "IndexError: out of"), ("nan", "logits are nan")])
def test_a_candidate_the_model_fails_with_is_put_back_and_the_search_goes_on(how, reason, tokenizer, pairs):
    model = tiny_llama()
    before = model.state_dict()
    weight = before["model.layers.0.mlp.up_proj.weight"].clone()
    model.model.layers[0].mlp = FailsWithReduced(model.model.layers[0].mlp, how)
    result = laser(model, pairs, config=replace(QUICK, candidates=14), tokenizer=tokenizer)
    (failed,) = [trial for trial in result.results()["candidates"] if trial["verdict"] == "failed"]
    assert failed["name"] == "model.layers.0.mlp.inner.up_proj"
    assert reason in failed["reason"]
    assert failed["score"] is None
    assert torch.equal(model.model.layers[0].mlp.inner.up_proj.weight, weight)
    assert len(result.search.trials) == 14


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_none(value):
    with pytest.raises(ScoreError, match=f"the score of item 7 is {value}"):
        Scores((3, 7), (0.5, value))
