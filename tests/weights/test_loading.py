"""What `laser` does with models whose files hold more, or other things, than a causal language model's weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, LlavaForConditionalGeneration

from splaser_plugin import CompareConfig, LaserConfig, compare, laser
from splaser_plugin.artifacts.recipe import Recipe
from splaser_plugin.checkpoints.checkpoint import open_checkpoint
from splaser_plugin.checkpoints.quantised import read_weights
from splaser_plugin.errors import CheckpointError, ModelError
from splaser_plugin.jobs.apply import apply
from splaser_plugin.weights.loading import load_model, load_tokenizer, stored_context
from splaser_plugin.weights.model_source import find_model
from tests.architectures.sweep import loader
from tests.architectures.tiny import tiny_config
from tests.builders import VOCABULARY
from tests.tiny_models import CAUSAL, CLIP, TEXT, build, change, configure, saved

QUICK = LaserConfig(
    embedder="self", max_new_tokens=4, candidates=2, device="cpu", ranks="0.5", accept="harmless", tolerance=5
)


def spoken(model, tokenizer, folder):
    saved(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


def tensors_of(folder):
    checkpoint = open_checkpoint(folder)
    return dict(read_weights(checkpoint, {}, list(checkpoint.tensors), torch.float32))


def large(settings):
    return settings | {"vocab_size": VOCABULARY}


def test_a_multimodal_model_is_lasered_through_its_text_and_written_whole(tokenizer, pairs, tmp_path):
    text, vision = {"model_type": "llama", **large(TEXT)}, {"model_type": "clip_vision_model", **CLIP}
    model = build(
        "llava", {"text_config": text, "vision_config": vision, "image_token_index": 5}, AutoModelForImageTextToText
    )
    folder = spoken(model, tokenizer, tmp_path / "llava")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessorPil"}')
    (folder / "notes.txt").write_text("mine")
    result = laser(folder, pairs, config=QUICK, output=tmp_path / "out", write_unchanged=True)
    assert isinstance(result.model, LlavaForConditionalGeneration)
    assert {matrix.tower for matrix in result.scan.matrices} == {""}
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == len(result.recipe.steps)
    assert all("language_model" in name for name in changed)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_layers_that_the_model_does_not_hold_are_kept_as_they_are(tokenizer, pairs, tmp_path):
    folder = spoken(build("deepseek_v3", large(CAUSAL["deepseek_v3"])), tokenizer, tmp_path / "mtp")
    more = {"model.layers.2.eh_proj.weight": torch.randn(16, 32), "model.layers.2.enorm.weight": torch.randn(16)}
    change(folder, lambda tensors: tensors | more)
    result = laser(folder, pairs, config=QUICK, output=tmp_path / "out", write_unchanged=True)
    after = tensors_of(tmp_path / "out")
    assert after.keys() == load_file(folder / "model.safetensors").keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in more.items())
    again, _ = load_model(tmp_path / "out", device="cpu")
    for name, parameter in result.model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    apply(Recipe.load(tmp_path / "out" / "recipe.json"), folder, output=tmp_path / "applied")
    assert tensors_of(tmp_path / "applied").keys() == after.keys()
    with pytest.raises(ModelError, match=r"no place for 2 tensors that transformers leaves out.*Use save dense"):
        laser(folder, pairs, config=LaserConfig(**{**QUICK.to_dict(), "save": "factored"}))


def test_codes_without_a_configuration_are_not_taken_for_weights(tokenizer, tmp_path):
    folder = spoken(build("llama", large(TEXT)), tokenizer, tmp_path / "fp8")
    name = "model.layers.0.self_attn.q_proj.weight"
    change(
        folder,
        lambda tensors: tensors | {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(16, 1)},
    )
    with pytest.raises(CheckpointError, match="float8_e4m3fn with scales beside it: quantised weights"):
        load_model(folder, device="cpu")


def test_what_is_no_language_model_is_refused_with_the_next_step(tokenizer, tmp_path):
    for name, file, message in (
        ("adapter", "adapter_config.json", "has an adapter and no model. Give the base model, and this as adapter"),
        ("embedder", "modules.json", "this is a sentence-transformers model, which gives no answers"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        if name == "embedder":
            saved(build("llama", TEXT), folder)
        (folder / file).write_text("{}")
        with pytest.raises(CheckpointError, match=message):
            find_model(folder)
    (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"repository of the hub's cache. Give the folder snapshots/HASH in it"):
        find_model(tmp_path / "models--a--b")
    folder = spoken(build("llama", large(TEXT)), tokenizer, tmp_path / "shapes")
    configure(folder, intermediate_size=32)
    with pytest.raises(CheckpointError, match=r"down_proj.weight' has shape \(16, 24\), expected \(16, 32\) by config"):
        load_model(folder, device="cpu")


def test_a_damaged_tokenizer_is_one_line(tokenizer, tmp_path):
    folder = spoken(build("llama", large(TEXT)), tokenizer, tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"][0] = ["zzzq", "qqqz"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"its tokenizer can't be loaded .*Exception: .*out of vocabulary"):
        load_model(folder, device="cpu")


def test_a_model_that_writes_no_text_is_refused_once_it_is_loaded(tokenizer, pairs, minilm, tmp_path):
    """PI0 makes a robot's actions of images and text."""
    if "pi0" not in CONFIG_MAPPING:
        pytest.skip("this version of transformers doesn't know it")
    config = tiny_config("pi0")
    folder = spoken(loader(config).from_config(config), tokenizer, tmp_path / "pi0")
    with pytest.raises(ModelError, match="PI0ForConditionalGeneration writes no text, and only causal"):
        laser(folder, pairs, config=QUICK)
    with pytest.raises(ModelError, match="PI0ForConditionalGeneration writes no text, and only causal"):
        compare([folder], pairs, config=CompareConfig(embedder=str(minilm), device="cpu"))


def test_a_configuration_is_read_once(tiny_folder, monkeypatch):
    source = find_model(tiny_folder)
    load_tokenizer(source)
    expected = AutoConfig.from_pretrained(tiny_folder).max_position_embeddings
    monkeypatch.setattr(AutoConfig, "from_pretrained", None)
    assert stored_context(source) == expected
