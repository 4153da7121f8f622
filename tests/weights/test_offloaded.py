"""Models whose weights accelerate keeps on disk or in the CPU's memory until they compute."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM

from splaser_plugin import ApplyConfig, LaserConfig, apply, laser
from splaser_plugin.errors import ConfigError, ModelError, OutputError
from splaser_plugin.weights.factored_folder import save_model
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import load_model
from tests.builders import QUICK, THREE_PAIRS, tiny_llama

pytestmark = pytest.mark.slow

IDS = torch.arange(5, 25)[None]
HALF = ("cpu=0.58MB",)
"""Room for the embedding and one block of the tiny model beside its head, which the CPU has to bring in from disk."""
CONFIG = LaserConfig(**{**QUICK, "device": "auto"})


def on_disk(folder):
    return load_model(folder, device_map="auto", max_memory=HALF)[0]


def spread(kind, folder, tmp_path):
    """The tiny model, offloaded in each way there is."""
    if kind == "device map":
        return on_disk(folder)
    if kind == "cpu offload":
        return cpu_offload(tiny_llama(), execution_device=torch.device("cpu"))
    return disk_offload(tiny_llama(), str(tmp_path / "store"), execution_device=torch.device("cpu"))


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("kind", ["device map", "cpu offload", "disk offload"])
def test_what_is_written_is_what_the_model_computes_with_and_is_put_back_bit_for_bit(kind, tiny_folder, tmp_path):
    model, plain = spread(kind, tiny_folder, tmp_path), tiny_llama()
    weights, expected = Weights(model), Weights(plain)
    assert weights.is_offloaded
    assert not expected.is_offloaded
    before = logits(model)
    assert torch.equal(before, logits(plain))
    assert weights.identity() == expected.identity()
    for matrix in weights.matrices()[0][:8]:
        assert torch.equal(weights.read(matrix), expected.read(matrix))
        with weights.trying(matrix) as attempt:
            attempt.reduce(3)
            held = expected.hold(matrix)
            expected.reduce(matrix, 3)
            assert torch.equal(weights.read(matrix), expected.read(matrix))
            assert torch.equal(logits(model), logits(plain))
            assert not torch.equal(logits(model), before)
            expected.put_back(matrix, held)
        assert torch.equal(logits(model), before)


def test_a_model_half_on_disk_gives_the_recipe_and_the_bits_of_one_in_memory(tiny_folder, tmp_path):
    facts = laser(tiny_folder, THREE_PAIRS, config=CONFIG, output=tmp_path / "whole").recipe
    config = LaserConfig(**{**QUICK, "device": "auto", "device_map": "auto", "max_memory": HALF})
    result = laser(tiny_folder, THREE_PAIRS, config=config, output=tmp_path / "spread")
    assert result.weights.is_offloaded
    assert "cpu and disk" in result.weights.place
    assert facts.steps, "this run has to keep something to show anything"
    assert result.recipe.steps == facts.steps
    assert result.recipe.weights_identity == facts.weights_identity
    whole, spread = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "spread"))
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in spread.state_dict().items())
    assert torch.equal(logits(result.model), logits(spread))


def test_the_command_says_where_the_weights_are_and_apply_rebuilds_the_same(splaser, tiny_folder, pairs_file, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    room = ["--device-map", "auto", "--max-memory", HALF[0]]
    short = ["--embedder", "self", "--max-new-tokens", "6", "--candidates", "4", "--edge", "mp"]
    code, _, said = splaser("laser", tiny_folder, "--pairs", pairs_file, "-o", out, *short, *room)
    assert code == 0, said
    assert "cpu and disk, float32" in said
    code, _, said = splaser("apply", out / "recipe.json", tiny_folder, "-o", again, *room)
    assert code == 0, said
    first, second = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (out, again))
    assert all(torch.equal(first[name], value) for name, value in second.items())


def test_apply_in_python_takes_a_spread_model(tiny_folder, tmp_path):
    recipe = laser(tiny_folder, THREE_PAIRS, config=CONFIG).recipe
    rebuilt = apply(recipe, on_disk(tiny_folder))
    plain = apply(recipe, tiny_folder)
    assert recipe.steps
    assert torch.equal(logits(rebuilt.model), logits(plain.model))


def test_files_of_the_model_itself_are_never_written_to(tiny_folder):
    before = (tiny_folder / "model.safetensors").read_bytes()
    weights = Weights(on_disk(tiny_folder))
    weights.reduce(weights.matrices()[0][-1], 2)
    assert (tiny_folder / "model.safetensors").read_bytes() == before


def test_a_spread_model_is_saved_in_files_of_bounded_size(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("splaser_plugin.weights.factored_folder.OFFLOADED_SHARD", "300KB")
    recipe = laser(tiny_folder, THREE_PAIRS, config=CONFIG, output=tmp_path / "whole").recipe
    config = ApplyConfig(device_map="auto", max_memory=HALF)
    apply(recipe, tiny_folder, config=config, output=tmp_path / "spread")
    assert len(list((tmp_path / "spread").glob("model-*.safetensors"))) == 2
    whole, spread = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "spread"))
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in spread.state_dict().items())


@pytest.mark.parametrize("kind", ["device map", "cpu offload", "disk offload"])
def test_what_is_saved_of_an_offloaded_model_is_what_it_computes_with(kind, tiny_folder, tmp_path):
    model = spread(kind, tiny_folder, tmp_path)
    weights = Weights(model)
    weights.reduce(weights.matrices()[0][0], 3)
    save_model(weights, tmp_path / "saved", None)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))


def test_a_tied_head_stays_tied_after_a_forward_pass(tmp_path):
    folder = tmp_path / "tied"
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": "120KB"}, offload_folder=str(tmp_path / "store")
    )
    logits(model)
    weights, plain = Weights(model), Weights(tiny_llama(tie_word_embeddings=True))
    assert weights.is_offloaded
    assert weights.size == plain.size
    assert [other.tied_to for other in weights.matrices()[1]] == [other.tied_to for other in plain.matrices()[1]]


def test_what_needs_gradients_or_factors_is_refused_in_one_line(tiny_folder):
    model, tokenizer = load_model(tiny_folder, device_map="auto", max_memory=HALF)
    for change, said in {
        "rank_by": ("gradient", "offloaded weights have none. Use rank_by snr"),
        "reduce": ("whitened", "offloaded weights have none. Use reduce svd"),
        "save": ("factored", "offloaded weights, so its matrices can't be kept as factors. Use save dense"),
    }.items():
        config = LaserConfig(**{**QUICK, change: said[0]})
        with pytest.raises(ModelError, match=said[1]):
            laser(model, THREE_PAIRS, config=config, tokenizer=tokenizer)


def test_adapters_and_offloaded_weights_are_refused_together(tiny_folder, tokenizer):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(on_disk(tiny_folder), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match=r"adapters and offloaded weights.*Merge the adapter"):
        laser(adapted, THREE_PAIRS, config=CONFIG, tokenizer=tokenizer)


def test_an_adapter_to_merge_and_a_device_map_are_refused_together(tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"merged on one device. Merge it, save the model"):
        load_model(tiny_folder, device_map="auto", adapter=tmp_path)


def test_weights_without_numbers_are_refused():
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(ModelError, match=r"on the meta device, without numbers"):
        Weights(model)


def test_a_full_disk_is_said_with_the_way_out(tiny_folder, monkeypatch, tmp_path):
    weights = Weights(on_disk(tiny_folder))
    first, second = weights.matrices()[0][-2:]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    weights.reduce(first, 2)
    (next(tmp_path.glob("splaser-*")) / f"{second.parameter}.1.safetensors").mkdir()  # no file can be written there
    with pytest.raises(OutputError, match=r"can't be written there.*set TMPDIR"):
        weights.reduce(second, 2)


def test_fsdp_version_1_of_the_launcher_is_refused(tiny_folder, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ModelError, match=r"FSDP version 1 flattens the weights. Use version 2"):
        load_model(tiny_folder)


@pytest.mark.parametrize("device_map", ["fsdp", "tp"])
def test_one_process_alone_is_told_how_to_start_several(device_map, tiny_folder):
    with pytest.raises(ConfigError, match=r"over processes, and there is one. Start several.*accelerate launch"):
        load_model(tiny_folder, device_map=device_map)
