from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from splaser_plugin import expand, load
from splaser_plugin.errors import ModelError
from splaser_plugin.integrations.peft import merge_and_unload
from splaser_plugin.spectra import spectrum
from splaser_plugin.weights.factored_folder import parameter_counts, save_model
from splaser_plugin.weights.factored_layers import FactoredLinear, GaugeLinear
from splaser_plugin.weights.in_memory import Weights
from tests.weights.factored_models import DTYPES, QUERY, lasered, same_state, small_gpt2, small_llama, stored_in


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [small_llama, small_gpt2])
def test_the_expanded_model_is_the_lasered_one_bit_for_bit(make, dtype, tmp_path):
    weights = lasered(make().to(dtype))
    save_model(weights, tmp_path / "factored", None)
    weights.model.save_pretrained(tmp_path / "dense")
    loaded = load(tmp_path / "factored")
    assert any(isinstance(module, FactoredLinear) for module in loaded.modules())
    assert same_state(expand(loaded), weights.model)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in weights.model.modules()]
    loaded.save_pretrained(tmp_path / "expanded")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "expanded" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()


@pytest.mark.parametrize("make", [small_llama, small_gpt2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_factored_layers_compute_what_the_dense_ones_do(make, dtype, tmp_path):
    weights = lasered(make().to(dtype))
    save_model(weights, tmp_path, None)
    loaded = load(tmp_path)
    assert not loaded.training and loaded.dtype == dtype
    assert type(loaded) is type(weights.model)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        dense, factored = weights.model(ids).logits.float(), loaded(ids).logits.float()
    assert (factored - dense).norm() < 20 * torch.finfo(dtype).eps * dense.norm()


def test_the_model_gets_smaller_by_what_the_ranks_say(saved):
    weights, folder = saved
    stored = load_file(folder / "model.safetensors")
    loaded = load(folder)
    removed = sum((32 - 5) * (n - 5) for n in (32, 16, 16, 32, 64, 64, 64))
    dense = sum(parameter.numel() for parameter in weights.model.parameters())
    assert sum(parameter.numel() for parameter in loaded.parameters()) == dense - removed
    assert sum(tensor.numel() for name, tensor in stored.items() if not name.endswith("order")) == dense - removed
    weights.model.save_pretrained(folder / "dense")
    sizes = [(place / "model.safetensors").stat().st_size for place in (folder / "dense", folder)]
    assert 4 * removed - 4000 < sizes[0] - sizes[1] <= 4 * removed


@pytest.mark.parametrize("rank", [1, 16, 31])
def test_every_rank_below_full_is_stored_as_factors(rank, tmp_path):
    weights = Weights(small_llama())
    weights.keep_factors()
    query = weights.matrices(["layers.0.self_attn.q_proj"])[0][0]
    before = weights.read(query).clone()
    weights.reduce(query, rank)
    torch.testing.assert_close(weights.read(query), spectrum.truncate(before, rank), rtol=1e-5, atol=1e-5)
    assert parameter_counts(weights)[0] - parameter_counts(weights)[1] == (32 - rank) ** 2
    save_model(weights, tmp_path, None)
    assert stored_in(tmp_path)[QUERY]["rank"] == rank
    assert same_state(expand(load(tmp_path)), weights.model)


def test_full_rank_stays_whole():
    weights = Weights(small_llama())
    weights.keep_factors()
    query = weights.matrices(["layers.0.self_attn.q_proj"])[0][0]
    before = weights.read(query).clone()
    weights.reduce(query, 32)
    assert torch.equal(weights.read(query), before) and not weights.factors


def test_a_layer_of_a_class_of_its_own_is_factored_where_it_only_multiplies(tmp_path):
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, bias=True)
    weights = lasered(FalconForCausalLM(config).eval())
    assert {matrix.type for matrix in weights.factors} >= {"self_attention.dense", "mlp.dense_h_to_4h"}
    save_model(weights, tmp_path, None)
    loaded, ids = load(tmp_path), torch.arange(20)[None]
    torch.testing.assert_close(loaded(ids).logits, weights.model(ids).logits, rtol=1e-4, atol=1e-5)
    assert same_state(expand(loaded), weights.model)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in weights.model.modules()]


def test_an_undone_reduction_leaves_the_factors_of_the_one_before():
    weights = Weights(small_llama())
    weights.keep_factors()
    matrix = weights.matrices()[0][0]
    with weights.trying(matrix) as attempt:
        attempt.reduce(3)
    assert not weights.factors
    with weights.trying(matrix) as attempt:
        attempt.reduce(6)
        attempt.keep()
    kept = weights.factors[matrix]
    with weights.trying(matrix) as attempt:
        attempt.reduce(2)
    assert weights.factors[matrix] is kept
    assert torch.equal(kept.product(), weights.read(matrix))


def test_a_matrix_that_was_trained_since_is_stored_as_it_is_now(tmp_path):
    weights = lasered(small_llama())
    trained, other = list(weights.factors)[:2]
    with torch.no_grad():
        weights.parameters[trained.parameter][0, 0] += 1
    save_model(weights, tmp_path, None)
    loaded = load(tmp_path)
    assert type(loaded.get_submodule(trained.name)) is nn.Linear
    assert isinstance(loaded.get_submodule(other.name), FactoredLinear)
    assert same_state(expand(loaded), weights.model)


def test_nothing_reduced_is_a_plain_model(tmp_path):
    weights = Weights(small_llama())
    weights.keep_factors()
    save_model(weights, tmp_path, None)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path), weights.model)
    assert same_state(load(tmp_path), weights.model)


def test_saving_a_loaded_model_and_loading_it_again_changes_nothing(saved, tmp_path):
    _, folder = saved
    loaded = load(folder)
    loaded.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = load(tmp_path / "again")
    assert same_state(again, loaded)
    assert stored_in(tmp_path / "again") == stored_in(folder)


def test_generation_is_the_dense_models(saved):
    weights, folder = saved
    ids = torch.arange(5)[None]
    answers = [model.generate(ids, max_new_tokens=12, do_sample=False) for model in (weights.model, load(folder))]
    assert torch.equal(*answers)


def test_load_takes_what_from_pretrained_takes(saved):
    _, folder = saved
    loaded = load(str(folder), dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config._attn_implementation == "eager"


def test_loading_draws_no_random_number(saved):
    _, folder = saved
    torch.manual_seed(1)
    before = torch.get_rng_state()
    load(folder)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(params=["by name", "all-linear"])
def trained_lora(saved, request):
    """Adapters trained for two steps on a factored model, its folder, some tokens, and the logits of both."""
    from peft import LoraConfig, get_peft_model

    _, folder = saved
    targets = ["q_proj", "down_proj"] if request.param == "by name" else request.param
    ids = torch.arange(12)[None]
    adapted = get_peft_model(load(folder), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    before = adapted(ids).logits.detach()
    optimizer = torch.optim.SGD([parameter for parameter in adapted.parameters() if parameter.requires_grad], lr=1.0)
    for _ in range(2):  # after the first step LoRA's A is still as it was
        optimizer.zero_grad()
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    adapted.eval()
    return adapted, folder, ids, before, adapted(ids).logits.detach()


def test_lora_trains_on_factored_layers_and_is_saved(trained_lora, tmp_path):
    from peft import PeftModel

    adapted, folder, ids, before, after = trained_lora
    query = adapted.get_base_model().get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(query.base_layer, FactoredLinear)
    assert query.lora_A["default"].weight.grad.abs().sum() > 0
    assert (after - before).norm() > 1e-3 * before.norm()
    adapted.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(load(folder), tmp_path).eval()(ids).logits, after)


def test_lora_merges_into_the_factors(trained_lora, tmp_path):
    adapted, folder, ids, _, after = trained_lora
    merged = merge_and_unload(adapted)
    torch.testing.assert_close(merged(ids).logits, after, rtol=1e-4, atol=1e-4)
    query = merged.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(query, GaugeLinear) and query.rank == 5 + 2
    merged.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert same_state(again, merged)
    assert again.num_parameters() < expand(load(folder)).num_parameters()


def test_lora_merges_into_the_dense_model(trained_lora):
    adapted, _, ids, _, after = trained_lora
    merged = expand(adapted).merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, after, rtol=1e-4, atol=1e-4)
    assert not hasattr(merged.config, "quantization_config")


def test_an_adapter_too_large_for_the_factors_makes_a_plain_layer(saved):
    from peft import LoraConfig, get_peft_model

    _, folder = saved
    config = LoraConfig(r=27, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(load(folder), config).eval()
    ids = torch.arange(12)[None]
    after = adapted(ids).logits
    merged = merge_and_unload(adapted)
    assert type(merged.get_submodule("model.layers.0.self_attn.q_proj")) is nn.Linear
    torch.testing.assert_close(merged(ids).logits, after, rtol=1e-4, atol=1e-4)
    assert merged.config.quantization_config.layers.keys() == stored_in(folder).keys() - {QUERY}


def test_an_adapter_that_is_no_plain_lora_is_not_merged(saved):
    from peft import LoHaConfig, get_peft_model

    adapted = get_peft_model(load(saved[1]), LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(
        ModelError, match=r"q_proj has an adapter that is no plain LoRA \(Linear\).*expand\(model\) first"
    ):
        merge_and_unload(adapted)


def test_trainer_trains_saves_and_resumes(saved, tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    _, folder = saved
    rows = Dataset.from_list(
        [{"input_ids": list(range(start, start + 8)), "labels": list(range(8))} for start in range(8)]
    )

    def trainer(steps):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=steps, per_device_train_batch_size=2, save_steps=2,
            learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        return Trainer(load(folder), arguments, train_dataset=rows)

    first = trainer(2)
    before = {name: value.clone() for name, value in first.model.state_dict().items()}
    first.train()
    name = "model.layers.0.self_attn.q_proj"
    for part in ("weight", "interpolation", "bias"):
        assert not torch.equal(first.model.state_dict()[f"{name}.{part}"], before[f"{name}.{part}"])
    assert same_state(load(tmp_path / "run" / "checkpoint-2"), first.model)
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
