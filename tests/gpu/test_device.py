"""Spectra, reductions, statistics, answers and embeddings on a device are those of the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from splaser_plugin import LaserConfig, ScanConfig, laser, scan
from splaser_plugin.checkpoints.checkpoint import open_checkpoint
from splaser_plugin.generation.generator import Generator
from splaser_plugin.generation.loop import _HalfEnded, _SeenNan
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.generation.teacher_forcing import mean_log_probabilities
from splaser_plugin.reduction.calibration import Row
from splaser_plugin.reduction.moments import measure
from splaser_plugin.scoring.embedding import SelfEmbedder, SentenceEmbedder
from splaser_plugin.spectra import spectrum
from splaser_plugin.spectra.spectrum import factors, singular_values, singular_values_of_batch, truncate
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.stored import StoredWeights
from tests.builders import QUICK, THREE_PAIRS, tiny_llama
from tests.planted import Facts

PROMPTS = [list(range(5, 5 + length)) for length in (3, 9, 4, 7, 5)]


def noisy(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator)


def ill_conditioned(rows, columns):
    left, right = (
        torch.linalg.qr(noisy(rows, columns).double())[0],
        torch.linalg.qr(noisy(columns, columns).double())[0],
    )
    return (left * torch.logspace(0, -10, columns, dtype=torch.float64)) @ right


WEIGHTS = {
    "noise": lambda: noisy(200, 120),
    "bfloat16": lambda: noisy(120, 200).bfloat16(),
    "float16": lambda: noisy(120, 120).half(),
    "ill-conditioned": lambda: ill_conditioned(150, 100),
    "long and ill-conditioned": lambda: ill_conditioned(400, 60),
    "low rank": lambda: noisy(300, 5) @ noisy(5, 80),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_singular_values_are_those_of_a_plain_svd_in_float64(name, device):
    weight = WEIGHTS[name]()
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    values = singular_values(weight.to(device))
    resolved = expected > 1e-9 * expected[0]
    np.testing.assert_allclose(values[resolved], expected[resolved], rtol=1e-6)
    np.testing.assert_allclose(values, expected, atol=1e-9 * expected[0])


def test_a_batch_gives_what_each_of_its_weights_gives(device):
    stack = torch.stack([noisy(40, 30, seed) for seed in range(12)] + [ill_conditioned(40, 30).float()])
    expected = [singular_values(weight) for weight in stack]
    np.testing.assert_allclose(singular_values_of_batch(stack.to(device)), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("rank", [5, 40])
def test_a_truncation_is_that_of_a_plain_svd_and_stays_on_the_device(name, rank, device):
    weight = WEIGHTS[name]()
    left, values, right = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    expected = torch.from_numpy((left[:, :rank] * values[:rank]) @ right[:rank])
    truncated = truncate(weight.to(device), rank)
    assert truncated.device.type == device.type
    assert truncated.dtype == weight.dtype
    tolerance = float(torch.finfo(weight.dtype).eps) * float(weight.abs().max()) + 1e-5 * float(values[0])
    torch.testing.assert_close(truncated.cpu().double(), expected, rtol=0, atol=tolerance)
    tall, wide = factors(weight.to(device), rank)
    torch.testing.assert_close((tall @ wide).cpu().double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adding_up_a_gram_matrix_waits_for_nothing(dtype, device, unsynchronised):
    weight = noisy(5000, 300).bfloat16().to(device)
    spectrum._gram(weight, 0, dtype)  # kernels that are loaded at first use may wait
    with unsynchronised():
        gram = spectrum._gram(weight, 0, dtype)
    expected = weight.double().mT @ weight.double()
    torch.testing.assert_close(gram.tril().double(), expected.tril(), rtol=1e-4, atol=1e-2)


def test_a_step_of_generation_waits_for_nothing(device, unsynchronised):
    ids = torch.tensor([[5, 2], [5, 6]], device=device)
    half, nan = _HalfEnded(2, torch.tensor([2], device=device)), _SeenNan()
    half(ids, None), nan(ids, torch.ones(2, 8, device=device))
    with unsynchronised():
        stops = half(ids, None)
        nan(ids, torch.full((2, 8), torch.nan, device=device))
    assert stops.tolist() == [True, True]
    assert nan.was_seen


@pytest.mark.parametrize("batch_size", [0, 1, 3])
def test_greedy_answers_are_those_of_the_cpu(batch_size, device, tokenizer):
    def answers(model):
        prompter = Prompter(tokenizer, context=512)
        return Generator(model, prompter, max_new_tokens=24, batch_size=batch_size).answer(PROMPTS)

    assert answers(tiny_llama().to(device)) == answers(tiny_llama())


def test_log_probabilities_are_those_of_the_cpu(device):
    given = {"prompts": PROMPTS, "answers": PROMPTS[::-1], "batch_size": 2}
    found = mean_log_probabilities(tiny_llama().to(device), **given)
    assert found == pytest.approx(mean_log_probabilities(tiny_llama(), **given), abs=1e-4)


def test_the_statistics_of_a_reduction_are_those_of_the_cpu_and_lie_on_the_device(device):
    rows = [Row(tuple(range(5, 25)), 3), Row(tuple(range(30, 64)))]
    model, plain = tiny_llama().to(device), tiny_llama()
    weights = Weights(model)
    matrices = weights.matrices()[0]
    expected = {matrix.name: moments for matrix, moments in measure(Weights(plain), matrices, rows)}
    for matrix, moments in measure(weights, matrices, rows):
        assert moments.short.device.type == device.type
        for ours, theirs in ((moments.short, expected[matrix.name].short), (moments.gram, expected[matrix.name].gram)):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"reduce": "whitened"}, {"reduce": "fisher"}, {"rank_by": "gradient"}], ids=str)
def test_a_search_on_the_device_tries_and_keeps_what_one_on_the_cpu_does(change, device, tiny_folder):
    config = {**QUICK, **change, "max_new_tokens": 4, "candidates": 3}
    found = laser(tiny_folder, THREE_PAIRS, config=LaserConfig(**{**config, "device": device.type}))
    expected = laser(tiny_folder, THREE_PAIRS, config=LaserConfig(**{**config, "device": "cpu"}))
    assert [trial.candidate.matrix.name for trial in found.search.trials] == [
        trial.candidate.matrix.name for trial in expected.search.trials
    ]
    assert found.search.ranks == expected.search.ranks
    assert found.score_after == pytest.approx(expected.score_after, abs=1e-4)


def test_a_scan_from_disk_on_the_device_finds_what_the_cpu_finds(device, tmp_path):
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path)
    told = Facts()
    found = scan(tmp_path, config=ScanConfig(device=str(device)), progress=told)
    assert dict(told.facts)["device"] == str(device)
    expected = scan(tmp_path, config=ScanConfig(device="cpu"))
    assert [matrix.name for matrix in found.matrices] == [matrix.name for matrix in expected.matrices]
    for one, other in zip(found.matrices, expected.matrices, strict=True):
        assert one.max_singular_value == pytest.approx(other.max_singular_value, rel=1e-9)
        for edge in one.edges:
            assert one.edges[edge].rank == other.edges[edge].rank


def test_matrices_are_brought_to_the_device(device, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    stored = StoredWeights(open_checkpoint(tmp_path), device)
    matrices, _ = stored.matrices()
    assert {weight.device.type for _, weight in stored.stream(matrices, matrices)} == {device.type}


def test_the_models_own_embeddings_are_those_of_the_cpu(device, tokenizer):
    def embedded(model):
        return SelfEmbedder(Weights(model), tokenizer, batch_size=2).embed(["A cat.", "Three words here.", "x"])

    torch.testing.assert_close(embedded(tiny_llama().to(device)), embedded(tiny_llama()), rtol=0, atol=1e-4)


@pytest.mark.real
def test_sentences_are_embedded_on_the_device(device, minilm):
    texts = ["The cat sat on the mat.", "Prices rose by a third.", "Hello!"]
    embedder = SentenceEmbedder(str(minilm), device)
    assert next(embedder._model.parameters()).device.type == device.type
    expected = SentenceEmbedder(str(minilm), torch.device("cpu")).embed(texts)
    torch.testing.assert_close(embedder.embed(texts), expected, rtol=0, atol=1e-4)


def test_what_is_too_much_for_the_device_is_answered_in_smaller_batches(cuda, tokenizer):
    """With room for a few answers beside the model: the largest batch doesn't fit, a smaller one does."""
    model = tiny_llama(hidden_size=256, num_hidden_layers=8, max_position_embeddings=4096).to(cuda)
    prompts = [list(range(5, 405)) for _ in range(512)]
    prompter = Prompter(tokenizer, context=4096)
    alone = Generator(model, prompter, max_new_tokens=8, batch_size=1).answer(prompts[:1])
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(cuda)
    used = torch.cuda.memory_reserved(cuda)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (used + min(free, 2**31)) / total), cuda)
    try:
        generator = Generator(model, prompter, max_new_tokens=8, batch_size=512)
        answers = generator.answer(prompts)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, cuda)
    assert generator.engine.at_once < 512
    assert len(answers) == 512
    assert answers[0].text == alone[0].text
