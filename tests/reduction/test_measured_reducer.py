from __future__ import annotations

import numpy as np
import pytest
import torch

from splaser_plugin.errors import OutputError, SpectrumError
from splaser_plugin.reduction import moments
from splaser_plugin.reduction.calibration import Row, mixed, token_count, window_rows
from splaser_plugin.reduction.measured_reducer import _decomposed, measured_reducer, stored_bytes
from splaser_plugin.reduction.moments import measure
from splaser_plugin.reduction.truncation import decompose_by_moments
from splaser_plugin.spectra import spectrum
from splaser_plugin.weights.in_memory import Weights
from tests.builders import changed, states, tiny_llama
from tests.reduction.held import BOUND, held_bytes

ROWS = window_rows(torch.randint(3, 64, (6, 20), generator=torch.Generator().manual_seed(0)).tolist())


@pytest.fixture
def weights():
    return Weights(tiny_llama(vocabulary=64))


@pytest.mark.parametrize("way", ["whitened", "fisher"])
def test_matrices_are_truncated_by_their_own_moments(weights, way):
    matrices = weights.matrices()[0][3:6]
    measured = dict(measure(weights, matrices, ROWS, seed=3))
    reducer = measured_reducer(weights, matrices, ROWS, way=way, seed=3)
    for matrix in matrices:
        weight = weights.read(matrix).clone()
        expected = decompose_by_moments(weight, measured[matrix], with_gradients=way == "fisher")
        assert np.array_equal(reducer.costs[matrix], expected.costs)
        assert torch.equal(reducer.truncated(matrix, weight, 5), expected.truncated(weight, 5))
        left, right = reducer.factors(matrix, weight, 5)
        assert torch.allclose(left @ right, expected.truncated(weight, 5), atol=1e-5)


def test_no_matrix_is_held_while_the_next_ones_are_measured(weights, monkeypatch):
    with held_bytes(monkeypatch) as held:
        monkeypatch.setattr("splaser_plugin.reduction.measured_reducer.measure", moments.measure)
        measured_reducer(weights, weights.matrices()[0], ROWS, way="fisher")
    assert len(held) > 3 and max(held) <= BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_kept_of_a_matrix_takes_the_space_that_is_checked_beforehand(dtype, tmp_path):
    weights = Weights(tiny_llama(vocabulary=64).to(dtype))
    matrices = weights.matrices()[0][3:6]
    measured_reducer(weights, matrices, ROWS, way="fisher", folder=tmp_path)
    for place, matrix in enumerate(matrices):
        header = 500
        assert 0 < (tmp_path / f"{place}.safetensors").stat().st_size - stored_bytes(matrix, dtype) < header


def test_a_weight_reduced_before_goes_on_to_the_same_matrix(weights):
    matrix = weights.matrices()[0][6]
    weights.reduce_by(measured_reducer(weights, [matrix], ROWS, way="fisher"))
    at_once = weights.reducer.truncated(matrix, weights.read(matrix).clone(), 4)
    weights.reduce(matrix, 12)
    weights.reduce(matrix, 4)
    assert torch.allclose(weights.read(matrix), at_once, atol=1e-5)


def test_svd_is_the_plain_truncation_bit_for_bit(weights):
    before = states(weights.model)
    matrices, _ = weights.matrices()
    plain = Weights(tiny_llama(vocabulary=64))
    weights.reduce_by(measured_reducer(weights, matrices, (), way="svd"))
    for matrix in matrices:
        weights.reduce(matrix, 7)
        plain.reduce(matrix, 7)
    assert changed(before, weights.model.state_dict())
    assert not changed(plain.model.state_dict(), weights.model.state_dict())
    squares = spectrum.singular_values(before[matrices[0].parameter]) ** 2
    assert weights.reducer.costs[matrices[0]][7] == pytest.approx(squares[7:].sum() / 2)


def test_what_no_token_reaches_is_left_out_with_the_reason(weights):
    matrices, _ = weights.matrices(include=["model.embed_tokens", "layers.0.self_attn.q_proj"])
    reducer = measured_reducer(weights, matrices, ROWS, way="fisher")
    assert [matrix.name for matrix in reducer.left_out] == ["model.embed_tokens"]
    assert [matrix.name for matrix in reducer.costs] == ["model.layers.0.self_attn.q_proj"]


READS_ZEROS = "the calibration rows give it nothing but zeros to read"
HANGS_ON = "no prediction of the calibration rows hangs on it"


@pytest.mark.parametrize(
    ("way", "zeros", "reasons"),
    [
        ("fisher", "o_proj", {"q_proj": HANGS_ON, "k_proj": HANGS_ON, "v_proj": HANGS_ON, "o_proj": "it is zero"}),
        ("whitened", "o_proj", {"o_proj": "it is zero"}),
        ("fisher", "v_proj", {"q_proj": HANGS_ON, "k_proj": HANGS_ON, "v_proj": "it is zero", "o_proj": READS_ZEROS}),
        ("whitened", "v_proj", {"v_proj": "it is zero", "o_proj": READS_ZEROS}),
        ("fisher", "up_proj", {"gate_proj": HANGS_ON, "up_proj": "it is zero", "down_proj": READS_ZEROS}),
        ("whitened", "up_proj", {"up_proj": "it is zero", "down_proj": READS_ZEROS}),
        ("svd", "o_proj", {"o_proj": "it is zero"}),
    ],
)
def test_what_costs_nothing_at_any_rank_is_left_whole_with_the_reason(way, zeros, reasons, weights, tmp_path):
    """As in blocks that were added with zeros, to be trained."""
    block = weights.model.model.layers[1]
    for part in (block.self_attn, block.mlp):
        if hasattr(part, zeros):
            getattr(part, zeros).weight.data.zero_()
    matrices = weights.matrices()[0]
    reducer = measured_reducer(weights, matrices, ROWS, way=way, folder=tmp_path)
    expected = {name: f"{reason}, so nothing tells its ranks apart" for name, reason in reasons.items()}
    assert {skipped.name.split(".")[-1]: skipped.reason for skipped in reducer.left_out} == expected
    assert all(skipped.name.startswith("model.layers.1.") for skipped in reducer.left_out)
    assert len(reducer.costs) == len(matrices) - len(reasons)
    if way != "svd":
        again = measured_reducer(weights, matrices, (), way=way, folder=tmp_path)
        assert again.left_out == reducer.left_out and list(again.costs) == list(reducer.costs)


def test_a_stop_during_the_statistics_loses_the_pass_at_work_alone(weights, tmp_path, monkeypatch):
    where, asked = "splaser_plugin.reduction.measured_reducer.measure", []
    matrices = weights.matrices()[0]
    first, *others = moments._groups(matrices, BOUND)

    def stopped(weights, matrices, rows, **how):
        yield from measure(weights, matrices[: len(first)], rows, **how)
        raise KeyboardInterrupt

    def goes_on(weights, matrices, rows, **how):
        asked.extend(matrices)
        return measure(weights, matrices, rows, group_bytes=BOUND, **how)

    monkeypatch.setattr(where, stopped)
    with pytest.raises(KeyboardInterrupt):
        measured_reducer(weights, matrices, ROWS, way="fisher", folder=tmp_path)
    monkeypatch.setattr(where, goes_on)
    assert list(measured_reducer(weights, matrices, ROWS, way="fisher", folder=tmp_path).costs) == matrices
    assert asked == [matrix for group in others for matrix in group]


def test_a_matrix_that_can_not_be_decomposed_is_named(weights):
    matrix = weights.matrices()[0][0]
    (_, moments) = next(measure(weights, [matrix], ROWS))
    moments.short[0, 0] = float("nan")
    with pytest.raises(SpectrumError, match=r"layers\.0\.self_attn\.q_proj: the moments of the shorter side"):
        _decomposed(weights, matrix, moments, with_gradients=True)


def test_a_temporary_folder_that_is_gone_is_told(weights, monkeypatch):
    def fails(tensors, path, about):
        raise OSError("No space left on device")

    monkeypatch.setattr("splaser_plugin.reduction.measured_reducer.save_file", fails)
    with pytest.raises(OutputError, match=r"q_proj can't be written there \(No space left on device\). Make room"):
        measured_reducer(weights, weights.matrices()[0][:1], ROWS, way="fisher")


def test_answers_and_windows_share_the_tokens():
    answers, windows = [Row(tuple(range(10)), 4)] * 30, [Row(tuple(range(20)))] * 30
    both = mixed(answers, windows, 200)
    assert token_count(row for row in both if row.first) == 100 and token_count(both) == 200
    assert token_count(mixed(answers, windows[:2], 200)) == 200
    assert token_count(mixed(answers[:1], windows, 200)) == pytest.approx(200, abs=20)
    assert mixed(answers, [], 95) == answers[:10]
    assert mixed([], windows, 30) == windows[:2]
