from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from splaser_plugin.errors import RecipeError
from splaser_plugin.scanning.scan import Scan
from splaser_plugin.scanning.selection import choose
from splaser_plugin.scanning.spectrum_format import (
    load_scan,
    published_dict,
    published_from_dict,
    published_name,
    save_published,
)
from tests.builders import blocks, entry, scan_of

PLAIN = {
    "model.layers.0.mlp.down_proj": {"snr": 1.5, "type": "mlp.down_proj"},
    "model.layers.1.mlp.down_proj": {"snr": math.inf, "type": "mlp.down_proj"},
    "model.layers.0.input_layernorm": {"snr": math.inf, "type": "input_layernorm"},
    "lm_head": {"snr": 2.5, "type": "lm_head"},
}
SORTED = {
    "mlp.down_proj": {"model.layers.1.mlp.down_proj": math.inf, "model.layers.0.mlp.down_proj": 1.5},
    "input_layernorm": {"model.layers.0.input_layernorm": math.inf},
    "lm_head": {"lm_head": 2.5},
}
PUBLISHED = Path(__file__).parents[1] / "data" / "published_snr_SmolLM-135M.json"
"""What Spectrum's scanner wrote for HuggingFaceTB/SmolLM-135M."""


def test_the_plain_and_the_sorted_form_say_the_same(tmp_path):
    scans = []
    for name, content in {"plain.json": PLAIN, "sorted.json": SORTED}.items():
        (tmp_path / name).write_text(json.dumps(content))
        scans.append(load_scan(tmp_path / name))
    plain, by_type = scans
    assert set(plain.matrices) == set(by_type.matrices)
    assert {matrix.name: matrix.snr_ratio for matrix in plain.matrices} == {
        "model.layers.0.mlp.down_proj": 1.5,
        "model.layers.1.mlp.down_proj": None,
        "model.layers.0.input_layernorm": None,
        "lm_head": 2.5,
    }
    assert choose(plain, top=2).by_type == choose(by_type, top=2).by_type
    assert choose(plain, top=1).names == ["model.layers.1.mlp.down_proj"]


def test_the_order_of_the_file_does_not_matter():
    backwards = published_from_dict(dict(reversed(PLAIN.items())), "a.json")
    assert choose(backwards, top=2).names == choose(published_from_dict(PLAIN, "a.json"), top=2).names


def test_an_entry_without_a_type_gets_it_from_its_name():
    scan = published_from_dict({"model.layers.3.mlp.up_proj": {"snr": 1, "module": "mlp"}}, "old.json")
    assert (scan.matrices[0].type, scan.matrices[0].block) == ("mlp.up_proj", 3)


def test_a_published_scan_is_read_and_chosen_from():
    selection = choose(load_scan(PUBLISHED), fraction=0.5)
    types = ("gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")
    counts = {kind.rpartition(".")[2]: len(names) for kind, names in selection.by_type.items()}
    assert counts == dict.fromkeys(types, 15)
    figures = {name: entry["snr"] for name, entry in json.loads(PUBLISHED.read_text()).items()}
    for names in selection.by_type.values():
        values = [figures[name] for name in names]
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no entries"),
        ([], "not a whole scan|schema is 'list'"),
        ({"a": 1}, "entry 'a' is neither"),
        ({"a": {}}, "entry 'a' is neither"),
        ({"a": {"x": {"y": 1}}}, "entry 'a' is neither"),
        ({"a": {"snr": "high", "type": "b"}}, "a has snr 'high', expected a number of at least 0"),
        ({"a": {"snr": math.nan, "type": "b"}}, "a has snr nan"),
        ({"a": {"snr": -1.0, "type": "b"}}, "a has snr -1.0"),
        ({"a": {"snr": True, "type": "b"}}, "a has snr True"),
        ({"a": {"x": 1.0}, "b": {"x": 1.0}}, "x occurs twice"),
    ],
)
def test_what_is_no_scan_is_refused(content, message, tmp_path):
    path = tmp_path / "scan.json"
    path.write_text(json.dumps(content))
    with pytest.raises(RecipeError, match=message):
        load_scan(path)


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.json: can't be read"):
        load_scan(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"a": {"snr": 1')
    with pytest.raises(RecipeError, match=r"half\.json: not JSON"):
        load_scan(tmp_path / "half.json")


def test_a_scan_of_our_own_is_read_as_one(tmp_path):
    scan = scan_of(*blocks({"mlp.down_proj": [1.0, None]}))
    scan.save(tmp_path / "scan.json")
    assert isinstance(load_scan(tmp_path / "scan.json"), Scan)


def test_a_written_scan_has_no_infinity_and_leads_a_stable_sort_to_our_choice(tmp_path):
    far = entry("model.layers.0.mlp.down_proj", None, smallest=3.0)
    near = entry("model.layers.1.mlp.down_proj", None, smallest=1.1)
    rest = [entry(f"model.layers.{n}.mlp.down_proj", float(n)) for n in range(2, 6)]
    expert = entry("model.layers.0.mlp.experts.down_proj[0]", 1.0, kind="mlp.experts.down_proj")
    scan = scan_of(near, *rest, far, expert)
    save_published(scan, tmp_path / "snr.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    stored = json.loads((tmp_path / "snr.json").read_text(), parse_constant=refuse)
    assert set(stored) == {matrix.name for matrix in (near, far, *rest)}
    # as Spectrum and Axolotl's plugin choose: group by type, sort by snr, take the first
    ranked = sorted(stored.items(), key=lambda item: item[1]["snr"], reverse=True)
    assert [name for name, _ in ranked[:3]] == choose(scan, top=3).by_type["mlp.down_proj"]

    again = load_scan(tmp_path / "snr.json")
    assert {matrix.name for matrix in again.matrices if matrix.snr_ratio is None} == {near.name, far.name}


def test_the_chosen_edge_is_written():
    scan = scan_of(*blocks({"mlp.down_proj": [1.0]}))
    assert published_dict(scan, edge="mp")["model.layers.0.mlp.down_proj"]["type"] == "mlp.down_proj"


def test_the_file_is_named_as_axolotls_plugin_looks_for_it():
    assert published_name("Qwen/Qwen2_7B") == "snr_results_Qwen-Qwen2-7B.json"
