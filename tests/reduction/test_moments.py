from __future__ import annotations

import os
import subprocess
import sys
from collections import deque

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from splaser_plugin.errors import ModelError
from splaser_plugin.reduction import moments
from splaser_plugin.reduction.calibration import Row, answer_rows, spread, window_rows
from splaser_plugin.reduction.moments import Moments, draw, measure
from splaser_plugin.reduction.products import Product
from splaser_plugin.weights.adapted import MergedWeights
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.matrices import Skipped
from tests.builders import ROOT, tiny_llama, torchrun
from tests.products import are_exact, coarse_products
from tests.reduction.held import BOUND, held_bytes
from tests.reduction.models import ListedExperts, tiny_fused, tiny_gpt2

ROWS = [Row(tuple(range(5, 30))), Row(tuple(range(90, 130)), 12), Row((3, 1, 4, 1, 5, 9, 2, 6))]


def labels_of(row, sample=0):
    generator = torch.Generator().manual_seed(1000 * sample + row.tokens[0])
    return torch.randint(512, (row.predictions,), generator=generator)


@pytest.fixture
def fixed_labels(monkeypatch):
    """Labels are given in place of drawn: sample by sample, row by row."""
    queue = []

    def use(rows, samples=1, passes=1):
        queue.extend([labels_of(row, sample) for row in rows for sample in range(samples)] * passes)

    monkeypatch.setattr(moments, "draw", lambda logits, generator: queue.pop(0))
    return use


def bounded(values):
    squares = values.square().sum(1)
    limit = moments.OUTLIER * squares[squares > 0].median()
    scales = [min(1.0, float(limit / square)) ** 0.5 if square else 1.0 for square in squares]
    return values * torch.tensor(scales, dtype=values.dtype)[:, None]


def measured_slowly(model, rows, samples=1):
    """C and G of every linear layer, from each token's own input and gradient, in float64."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D))}
    inputs = {name: [] for name in layers}
    gradients = {name: [] for name in layers}
    for row in rows:
        for sample in range(samples):
            outputs = {}
            handles = []
            for name, layer in layers.items():

                def keep(module, given, output, name=name, sample=sample, outputs=outputs):
                    output.retain_grad()
                    outputs[name] = output
                    if sample == 0:
                        inputs[name].append(bounded(given[0][0].detach().double()))

                handles.append(layer.register_forward_hook(keep))
            logits = model(input_ids=torch.tensor([row.tokens])).logits[0, row.first :]
            functional.cross_entropy(logits, labels_of(row, sample), reduction="sum").backward()
            for name, output in outputs.items():
                gradients[name].append(output.grad[0].double())
            for handle in handles:
                handle.remove()
    predictions = samples * sum(row.predictions for row in rows)
    found = {}
    for name in layers:
        x, g = torch.cat(inputs[name]), torch.cat(gradients[name])
        found[name] = x.mT @ x / len(x), g.mT @ g / predictions
    return found


def check(found: Moments, weight, inputs, outputs):
    """weight: (outputs, inputs)"""
    short, long_side = (inputs, outputs) if found.short_is_inputs else (outputs, inputs)
    upright = weight if found.short_is_inputs else weight.mT
    gram = upright.mT @ long_side @ upright
    for got, expected in ((found.short, short), (found.gram, gram)):
        assert torch.allclose(got.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert found.long_mean == pytest.approx(float(long_side.diagonal().mean()), rel=1e-3)


@pytest.mark.parametrize("model_of", [lambda: tiny_llama(vocabulary=512), tiny_gpt2])
@pytest.mark.parametrize("samples", [1, 3])
def test_they_are_those_of_each_token_taken_by_itself(model_of, samples, fixed_labels):
    model = model_of()
    weights = Weights(model)
    matrices = weights.matrices()[0]
    fixed_labels(ROWS, samples)
    found = dict(measure(weights, matrices, ROWS, samples=samples))
    expected = measured_slowly(model, ROWS, samples)
    assert list(found) == matrices
    for matrix in matrices:
        inputs, outputs = expected[matrix.name]
        weight = weights.read(matrix).double()
        check(found[matrix], weight.mT if matrix.transposed else weight, inputs, outputs)
        assert found[matrix].tokens == sum(len(row.tokens) for row in ROWS)


def test_groups_that_take_turns_give_the_numbers_of_one(fixed_labels):
    weights = Weights(tiny_llama(vocabulary=512))
    matrices = weights.matrices()[0]
    fixed_labels(ROWS)
    together = dict(measure(weights, matrices, ROWS))
    groups = moments._groups(matrices, 3 * 8 * 32 * 32)
    assert len(groups) > 3
    assert [matrix for group in groups for matrix in group] == matrices
    fixed_labels(ROWS, passes=len(groups))
    apart = dict(measure(weights, matrices, ROWS, group_bytes=3 * 8 * 32 * 32))
    for matrix in matrices:
        assert torch.allclose(apart[matrix].short, together[matrix].short, rtol=1e-4, atol=1e-7)
        assert torch.allclose(apart[matrix].gram, together[matrix].gram, rtol=1e-4, atol=1e-7)


def test_no_more_sums_are_held_than_those_of_one_group(monkeypatch):
    weights = Weights(tiny_llama(vocabulary=512))
    with held_bytes(monkeypatch) as held:
        deque(moments.measure(weights, weights.matrices()[0], ROWS), maxlen=0)
    assert len(held) > 3 and max(held) <= BOUND


def test_a_stack_of_experts_has_the_moments_of_experts_apart(fixed_labels):
    """Mixtral computed by hand, every expert by itself: inputs of the tokens routed to it, gradients of its outputs."""
    model = tiny_fused("mixtral")
    weights = Weights(model)
    matrices = weights.matrices(["experts.down_proj"])[0]
    rows = ROWS[:1]
    fixed_labels(rows)
    found = dict(measure(weights, matrices, rows))
    experts = model.model.layers[1].mlp.experts
    seen, routed = {}, {}

    def by_hand(module, given, output):
        states, places, shares = given
        total = torch.zeros_like(states)
        for expert in range(experts.num_experts):
            token, which = (places == expert).nonzero(as_tuple=True)
            gate, up = (states[token] @ experts.gate_up_proj[expert].mT).chunk(2, dim=-1)
            hidden = functional.silu(gate) * up
            out = hidden @ experts.down_proj[expert].mT
            out.retain_grad()
            seen[expert], routed[expert] = hidden.detach(), out
            total = total.index_add(0, token, out * shares[token, which, None])
        return total

    handle = experts.register_forward_hook(by_hand)
    logits = model(input_ids=torch.tensor([rows[0].tokens])).logits[0]
    functional.cross_entropy(logits, labels_of(rows[0]), reduction="sum").backward()
    handle.remove()
    for matrix in matrices:
        if matrix.block != 1:
            continue
        got = found[matrix]
        if isinstance(got, Skipped):
            assert len(seen[matrix.expert]) == 0
            assert got.reason == "no calibration token was routed to this expert"
            continue
        x, g = bounded(seen[matrix.expert].double()), routed[matrix.expert].grad.double()
        assert got.tokens == len(x)
        check(got, weights.read(matrix).double(), x.mT @ x / len(x), g.mT @ g / rows[0].predictions)


def test_experts_that_are_called_without_a_token_are_those_that_no_token_reached(fixed_labels):
    model = tiny_llama(vocabulary=512)
    experts = model.model.layers[1].mlp = ListedExperts()
    turns = iter([torch.arange(25) % 2, torch.arange(40) % 3, torch.zeros(8, dtype=torch.long)])
    experts.routed = lambda tokens: next(turns)
    weights = Weights(model)
    fixed_labels(ROWS)
    found = {matrix.name: moments for matrix, moments in measure(weights, weights.matrices()[0], ROWS)}
    for name in ("up_proj", "down_proj"):
        apart = [found.pop(f"model.layers.1.mlp.experts.{place}.{name}") for place in range(4)]
        assert [moments.tokens for moments in apart[:3]] == [13 + 14 + 8, 12 + 13, 13]
        assert apart[3].reason == "no calibration token was routed to this expert"
    assert all(isinstance(moments, Moments) for moments in found.values())


def test_a_matrix_that_no_product_reads_is_told_with_the_reason(fixed_labels):
    weights = Weights(tiny_llama(vocabulary=512))
    matrices = weights.matrices()[0]
    mlp = weights.model.model.layers[0].mlp
    mlp.forward = lambda x: torch.einsum(  # a way to multiply that is not followed
        "...i,oi->...o", functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight
    )
    fixed_labels(ROWS)
    found = {matrix.name: moments for matrix, moments in measure(weights, matrices, ROWS)}
    assert found.pop("model.layers.0.mlp.down_proj").reason.startswith("the model never multiplies by this matrix")
    assert all(isinstance(moments, Moments) for moments in found.values())


def test_labels_are_drawn_as_often_as_the_model_expects_them():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).expand(20_000, 4)
    labels = draw(logits, torch.Generator().manual_seed(0))
    shares = labels.bincount(minlength=4) / len(labels)
    assert torch.allclose(shares, logits[0].softmax(-1), atol=0.015)
    assert shares[3] == 0


def test_the_same_run_twice_gives_the_same_bits():
    weights = Weights(tiny_llama(vocabulary=512))
    matrices = weights.matrices()[0]
    for (_, one), (_, other) in zip(measure(weights, matrices, ROWS), measure(weights, matrices, ROWS), strict=True):
        assert torch.equal(one.short, other.short) and torch.equal(one.gram, other.gram)


def test_moments_are_added_up_exactly_where_the_user_asked_for_coarse_products():
    weights = Weights(tiny_llama(vocabulary=512))
    for matrix in weights.matrices()[0][:2]:  # q_proj is square, and the inputs of k_proj are its long side
        sums = moments._Sums(weights, matrix)
        inputs, outputs = torch.ones(5, matrix.shape[1]), torch.ones(5, matrix.shape[0])
        with coarse_products() as precisions:
            product = Product(inputs, None, inputs, outputs, columns_are_inputs=True)
            sums.add_inputs(product, [])
            sums.add_gradients(product)
        assert are_exact(precisions)


@pytest.mark.parametrize("size", [5, 400])
def test_strips_add_up_to_the_upper_triangle(size):
    values = torch.randn(30, size, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(size, size)
    fourth = moments._add(total, values) + moments._add(total, values)
    assert torch.allclose(total.triu(), 2 * (values.mT @ values).triu(), atol=1e-4)
    assert fourth == pytest.approx(2 * float(torch.linalg.vector_norm(values, dim=1).double().pow(4).sum()))


def test_a_token_like_an_attention_sink_counts_no_more_than_ten_others():
    values = torch.ones(20, 4)
    values[0] *= 1000
    limited = values * moments._bounds(values)
    assert torch.equal(limited[1:], values[1:])
    assert limited[0].square().sum() == pytest.approx(10 * 4)
    assert torch.equal(moments._bounds(torch.zeros(3, 4)), torch.ones(3, 1))


def test_a_model_that_computes_nan_is_refused():
    model = tiny_llama(vocabulary=512)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.inf
    weights = Weights(model)
    with pytest.raises(ModelError, match="reads or gets inf or nan in the calibration rows"):
        list(measure(weights, weights.matrices()[0], ROWS))


def test_rows_of_pairs_count_the_answers_predictions_and_those_of_text_all():
    (pair,) = answer_rows([[1, 2, 3]], [[4, 5]])
    assert (pair.tokens, pair.first, pair.predictions) == ((1, 2, 3, 4, 5), 2, 3)
    (window,) = window_rows([[7, 8, 9]])
    assert (window.first, window.predictions) == (0, 3)


def test_rows_are_taken_from_all_over_the_text():
    rows = window_rows([[place] * 10 for place in range(100)])
    assert [row.tokens[0] for row in spread(rows, 100)] == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert [row.tokens[0] for row in spread(rows, 1)] == [0]
    assert spread(rows, 10_000) == rows
    assert spread([], 10) == []


def test_under_adapters_the_moments_are_those_of_the_merged_model(fixed_labels):
    from peft import LoraConfig, get_peft_model

    model = tiny_llama(vocabulary=512)
    config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj", "up_proj"], init_lora_weights=False)
    adapted = MergedWeights(get_peft_model(model, config).eval())
    matrices = adapted.matrices()[0]
    fixed_labels(ROWS)
    found = dict(measure(adapted, matrices, ROWS))
    merged = Weights(tiny_llama(vocabulary=512))
    for matrix in matrices:
        merged.write(matrix, adapted.read(matrix))
    fixed_labels(ROWS)
    for matrix, expected in measure(merged, matrices, ROWS):
        for name in ("short", "gram"):
            got, whole = getattr(found[matrix], name), getattr(expected, name)
            assert torch.allclose(got, whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max())), (matrix.name, name)


def test_products_without_gradients_are_passed_over(fixed_labels):
    """As in an indexer that only chooses tokens: no prediction hangs on what it computes there."""
    model = tiny_llama(vocabulary=512)
    mlp = model.model.layers[0].mlp
    forward = mlp.forward

    def twice(states):
        with torch.no_grad():
            forward(states * 100)
        return forward(states)

    fixed_labels(ROWS, passes=2)
    plain = dict(measure(Weights(model), Weights(model).matrices()[0], ROWS))
    mlp.forward = twice
    for matrix, found in measure(Weights(model), list(plain), ROWS):
        assert torch.equal(found.short, plain[matrix].short) and torch.equal(found.gram, plain[matrix].gram)


@pytest.mark.slow
def test_two_processes_share_the_rows_and_both_get_the_numbers_of_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    script = str(ROOT / "tests" / "reduction" / "shared_runs.py")
    for launcher, name in (([sys.executable], "one"), (torchrun(), "two")):
        command = [*launcher, script, str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("one-0", "two-0", "two-1"))
    assert one.keys() == first.keys() == second.keys()
    for name in one:
        for alone, mine, other in zip(one[name], first[name], second[name], strict=True):
            assert torch.equal(mine, other)
            assert torch.allclose(mine, alone, rtol=1e-4, atol=1e-6 * float(alone.abs().max()))
    first, second = (torch.load(tmp_path / f"two-{process}-gauge.pt") for process in (0, 1))
    assert first.keys() == second.keys() == one.keys()
    assert all(torch.equal(mine, other) for name in one for mine, other in zip(first[name], second[name], strict=True))


def test_what_several_matrices_read_is_added_up_once():
    weights = Weights(tiny_llama(vocabulary=512, num_key_value_heads=4))
    found = {matrix.name: moments for matrix, moments in measure(weights, weights.matrices()[0], ROWS)}
    for block in (0, 1):
        q, k, v, o = (found[f"model.layers.{block}.self_attn.{name}_proj"] for name in "qkvo")
        gate, up, down = (found[f"model.layers.{block}.mlp.{name}_proj"] for name in ("gate", "up", "down"))
        assert q.reads == k.reads == v.reads and q.short is k.short is v.short
        assert gate.reads == up.reads and gate.short is up.short
        assert len({q.reads, o.reads, gate.reads, down.reads}) == 4
    assert found["model.layers.0.self_attn.q_proj"].reads != found["model.layers.1.self_attn.q_proj"].reads


def test_a_block_stays_in_one_pass_where_it_fits():
    matrices = Weights(tiny_llama(vocabulary=512)).matrices()[0]
    block = sum(map(moments._bytes, matrices[:7]))
    assert [len(group) for group in moments._groups(matrices, block + 8 * 32 * 32)] == [7, 7]
    assert [len(group) for group in moments._groups(matrices, 2 * block)] == [14]
    assert [len(group) for group in moments._groups(matrices, 0)] == [1] * 14
