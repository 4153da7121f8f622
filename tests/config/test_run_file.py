from __future__ import annotations

import json

import pytest
import yaml

from splaser_plugin.config.run_file import read_run_file, run_file
from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.errors import ConfigError
from tests.builders import FLAGS, ROOT


@pytest.fixture
def folder(tiny_folder, pairs_file, tmp_path, monkeypatch):
    """Where a run.yaml stands that the command `splaser laser --config run.yaml` is enough for."""
    monkeypatch.chdir(tmp_path)
    values = {"model": str(tiny_folder), "pairs": pairs_file, "output": "out", "embedder": "self", "max_new_tokens": 6}
    text = yaml.safe_dump({**values, "candidates": 4, "edge": "mp", "device": "cpu", "include": ["mlp"], "race": False})
    (tmp_path / "run.yaml").write_text(text)
    return tmp_path


def recipe(folder):
    return json.loads((folder / "recipe.json").read_text())


@pytest.mark.slow
def test_a_file_alone_runs_and_flags_win_over_it(splaser, folder):
    code, _, stderr = splaser("laser", "--config", "run.yaml")
    assert code == 0, stderr
    settings = recipe(folder / "out")["settings"]
    given = ("candidates", "edge", "include", "race", "max_new_tokens")
    assert [settings[key] for key in given] == [4, "mp", ["mlp"], False, 6]
    flags = ["-o", "other", "--candidates", 1, "--include", "self_attn", "--race"]
    code, _, stderr = splaser("laser", "--config", "run.yaml", *flags)
    assert code == 0, stderr
    settings = recipe(folder / "other")["settings"]
    assert [settings[key] for key in given] == [1, "mp", ["self_attn"], True, 6]


@pytest.mark.slow
def test_run_yaml_of_the_output_gives_the_same_recipe_again(splaser, tiny_folder, pairs_file, tmp_path):
    held_out = ROOT / "examples" / "data" / "held_out.jsonl"
    options = [*FLAGS, "--held-out", held_out, "--samples", 8, "--alpha", 0.001, "--exclude", "layers.1.mlp"]
    splaser("laser", tiny_folder, "--pairs", pairs_file, "-o", tmp_path / "out", *options)
    recorded = tmp_path / "out" / "run.yaml"
    code, _, stderr = splaser("laser", "--config", recorded, "-o", tmp_path / "again")
    assert code == 0, stderr
    assert recipe(tmp_path / "again") == recipe(tmp_path / "out")
    assert (tmp_path / "again" / "run.yaml").read_bytes() == recorded.read_bytes()
    values = yaml.safe_load(recorded.read_text())
    assert values == {"model": str(tiny_folder), "pairs": pairs_file, **recipe(tmp_path / "out")["settings"]}


def test_a_file_that_counts_characters_says_what_to_write_instead(tmp_path):
    (tmp_path / "run.yaml").write_text("max_answer_chars: 512\n")
    with pytest.raises(ConfigError, match=r"'max_answer_chars' is not known; it is max_answer_tokens now, counted in"):
        read_run_file(tmp_path / "run.yaml", [LaserConfig], {})
    with pytest.raises(ConfigError, match="it is max_prompt_tokens now"):
        LaserConfig(max_prompt_chars=512)


def test_every_option_can_stand_in_the_file():
    config = LaserConfig(include=("a", "b"), alpha=1e-6, scorer="package.module.function", guard="perplexity:1.02",
                         text="on")  # fmt: skip
    values = yaml.safe_load(run_file({"model": "no", "pairs": ""}, config.to_dict()))
    assert values.pop("model") == "no"
    assert LaserConfig.from_dict(values) == config


def test_scan_takes_a_file_too(splaser, tiny_folder, tmp_path):
    values = {"model": str(tiny_folder), "output": str(tmp_path / "s.json"), "top": 1, "edge": "mp"}
    (tmp_path / "scan.yaml").write_text(yaml.safe_dump({**values, "top_json": str(tmp_path / "top.json")}))
    code, _, stderr = splaser("scan", "--config", tmp_path / "scan.yaml")
    assert code == 0, stderr
    assert json.loads((tmp_path / "s.json").read_text())["edge"] == "mp"
    assert {len(names) for names in json.loads((tmp_path / "top.json").read_text()).values()} == {1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("candidate: 3", "'candidate' is not known; nearest: candidates"),
        ("1: 3", "'1' is not known; nearest: "),
        ("candidates: three", "--candidates: got 'three', expected int"),
        ("candidates: 0", "--candidates: got 0, expected at least 1"),
        ("candidates: true", "--candidates: got True, expected int"),
        ("alpha: 1e-3", "--alpha: got '1e-3', expected float"),
        ("edge: iqrr", "--edge: got 'iqrr', expected one of iqr, mp"),
        ("include: mlp", "--include: got 'mlp', expected a list of text"),
        ("include: [1]", "--include: got [1], expected a list of text"),
        ("seed: {a: 1}", "seed: got dict, expected a plain value"),
        ("seed: [[1]]", "seed: got list, expected a plain value"),
        ("model: 3", "model: got 3, expected str"),
        ("overwrite: 'yes'", "overwrite: got 'yes', expected bool"),
        ("seed: 1\nseed: 2", "'seed' stands there twice"),
        ("- seed", "holds a sequence, expected keys and values"),
        ("seed: [", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("seed: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("a: &a [1, 2]\nb: *a", "'a' is not known"),
        ("seed: \x00", "not valid YAML"),
        ("# " + "x" * 2**16, "more than 65,536 bytes"),
    ],
)
def test_a_bad_file_is_refused_by_its_name(splaser, folder, text, message):
    (folder / "bad.yaml").write_text(text)
    code, _, stderr = splaser("laser", "--config", "bad.yaml")
    assert code == 2
    assert stderr.startswith("ConfigError: --config bad.yaml: ")
    assert message in stderr
    assert stderr.count("\n") == 1


def test_what_is_missing_is_asked_for(splaser, folder):
    code, _, stderr = splaser("laser", "--config", "nothing.yaml")
    assert code == 2
    assert "--config nothing.yaml: can't be read (No such file or directory)" in stderr
    (folder / "empty.yaml").write_text("")
    code, _, stderr = splaser("laser", "--config", "empty.yaml")
    assert code == 2
    assert "Missing" in stderr
