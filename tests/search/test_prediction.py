from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import sem

from splaser_plugin.data.pairs import pairs_from_rows
from splaser_plugin.errors import ScoreError
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.reduction.measured_reducer import MeasuredReducer
from splaser_plugin.reduction.truncation import decompose
from splaser_plugin.scoring.margin import MarginScorer
from splaser_plugin.search import prediction
from splaser_plugin.search.prediction import DIVERGENCE_WEIGHT, OUTPUT_WEIGHT, Sensitivity, sensitivities
from splaser_plugin.spectra.spectrum import components
from splaser_plugin.weights.in_memory import Weights
from tests.builders import VOCABULARY, tiny_llama
from tests.products import are_exact, coarse_products


@pytest.fixture
def scorer_of(tokenizer, pairs):
    def make(model, batch_size=4):
        prompter = Prompter(tokenizer, "chatml", context=512)
        return MarginScorer(model, prompter, pairs_from_rows(pairs).pairs, batch_size=batch_size)

    return make


def tiny_gpt2():
    """Two blocks whose linear weights are stored as (inputs, outputs)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def tiny_mixtral():
    """One block with three experts, fused into one parameter."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, head_dim=8, initializer_range=0.3,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def change_of_margin(scorer, weights, matrix, change):
    """What adding `change` to the matrix does to the mean margin."""
    before = scorer.score(range(scorer.size)).mean
    held = weights.hold(matrix)
    weights.write(matrix, weights.read(matrix) + change)
    after = scorer.score(range(scorer.size)).mean
    weights.put_back(matrix, held)
    return after - before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_of", "dtype", "step", "tolerance"),
    [
        (tiny_gpt2, torch.float64, 1e-5, 1e-6),
        (tiny_llama, torch.float64, 3e-3, 1e-2),  # its norms are computed in float32
        (tiny_mixtral, torch.float32, 1e-2, 2e-2),
    ],
)
def test_slopes_are_the_derivatives_along_the_components(model_of, dtype, step, tolerance, scorer_of):
    model = model_of().to(dtype)
    weights = Weights(model)
    scorer = scorer_of(model)
    matrices = weights.matrices()[0]
    found = sensitivities(weights, scorer, matrices)
    for matrix in matrices[::2]:
        left, values, right = torch.linalg.svd(weights.read(matrix).detach(), full_matrices=False)
        for place in (0, 2):
            change = step * values[place] * torch.outer(left[:, place], right[place])
            up, down = (change_of_margin(scorer, weights, matrix, sign * change) for sign in (1, -1))
            derivative = pytest.approx((up - down) / (2 * step), rel=tolerance, abs=tolerance / 50)
            assert found[matrix].slopes[:, place].mean() == derivative, (matrix.name, place)


def test_a_truncation_that_removes_little_does_what_is_predicted(scorer_of):
    model = tiny_gpt2().double()
    weights = Weights(model)
    scorer = scorer_of(model)
    matrices = weights.matrices()[0]
    for matrix in matrices:
        left, values, right = torch.linalg.svd(weights.read(matrix), full_matrices=False)
        values[8:] *= 1e-5
        weights.write(matrix, left * values @ right)
    found = sensitivities(weights, scorer, matrices)
    for matrix in matrices:
        with weights.trying(matrix) as attempt:
            before = scorer.score(range(scorer.size)).mean
            attempt.reduce(8)
            measured = scorer.score(range(scorer.size)).mean - before
        assert found[matrix].first_order(8) == pytest.approx(measured, rel=1e-3, abs=1e-9), matrix.name


@pytest.mark.parametrize("is_in_nats", [False, True])
def test_a_reduction_by_statistics_is_predicted_along_its_own_components(is_in_nats, scorer_of):
    model = tiny_gpt2().double()
    weights = Weights(model)
    scorer = scorer_of(model)
    matrices = weights.matrices()[0][::3]
    reducer = MeasuredReducer(matrices, is_in_nats=is_in_nats)
    random = torch.Generator().manual_seed(0)
    for matrix in matrices:
        spread = [torch.randn(size, 3 * size, generator=random).double() for size in matrix.shape]
        reducer.add(matrix, decompose(weights.read(matrix), *(values @ values.mT for values in spread)))
    found = sensitivities(weights, scorer, matrices, reducer=reducer)
    for matrix in matrices:
        weight, step = weights.read(matrix).detach().clone(), 1e-5
        change = reducer.truncated(matrix, weight, 8) - weight
        up, down = (change_of_margin(scorer, weights, matrix, sign * step * change) for sign in (1, -1))
        sensitivity, cost = found[matrix], float(reducer.costs[matrix][8])
        derivative = (up - down) / (2 * step)
        assert sensitivity.first_order(8) == pytest.approx(derivative, rel=1e-5, abs=1e-7), matrix.name
        assert sensitivity.output_lost(8) == pytest.approx(cost / reducer.costs[matrix][0])
        reach = DIVERGENCE_WEIGHT * cost if is_in_nats else OUTPUT_WEIGHT * sensitivity.output_lost(8)
        expected = sensitivity.first_order(8) - 2 * sensitivity.standard_error(8) - reach
        assert sensitivity.predicted(8) == pytest.approx(expected)


def inputs_of(model, scorer, module):
    """What the module sees at every token of every answer, one answer at a time, without padding."""
    seen = []
    handle = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for prompt, answers in zip(scorer.prompts, scorer.answers, strict=True):
            for answer in answers:
                model(input_ids=torch.tensor([[*prompt, *answer[:-1]]]))
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("model_of", [tiny_llama, tiny_gpt2])
def test_the_output_lost_is_the_mean_square_of_what_the_truncation_changes(model_of, scorer_of):
    model = model_of().double()
    weights = Weights(model)
    scorer = scorer_of(model, batch_size=3)
    matrices = weights.matrices()[0]
    found = sensitivities(weights, scorer, matrices)
    for matrix in matrices[:7]:
        inputs = inputs_of(model, scorer, model.get_submodule(matrix.name))
        weight = weights.read(matrix).detach().clone()
        with weights.trying(matrix) as attempt:
            attempt.reduce(6)
            change = weights.read(matrix) - weight
        outputs, changes = (inputs @ (factor if matrix.transposed else factor.mT) for factor in (weight, change))
        lost = changes.square().sum(1).mean()
        assert found[matrix].energies[6:].sum() == pytest.approx(lost.item(), rel=1e-8), matrix.name
        share = lost / outputs.square().sum(1).mean()
        assert found[matrix].output_lost(6) == pytest.approx(share.item(), rel=1e-8), matrix.name


def test_experts_of_which_no_inputs_are_known_count_all_directions_alike(scorer_of):
    model = tiny_mixtral()
    weights = Weights(model)
    expert = weights.matrices(["experts.down_proj"])[0][1]
    found = sensitivities(weights, scorer_of(model), [expert])[expert]
    values = torch.linalg.svdvals(weights.read(expert).double())
    assert found.energies == pytest.approx(values.square().detach().numpy(), rel=1e-4)


def test_one_gradient_is_alive_at_a_time_and_none_is_left(tiny_model, scorer_of, monkeypatch):
    alive = []
    add = prediction._Part.add_gradient

    def count(part, gradient):
        alive.append(sum(parameter.grad is not None for parameter in tiny_model.parameters()))
        add(part, gradient)

    monkeypatch.setattr(prediction._Part, "add_gradient", count)
    weights = Weights(tiny_model)
    sensitivities(weights, scorer_of(tiny_model), weights.matrices()[0])
    assert len(alive) == 4 * 14, "four pairs, fourteen matrices"
    assert max(alive) == 0, "the gradient at hand has been taken from its parameter"
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_switches_and_modes_are_as_before(tiny_model, scorer_of, fails):
    tiny_model.train()
    tiny_model.model.norm.eval()
    parameters = list(tiny_model.parameters())
    for place, parameter in enumerate(parameters):
        parameter.requires_grad_(place % 3 != 0)
        parameter.grad = torch.full_like(parameter, place) if place % 2 else None
    before = [
        (parameter.requires_grad, parameter.grad, None if parameter.grad is None else parameter.grad.clone())
        for parameter in parameters
    ]
    modes = [module.training for module in tiny_model.modules()]
    weights, scorer = Weights(tiny_model), scorer_of(tiny_model)
    if fails:
        handle = tiny_model.lm_head.register_forward_pre_hook(lambda module, inputs: 1 / 0)
        with pytest.raises(ScoreError, match="ZeroDivisionError"):
            sensitivities(weights, scorer, weights.matrices()[0])
        handle.remove()
    else:
        with torch.no_grad():
            sensitivities(weights, scorer, weights.matrices()[0])
    assert [module.training for module in tiny_model.modules()] == modes
    for parameter, (requires_grad, gradient, values) in zip(parameters, before, strict=True):
        assert parameter.requires_grad is requires_grad
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, values)
    for module in tiny_model.modules():
        assert not module._forward_pre_hooks
    assert not any(parameter._post_accumulate_grad_hooks for parameter in parameters)


def test_matrices_in_many_groups_get_the_numbers_of_one(tiny_model, scorer_of, monkeypatch):
    weights, scorer = Weights(tiny_model), scorer_of(tiny_model)
    matrices = weights.matrices()[0]
    together = sensitivities(weights, scorer, matrices)
    monkeypatch.setattr(prediction, "GROUP_BYTES", 3 * 4 * 32 * 32)
    assert [len(group) for group in prediction._groups(matrices, 4)] == [4, 3, 4, 3]
    separately = sensitivities(weights, scorer, matrices[::-1])
    for matrix in matrices:
        assert separately[matrix].slopes.mean(0) == pytest.approx(together[matrix].slopes.mean(0), rel=1e-4, abs=1e-7)
        assert separately[matrix].energies == pytest.approx(together[matrix].energies, rel=1e-4)


def test_no_more_vectors_are_held_than_those_of_one_group(tiny_model, scorer_of, monkeypatch):
    weights, scorer = Weights(tiny_model), scorer_of(tiny_model)
    bound, vectors, held = 3 * 4 * 32 * 32, [], []
    begin = prediction._Part.__init__

    def begins(self, *given):
        begin(self, *given)
        vectors.append(weakref.ref(self._basis))
        held.append(sum(living.nbytes for ref in vectors if (living := ref()) is not None))

    monkeypatch.setattr(prediction._Part, "__init__", begins)
    monkeypatch.setattr(prediction, "GROUP_BYTES", bound)
    gc.disable()
    try:
        sensitivities(weights, scorer, weights.matrices(exclude=["k_proj", "v_proj"])[0])
    finally:
        gc.enable()
    assert max(held) == bound and len(held) == 10


def test_slopes_and_energies_are_exact_where_the_user_asked_for_coarse_products(tiny_model):
    weights = Weights(tiny_model)
    for matrix in weights.matrices()[0][:2]:
        part = prediction._Part(weights, matrix, None)
        part.begin_pair()
        with coarse_products() as precisions:
            part.add_inputs(torch.ones(5, matrix.shape[1]), torch.ones(5))
            part.add_gradient(torch.ones(matrix.shape))
        assert are_exact(precisions)


def test_under_lora_the_merged_weights_are_what_is_predicted(scorer_of):
    from peft import LoraConfig, get_peft_model

    from splaser_plugin.weights.adapted import MergedWeights

    def with_adapter():
        model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    adapted, merged = with_adapter(), with_adapter().merge_and_unload()
    beside, plain = MergedWeights(adapted), Weights(merged)
    found = sensitivities(beside, scorer_of(beside.model), beside.matrices()[0])
    expected = sensitivities(plain, scorer_of(merged), plain.matrices()[0])
    by_name = {matrix.name: sensitivity for matrix, sensitivity in found.items()}
    assert len(by_name) == len(expected) == 14
    for matrix, sensitivity in expected.items():
        assert by_name[matrix.name].slopes.mean(0) == pytest.approx(sensitivity.slopes.mean(0), rel=1e-2, abs=1e-4), (
            matrix.name
        )
        assert by_name[matrix.name].energies.sum() == pytest.approx(sensitivity.energies.sum(), rel=1e-4)


@settings(deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=8), st.data())
def test_what_is_lost_grows_with_what_is_removed(slopes, data):
    energies = data.draw(st.lists(st.integers(0, 9), min_size=len(slopes), max_size=len(slopes)))
    found = Sensitivity(np.array([slopes]), np.array(energies))
    lost = [found.output_lost(rank) for rank in range(len(slopes) + 1)]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] == 0
    assert lost[0] == (pytest.approx(1) if sum(energies) else 0)
    assert found.first_order(0) == pytest.approx(-sum(slopes), abs=1e-9)
    assert found.first_order(len(slopes)) == 0
    penalty = prediction.OUTPUT_WEIGHT * found.output_lost(0)
    assert found.predicted(0) == found.first_order(0) - penalty, "one pair alone has no standard error"


@settings(deadline=None)
@given(st.integers(2, 9), st.integers(0, 4), st.integers(0, 99))
def test_a_prediction_is_lower_the_less_the_pairs_agree(pairs_count, rank, seed):
    slopes = np.random.default_rng(seed).normal(size=(pairs_count, 4))
    found = Sensitivity(slopes, np.ones(4))
    assert found.first_order(rank) == pytest.approx(-slopes[:, rank:].sum() / pairs_count)
    assert found.standard_error(rank) == pytest.approx(sem(slopes[:, rank:].sum(1)))
    agreed = Sensitivity(np.repeat(slopes.mean(0, keepdims=True), pairs_count, 0), np.ones(4))
    assert agreed.first_order(rank) == pytest.approx(found.first_order(rank))
    penalty = prediction.OUTPUT_WEIGHT * agreed.output_lost(rank)
    assert agreed.predicted(rank) == pytest.approx(agreed.first_order(rank) - penalty)
    assert found.predicted(rank) <= agreed.predicted(rank) + 1e-12


def test_each_pair_has_the_slopes_it_has_alone(tiny_model, tokenizer, pairs):
    """Also a pair without a rejected answer, whose margin is that of the chosen one."""
    usable = pairs_from_rows(pairs).pairs
    usable = [*usable[:2], replace(usable[2], rejected=None)]
    weights, prompter = Weights(tiny_model), Prompter(tokenizer, "chatml", context=512)
    matrices = weights.matrices()[0]
    together = sensitivities(weights, MarginScorer(tiny_model, prompter, usable, batch_size=4), matrices)
    for place, pair in enumerate(usable):
        alone = sensitivities(weights, MarginScorer(tiny_model, prompter, [pair], batch_size=4), matrices)
        for matrix in matrices:
            assert alone[matrix].slopes.shape == (1, min(matrix.shape))
            assert together[matrix].slopes[place] == pytest.approx(alone[matrix].slopes[0], rel=1e-4, abs=1e-7)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.sampled_from([torch.float64, torch.bfloat16]))
def test_components_are_the_singular_values_and_short_side_vectors(rows, columns, seed, dtype):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    values, vectors = components(weight)
    expected = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    short = min(rows, columns)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(short, dtype=vectors.dtype), rtol=1e-5, atol=1e-5)
    upright = weight if rows >= columns else weight.mT
    lengths = torch.linalg.vector_norm(upright.to(vectors.dtype) @ vectors, dim=0)
    torch.testing.assert_close(lengths, values, rtol=1e-5, atol=1e-5)
