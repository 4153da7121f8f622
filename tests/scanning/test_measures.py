from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splaser_plugin import ScanConfig, scan
from splaser_plugin.errors import ConfigError
from splaser_plugin.scanning.measures import condition_number, evenly_spaced
from splaser_plugin.scanning.records import matrix_scan
from splaser_plugin.scanning.selection import choose
from splaser_plugin.scanning.spectrum_format import published_from_dict
from splaser_plugin.spectra.spectrum import singular_values
from splaser_plugin.weights.matrices import Matrix
from tests.builders import blocks, save_single, scan_of

NAMES = [f"model.layers.{block}.mlp.down_proj" for block in range(12)]
TWELVE = blocks({"mlp.down_proj": [float(n) for n in range(12)]})


def planted(values, rows, seed=0):
    """A matrix with exactly these singular values, but for rounding in float64."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    return torch.from_numpy(left * np.asarray(values) @ right)


def record(weight, precision):
    matrix = Matrix("model.layers.0.mlp.up_proj", "w", "mlp.up_proj", 0, tuple(weight.shape))
    return matrix_scan(matrix, singular_values(weight, precision=precision))


@settings(deadline=None, max_examples=30)
@given(exponent=st.floats(0.1, 9.0), rows=st.integers(24, 90), seed=st.integers(0, 9))
def test_a_condition_number_is_right_to_a_hundredth_or_refused(exponent, rows, seed):
    weight = planted(np.geomspace(1.0, 10**-exponent, 24), rows, seed)
    exact = np.linalg.cond(weight.numpy())
    assert condition_number(record(weight, "svd"), "svd") == pytest.approx(exact, rel=1e-5)
    for precision in ("auto", "float32"):
        try:
            assert condition_number(record(weight, precision), precision) == pytest.approx(exact, rel=0.01)
        except ConfigError as error:
            assert "--precision svd" in str(error)
            assert exponent > (4 if precision == "auto" else 1)


def test_a_matrix_that_has_lost_a_dimension_has_no_condition_number():
    weight = planted(np.ones(24), 40)
    weight[:, 3] = weight[:, 5]
    assert condition_number(record(weight, "svd"), "svd") is None


def test_the_best_conditioned_are_chosen_from_a_scan_by_svd(tmp_path):
    conditions = [1e3, 30.0, 1e7, 3.0]
    tensors = {
        f"model.layers.{block}.mlp.up_proj.weight": planted(np.geomspace(1, 1 / condition, 24), 40)
        for block, condition in enumerate(conditions)
    }
    folder = save_single(tmp_path, tensors)
    with pytest.raises(ConfigError, match=r"layers\.2\.mlp\.up_proj is so ill-.*`splaser scan --precision svd`"):
        choose(scan(folder), top=2, by="kappa")
    selection = choose(scan(folder, config=ScanConfig(precision="svd")), top=3, by="kappa")
    assert selection.names == [f"model.layers.{block}.mlp.up_proj" for block in (3, 1, 0)]
    assert [matrix.value for matrix in selection.matrices] == pytest.approx([3.0, 30.0, 1e3], rel=1e-5)
    assert selection.rule == "top 3 of each module type by kappa, lowest first"


def test_a_random_choice_is_the_seeds_and_not_the_files():
    shuffled = random.Random(1).sample(TWELVE, 12)
    draws = [choose(scan_of(*TWELVE), top=6, by="random", seed=seed).names for seed in range(200)]
    assert choose(scan_of(*shuffled), top=6, by="random", seed=3).names == draws[3]
    often = np.array([sum(name in draw for draw in draws) for name in NAMES])
    assert np.abs(often - 100).max() < 4 * np.sqrt(200 / 4)  # four standard deviations of a fair draw
    assert choose(scan_of(*TWELVE), top=6, by="random", seed=3).rule == "6 of each module type at random (seed 3)"


def test_a_uniform_choice_is_evenly_spaced_by_depth():
    shuffled = random.Random(1).sample(TWELVE, 12)
    selection = choose(scan_of(*shuffled), top=4, by="uniform")
    assert selection.names == [NAMES[block] for block in (1, 4, 7, 10)]
    assert selection.rule == "4 of each module type evenly spaced by depth"
    for total in range(1, 40):
        for count in range(1, total + 1):
            places = evenly_spaced(count, total)
            assert len(set(places)) == count
            assert [total - 1 - place for place in reversed(places)] == pytest.approx(places, abs=1)


def test_controls_need_no_figures_so_a_published_scan_will_do():
    published = published_from_dict({name: {"snr": 1.0, "type": "mlp.down_proj"} for name in NAMES}, "snr.json")
    assert choose(published, top=4, by="uniform").names == [NAMES[block] for block in (1, 4, 7, 10)]
    with pytest.raises(ConfigError, match=r"by kappa edge iqr: snr\.json holds only snr_ratio"):
        choose(published, top=4, by="kappa")


def test_measured_values_are_those_given_and_what_has_none_comes_last():
    values = {name: float(number % 5) for number, name in enumerate(NAMES[:10])}
    selection = choose(scan_of(*TWELVE), top=12, by="fisher", importances=values)
    assert selection.names[:2] == [NAMES[4], NAMES[9]]
    assert selection.names[-2:] == NAMES[10:]
    assert [matrix.value for matrix in selection.matrices][-3:] == [0.0, None, None]
    with pytest.raises(ConfigError, match=r"none of the scan's matrices was measured.*Measure the model that was"):
        choose(scan_of(*TWELVE), top=12, by="fisher", importances={"another.model": 1.0})
    with pytest.raises(ConfigError, match=r"by gradient: a scan doesn.t have it.*Give text FILE"):
        choose(scan_of(*TWELVE), top=1, by="gradient")


def test_a_text_that_nothing_is_measured_on_is_refused():
    with pytest.raises(ConfigError, match="text goes with by fisher or gradient, and this is by snr"):
        choose(scan_of(*TWELVE), top=1, by="snr", text="notes.txt")
