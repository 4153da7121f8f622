"""One identity of weights: the same on disk and in memory, so that a scan of one serves the other."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from splaser_plugin import LaserConfig, laser, scan
from splaser_plugin.artifacts.recipe import Recipe, carry_out
from splaser_plugin.checkpoints.checkpoint import open_checkpoint
from splaser_plugin.errors import RecipeError
from splaser_plugin.scanning.records import Scan
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.stored import StoredWeights
from tests.builders import QUICK, tiny_llama


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2))


MODELS = {
    "llama": tiny_llama,
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "bfloat16": lambda: tiny_llama().bfloat16(),
    "experts": mixtral,
    "conv1d": gpt2,
}


def on_disk(folder):
    return StoredWeights(open_checkpoint(folder)).identity()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_files_and_the_model_loaded_from_them_have_one_identity(make, tmp_path):
    make().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert on_disk(tmp_path) == Weights(loaded).identity()


def test_a_wider_dtype_is_the_same_weights_and_a_narrower_one_others(tmp_path):
    tiny_llama().bfloat16().save_pretrained(tmp_path / "narrow")
    tiny_llama().save_pretrained(tmp_path / "wide")
    wider = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.float32)
    narrower = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16)
    assert on_disk(tmp_path / "narrow") == Weights(wider).identity()
    assert on_disk(tmp_path / "wide") != Weights(narrower).identity()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj", "model.norm"])
def test_another_fine_tune_has_another_identity(name, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        model.get_parameter(f"{name}.weight").mul_(1.001)
    model.save_pretrained(tmp_path / "after")
    assert on_disk(tmp_path / "before") != on_disk(tmp_path / "after")


def test_a_recipe_of_version_0_1_is_applied_to_its_weights_and_to_no_others():
    weights = Weights(tiny_llama(vocabulary=49152))
    recipe = Recipe("tiny", weights.identity_of_version_0_1(), "float32", (), {}, LaserConfig(), {})
    carry_out(recipe, weights)
    assert recipe.weights_identity == "c29fcb031b3f0f343a8f9310ef96953d18bfb96dd3b38fb972ca98341e2326d7", (
        "as 0.1 computed it"
    )
    with pytest.raises(RecipeError, match="was made for weights"):
        carry_out(recipe, Weights(tiny_llama(seed=1, vocabulary=49152)))


def test_a_recipe_is_not_applied_in_another_dtype():
    model = tiny_llama().bfloat16()
    recipe = Recipe("tiny", Weights(model).identity(), "bfloat16", (), {}, LaserConfig(), {})
    with pytest.raises(RecipeError, match=r"in bfloat16, but this model's are .* in float32"):
        carry_out(recipe, Weights(model.float()))


def test_a_scan_from_disk_serves_a_laser_run_and_gives_the_same_recipe(tiny_folder, pairs, tmp_path):
    scan(str(tiny_folder), output=tmp_path / "scan.json")
    plain = laser(tiny_folder, pairs, config=LaserConfig(**QUICK))
    served = laser(tiny_folder, pairs, config=LaserConfig(**QUICK, scan=str(tmp_path / "scan.json")))
    assert served.recipe.steps == plain.recipe.steps
    assert served.scan.weights_identity == plain.scan.weights_identity
    assert {matrix.name for matrix in served.scan.matrices} == {matrix.name for matrix in plain.scan.matrices}
    assert served.scan.edge == "mp"


def test_a_scan_is_not_made_again_where_one_is_given(tiny_folder, pairs, tmp_path, monkeypatch):
    scan(str(tiny_folder), output=tmp_path / "scan.json")
    monkeypatch.setattr("splaser_plugin.jobs.stages.scan_source", None)
    laser(tiny_folder, pairs, config=LaserConfig(**{**QUICK, "candidates": 1}, scan=str(tmp_path / "scan.json")))


def test_a_scan_of_other_weights_is_refused_with_both_identities(tiny_folder, pairs, tmp_path):
    other = scan(tiny_llama(seed=5))
    other.save(tmp_path / "scan.json")
    mine = on_disk(tiny_folder)
    message = f"of the weights {other.weights_identity[:12]} of .*, and these are {mine[:12]}"
    with pytest.raises(RecipeError, match=message):
        laser(tiny_folder, pairs, config=LaserConfig(**QUICK, scan=str(tmp_path / "scan.json")))


def test_a_scan_that_lacks_a_matrix_is_refused_by_its_name(splaser, tiny_folder, pairs_file, tmp_path):
    found = scan(str(tiny_folder))
    Scan(found.model, found.weights_identity, found.edge, found.matrices[1:], ()).save(tmp_path / "scan.json")
    code, _, printed = splaser(
        "laser", tiny_folder, "--pairs", pairs_file, "-o", tmp_path / "out", "--embedder", "self",
        "--scan", tmp_path / "scan.json",
    )  # fmt: skip
    assert code == 1
    assert f"--scan {tmp_path / 'scan.json'}: it has no {found.matrices[0].name} of shape" in printed
