from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from splaser_plugin.checkpoint import open_checkpoint
from splaser_plugin.config import ScanConfig
from splaser_plugin.errors import RecipeError, SpectrumError
from splaser_plugin.scan import Scan, scan_checkpoint, scan_model
from splaser_plugin.weights import Weights
from tests.conftest import tiny_llama
from tests.reference import snr_and_rank, thresholds


def test_agrees_with_the_published_arithmetic(tiny_model):
    scan = scan_model(Weights(tiny_model))
    for matrix in scan.matrices:
        weight = tiny_model.get_parameter(matrix.name + ".weight").detach()
        for edge, threshold in thresholds(weight).items():
            got = matrix.edges[edge]
            snr, rank = snr_and_rank(weight, threshold)
            assert got.threshold == pytest.approx(threshold, rel=1e-6)
            assert got.rank == rank
            if got.snr is None:
                assert rank == min(weight.shape)
            else:
                assert got.snr == pytest.approx(snr, rel=1e-6)
                assert got.snr_ratio == pytest.approx(snr / matrix.max_singular_value, rel=1e-6)


def test_a_scan_from_disk_is_the_scan_of_the_loaded_model(tmp_path):
    model = tiny_llama(tie_word_embeddings=False).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    live = {matrix.name: matrix for matrix in scan_model(Weights(model)).matrices}
    stored = {matrix.name: matrix for matrix in scan_checkpoint(open_checkpoint(tmp_path)).matrices}
    assert live == stored


def test_a_saved_scan_comes_back_equal_and_has_the_documented_fields(tiny_model, tmp_path):
    scan = scan_model(Weights(tiny_model), name="tiny", identity="abc", config=ScanConfig(edge="mp"))
    scan.save(tmp_path / "scan.json")
    assert Scan.load(tmp_path / "scan.json") == scan
    stored = json.loads((tmp_path / "scan.json").read_text())
    assert stored["schema"] == "splaser.scan/1"
    assert (stored["model"], stored["edge"]) == ("tiny", "mp")
    first = stored["matrices"][0]
    assert {"name", "type", "block", "shape", "max_singular_value", "edges"} <= set(first)
    assert set(first["edges"]) == {"iqr", "mp", "gavish-donoho"}
    assert set(first["edges"]["mp"]) == {"sigma", "threshold", "rank", "snr", "snr_ratio", "reason"}
    assert stored["skipped"][0].keys() == {"name", "reason"}


def test_matrices_without_noise_rank_above_all_others_and_by_their_headroom(tiny_model):
    weights = Weights(tiny_model)
    matrices = [matrix for matrix in weights.matrices()[0] if matrix.type == "mlp.down_proj"]
    steep = torch.zeros(matrices[0].shape)
    steep.diagonal().copy_(torch.linspace(1.0, 2.0, 32))
    flat = torch.zeros(matrices[1].shape)
    flat.diagonal().copy_(torch.linspace(1.8, 2.0, 32))
    weights.write(matrices[0], flat)
    weights.write(matrices[1], steep)
    ranked = scan_model(weights).ranked()
    assert [matrix.name for matrix in ranked[-2:]] == [matrices[1].name, matrices[0].name]
    for matrix in ranked[-2:]:
        fit = matrix.edges["iqr"]
        assert fit.snr is None
        assert fit.snr_ratio is None
        assert fit.reason


def test_the_kept_spectrum_spans_all_singular_values(tiny_model):
    scan = scan_model(Weights(tiny_model))
    matrix = scan.matrices[0]
    values = torch.linalg.svdvals(tiny_model.get_parameter(matrix.name + ".weight").detach().double()).numpy()
    np.testing.assert_allclose(matrix.spectrum, values, rtol=1e-5)
    assert matrix.max_singular_value == pytest.approx(values[0], rel=1e-9)
    assert matrix.min_singular_value == pytest.approx(values[-1], rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tiny_model, bad):
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.up_proj.weight[3, 4] = bad
    with pytest.raises(SpectrumError, match=r"model\.layers\.1\.mlp\.up_proj"):
        scan_model(Weights(tiny_model))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "schema is 'list'"),
        ('{"schema": "splaser.scan/9"}', r"schema is 'splaser\.scan/9', expected 'splaser\.scan/1'"),
        ('{"schema": "splaser.scan/1"}', r"not a whole scan \('model'\)"),
    ],
)
def test_a_damaged_scan_is_refused(tmp_path, text, message):
    (tmp_path / "scan.json").write_text(text)
    with pytest.raises(RecipeError, match=message):
        Scan.load(tmp_path / "scan.json")


def test_a_missing_scan_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"can't be read \(No such file"):
        Scan.load(tmp_path / "scan.json")
