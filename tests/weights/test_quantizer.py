"""transformers loads factored folders by itself; folders of the old format."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from splaser_plugin import expand, load
from splaser_plugin.errors import CheckpointError
from splaser_plugin.weights.factored_layers import FactoredLinear, GaugeLinear, TwoFactorLinear
from tests.weights.factored_models import QUERY, lasered, same_state, small_gpt2, small_llama

IMPORTS = {
    "splaser first": "import splaser_plugin; from transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM; import splaser_plugin",
    "transformers used first": "from transformers import AutoModelForCausalLM, LlamaForCausalLM; import splaser_plugin",
    "another part": "from transformers import AutoModelForCausalLM; from splaser_plugin.errors import SplaserError",
}


def in_a_process(lines):
    return subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("order", IMPORTS)
def test_transformers_loads_a_factored_folder_wherever_splaser_is_imported(saved, order):
    weights, folder = saved
    weights.model.save_pretrained(folder.parent / "dense")
    folders = [str(folder), str(folder.parent / "dense")]
    run = in_a_process(
        f"""
{IMPORTS[order]}
import torch
model, dense = (AutoModelForCausalLM.from_pretrained(folder) for folder in {folders})
layer = model.get_submodule("{QUERY}")
assert type(layer).__name__ == "GaugeLinear" and torch.equal(layer.product(), dense.get_parameter("{QUERY}.weight"))
"""
    )
    assert run.returncode == 0, run.stderr
    assert "Unknown quantization" not in run.stderr


@pytest.mark.slow
def test_without_splaser_the_folder_is_refused(saved):
    run = in_a_process(
        f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(saved[1])!r})"
    )
    assert run.returncode != 0
    assert "Unknown quantization type, got splaser" in run.stderr and "size mismatch" in run.stderr.lower()


def test_importing_splaser_loads_neither_torch_nor_transformers():
    run = in_a_process("import sys, splaser_plugin; print(sorted({'torch', 'transformers'} & set(sys.modules)))")
    assert run.stdout.strip() == "[]"


def test_a_loaded_model_is_treated_as_a_plain_one(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[1])
    assert same_state(model, load(saved[1]))
    assert not model.training
    assert not getattr(model, "is_quantized", False) and getattr(model, "hf_quantizer", None) is None
    half = model.half().float().to(torch.bfloat16)  # which transformers refuses for a quantised one
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.get_submodule(QUERY).order.dtype == torch.int32


def test_a_model_without_its_head_is_loaded(saved):
    body = AutoModel.from_pretrained(saved[1])
    assert same_state(body, load(saved[1]).model)
    assert isinstance(body.get_submodule(QUERY.removeprefix("model.")), GaugeLinear)


def test_a_device_map_is_followed(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[1], device_map="cpu", dtype=torch.bfloat16)
    assert same_state(model, load(saved[1], dtype=torch.bfloat16))


def old_folder(model, folder, rank=5):
    """A folder as splaser 0.1 wrote it: two factors, listed by their rank under a key of their own."""
    from transformers.pytorch_utils import Conv1D

    model.save_pretrained(folder)
    state, ranks = load_file(folder / "model.safetensors"), {}
    for name, layer in model.named_modules():
        if type(layer) in (nn.Linear, Conv1D) and ".0." in name:
            key = next(key for key in state if f"model.{key}".endswith(f"{name}.weight") or key == f"{name}.weight")
            weight = layer.weight.detach().mT if isinstance(layer, Conv1D) else layer.weight.detach()
            left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
            state[key] = (left[:, :rank] * values[:rank].sqrt()).to(weight.dtype).contiguous()
            right_key = key.removesuffix("weight") + "right_factor"
            state[right_key] = (values[:rank].sqrt()[:, None] * right[:rank]).to(weight.dtype).contiguous()
            product = (state[key].double() @ state[right_key].double()).to(weight.dtype)
            layer.weight.data = product.mT.contiguous() if isinstance(layer, Conv1D) else product
            ranks[name] = rank
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "splaser_factored": ranks}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [small_llama, small_gpt2])
def test_a_folder_of_the_old_format_is_loaded_and_expanded_bit_for_bit(make, dtype, tmp_path):
    model = make().to(dtype)
    old_folder(model, tmp_path / "old")
    loaded = load(tmp_path / "old")
    layers = [module for module in loaded.modules() if isinstance(module, FactoredLinear)]
    assert layers and all(isinstance(layer, TwoFactorLinear) and layer.rank == 5 for layer in layers)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        dense, factored = model(ids).logits.float(), loaded(ids).logits.float()
    assert (factored - dense).norm() < 20 * torch.finfo(dtype).eps * dense.norm()
    expand(tmp_path / "old", output=tmp_path / "expanded")
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "expanded"), model)
    assert "splaser" not in (tmp_path / "expanded" / "config.json").read_text()


def test_a_folder_of_the_old_format_is_saved_in_the_new_one(tmp_path):
    old_folder(small_llama(), tmp_path / "old")
    loaded = load(tmp_path / "old")
    loaded.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "splaser_factored" not in config
    assert config["quantization_config"]["layers"][QUERY] == {"form": "two factors", "rank": 5}
    for again in (load(tmp_path / "again"), AutoModelForCausalLM.from_pretrained(tmp_path / "again")):
        assert same_state(again, loaded)


@pytest.mark.parametrize("ranks", [["a"], {QUERY: 0}, {QUERY: True}, {QUERY: "5"}, None])
def test_a_damaged_list_of_the_old_format_is_refused(tmp_path, ranks):
    old_folder(small_llama(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "splaser_factored": ranks}))
    with pytest.raises(CheckpointError, match=r"splaser_factored is .*, expected module names to ranks of at least 1"):
        load(tmp_path)


def test_lora_joins_factors_of_the_old_format(tmp_path):
    from peft import LoraConfig, get_peft_model

    from splaser_plugin.integrations.peft import merge_and_unload

    old_folder(small_llama(), tmp_path)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(load(tmp_path), config).eval()
    ids = torch.arange(12)[None]
    after = adapted(ids).logits
    merged = merge_and_unload(adapted)
    torch.testing.assert_close(merged(ids).logits, after, rtol=1e-4, atol=1e-4)
    query = merged.get_submodule(QUERY)
    assert isinstance(query, GaugeLinear) and query.rank == 5 + 2
    assert isinstance(merged.get_submodule(QUERY.replace("q_proj", "k_proj")), TwoFactorLinear)
    assert same_state(expand(merged), expand(merged))


def test_layers_are_counted_by_what_they_store(saved):
    weights, folder = saved
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == weights.model.num_parameters() - sum(
        (matrix.shape[0] - 5) * (matrix.shape[1] - 5) for matrix in weights.factors
    )
    assert len(weights.factors) == len(lasered(small_llama()).factors) == 7
