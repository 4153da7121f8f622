from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from splaser_plugin.checkpoints.checkpoint import open_checkpoint
from splaser_plugin.cli.demo import MODEL_WHEEL, _wheel
from splaser_plugin.config.stages import ScanConfig
from splaser_plugin.errors import ConfigError, RecipeError, SpectrumError
from splaser_plugin.scanning.scan import Scan, scan_source
from splaser_plugin.scanning.scan import scan as run_scan
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.stored import StoredWeights
from tests.benchmarks.scan_memory import measure, write_llama
from tests.builders import save_sharded, save_single, tiny_llama
from tests.reference import snr_and_rank, thresholds
from tests.scanning.checkpoints import Notes, layers, mixture


def test_agrees_with_the_published_arithmetic(tiny_model):
    scan = scan_source(Weights(tiny_model))
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
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    live = {matrix.name: matrix for matrix in scan_source(Weights(model)).matrices}
    stored = {matrix.name: matrix for matrix in scan_source(StoredWeights(open_checkpoint(tmp_path))).matrices}
    assert live == stored


def test_a_scan_refuses_a_device_that_isnt_there(tiny_folder, splaser, tmp_path):
    with pytest.raises(ConfigError, match=r"device cuda:77: not usable here .* Try device cpu"):
        run_scan(tiny_folder, config=ScanConfig(device="cuda:77"))
    code, _, stderr = splaser("scan", tiny_folder, "-o", tmp_path / "scan.json", "--device", "cuda:77")
    assert code == 2 and "--device cuda:77: not usable here" in stderr


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 2.00 GiB.", "CUDA error: out of memory"])
def test_a_full_device_is_one_line_and_the_cpu_goes_on_from_there(said, tiny_folder, tmp_path, monkeypatch):
    expected = run_scan(tiny_folder)
    made, times = StoredWeights._made, iter(range(9))

    def third_is_too_large(self, matrix, tensors):
        if next(times) == 2:
            raise torch.OutOfMemoryError(said) if "Tried" in said else RuntimeError(said)
        return made(self, matrix, tensors)

    name = expected.matrices[2].name
    with monkeypatch.context() as full:
        full.setattr(StoredWeights, "_made", third_is_too_large)
        with pytest.raises(
            SpectrumError, match=rf"^{name}: no memory is left to scan it \({said}\)\. .* device cpu\.$"
        ):
            run_scan(tiny_folder, output=tmp_path / "scan.json")
    facts = Notes()
    config = ScanConfig(device="cpu")
    assert run_scan(tiny_folder, config=config, output=tmp_path / "scan.json", progress=facts) == expected
    assert facts.facts["scanned before"].startswith("2 of ")


def test_a_saved_scan_comes_back_equal_and_has_the_documented_fields(tiny_model, tmp_path):
    scan = scan_source(Weights(tiny_model), name="tiny", identity="abc", config=ScanConfig(edge="mp"))
    scan.save(tmp_path / "scan.json")
    assert Scan.load(tmp_path / "scan.json") == scan
    stored = json.loads((tmp_path / "scan.json").read_text())
    assert stored == json.loads(json.dumps(scan.to_dict()))
    assert stored["schema"] == "splaser.scan/1"
    assert (stored["model"], stored["edge"]) == ("tiny", "mp")
    first = stored["matrices"][0]
    assert {"name", "type", "block", "shape", "max_singular_value", "edges"} <= set(first)
    assert set(first["edges"]) == {"iqr", "mp", "gavish-donoho"}
    assert set(first["edges"]["mp"]) == {"sigma", "threshold", "rank", "snr", "snr_ratio", "reason"}
    assert stored["skipped"][0].keys() == {"name", "reason", "tied_to"}


def test_matrices_without_noise_rank_above_all_others_and_by_their_headroom(tiny_model):
    weights = Weights(tiny_model)
    matrices = [matrix for matrix in weights.matrices()[0] if matrix.type == "mlp.down_proj"]
    steep = torch.zeros(matrices[0].shape)
    steep.diagonal().copy_(torch.linspace(1.0, 2.0, 32))
    flat = torch.zeros(matrices[1].shape)
    flat.diagonal().copy_(torch.linspace(1.8, 2.0, 32))
    weights.write(matrices[0], flat)
    weights.write(matrices[1], steep)
    ranked = scan_source(weights).ranked()
    assert [matrix.name for matrix in ranked[-2:]] == [matrices[1].name, matrices[0].name]
    for matrix in ranked[-2:]:
        fit = matrix.edges["iqr"]
        assert fit.snr is None
        assert fit.snr_ratio is None
        assert fit.reason


def test_the_kept_spectrum_spans_all_singular_values(tiny_model):
    scan = scan_source(Weights(tiny_model))
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
        scan_source(Weights(tiny_model))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "schema is 'list'"),
        ('{"schema": "splaser.scan/9"}', r"schema is 'splaser\.scan/9', expected 'splaser\.scan/1'"),
        ('{"schema": "splaser.scan/1"}', r"not a whole scan \(model is missing\)"),
    ],
)
def test_a_damaged_scan_is_refused(tmp_path, text, message):
    (tmp_path / "scan.json").write_text(text)
    with pytest.raises(RecipeError, match=message):
        Scan.load(tmp_path / "scan.json")


@pytest.mark.parametrize("spectrum", [["1"], [10**400], 7])
def test_a_scan_whose_spectrum_is_not_of_numbers_is_refused(tiny_model, tmp_path, spectrum):
    stored = scan_source(Weights(tiny_model)).to_dict()
    stored["matrices"][0]["spectrum"] = spectrum
    (tmp_path / "scan.json").write_text(json.dumps(stored))
    with pytest.raises(RecipeError, match="not a whole scan"):
        Scan.load(tmp_path / "scan.json")


def test_a_missing_scan_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"can't be read \(No such file"):
        Scan.load(tmp_path / "scan.json")


def test_fused_experts_are_scanned_in_their_order_as_one_by_one(tmp_path):
    tensors = mixture()
    scan = scan_source(StoredWeights(open_checkpoint(save_sharded(tmp_path, [tensors]))))
    names = [matrix.name for matrix in scan.matrices if "down_proj" in matrix.name]
    assert names == [f"model.layers.{block}.mlp.experts.down_proj[{index}]" for block in range(2) for index in range(5)]
    for matrix in scan.matrices:
        parameter, _, expert = matrix.name.rstrip("]").partition("[")
        weight = tensors[parameter][int(expert)] if expert else tensors[parameter + ".weight"]
        values = torch.linalg.svdvals(weight.double()).numpy()
        np.testing.assert_allclose(matrix.spectrum, values, rtol=1e-5)
        assert matrix.max_singular_value == pytest.approx(values[0], rel=1e-9)


def test_an_expert_that_is_not_finite_is_named(tmp_path):
    tensors = mixture()
    tensors["model.layers.1.mlp.experts.gate_up_proj"][3, 0, 0] = float("inf")
    with pytest.raises(SpectrumError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj\[3\]: .*inf or nan"):
        scan_source(StoredWeights(open_checkpoint(save_sharded(tmp_path, [tensors]))))


def test_a_scan_in_parts_has_the_same_bits_also_where_experts_are_computed_together(tmp_path):
    model, output = open_checkpoint(save_sharded(tmp_path / "model", [mixture(), layers(3)])), tmp_path / "scan.json"
    whole = scan_source(StoredWeights(model), output=tmp_path / "whole.json")
    scan_source(StoredWeights(model), output=output)
    stored = json.loads(output.read_text())
    stored["matrices"] = stored["matrices"][::3]
    output.write_text(json.dumps(stored))
    notes = Notes()
    assert scan_source(StoredWeights(model), output=output, progress=notes) == whole
    assert 0 < notes.computed < len(whole.matrices)
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_odd_weights_give_finite_numbers_or_a_reason(tmp_path):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 24, generator=generator)
    odd = {
        "zeros": torch.zeros(16, 24),
        "equal": torch.ones(16, 24),
        "rank_one": noise[:, :1] @ noise[:1],
        "row": noise[:1],
        "column": noise[:, :1].clone(),
        "one": noise[:1, :1].clone(),
        "denormal": noise * 1e-40,
        "huge": (noise * 1e30).bfloat16(),
        "half": noise.half(),
        "float8": noise.to(torch.float8_e4m3fn),
        "float64": noise.double() * 1e200,
    }
    tensors = {f"model.layers.0.{name}.weight": tensor for name, tensor in odd.items()}
    scan = run_scan(str(save_single(tmp_path / "model", tensors)), output=tmp_path / "scan.json")
    assert len(scan.matrices) == len(odd)
    for matrix in scan.matrices:
        for fit in matrix.edges.values():
            assert np.isfinite([fit.sigma, fit.threshold, fit.rank]).all()
            assert (fit.snr is None or fit.snr_ratio is None) == bool(fit.reason)
    assert "NaN" not in (tmp_path / "scan.json").read_text()
    assert "Infinity" not in (tmp_path / "scan.json").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_bound_by_the_largest_matrix(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "model").mkdir()
    tensors = write_llama(tmp_path / "model", 512, torch.float32, total_bytes=217 * 10**6)
    row = measure("small", tmp_path / "model", tensors, tmp_path / "scan.json")
    assert row.checkpoint_bytes > row.allowed_bytes
    assert row.peak_bytes <= row.allowed_bytes


@pytest.mark.real
def test_a_gguf_file_is_scanned_through_the_same_code(tmp_path):
    gguf = next(_wheel(*MODEL_WHEEL).glob("*.gguf"))
    some = ScanConfig(include=("layers.3.self_attn.k_proj", "layers.29.mlp.down_proj"))
    notes = Notes()
    scan = run_scan(gguf, config=some, output=tmp_path / "scan.json", progress=notes)
    assert notes.computed == 2
    assert [(matrix.type, matrix.block) for matrix in scan.matrices] == [("self_attn.k_proj", 3), ("mlp.down_proj", 29)]
    assert Scan.load(tmp_path / "scan.json") == scan
