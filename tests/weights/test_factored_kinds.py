"""Which layers of models of other kinds than Llama's can be factored, and what they expand to."""

from __future__ import annotations

import inspect
import json

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from splaser_plugin.jobs.expand import expand
from splaser_plugin.weights.factored import is_factorable
from splaser_plugin.weights.factored_folder import save_model
from splaser_plugin.weights.in_memory import Weights
from tests.tiny_models import CAUSAL, TEXT, build


def test_only_layers_that_the_model_calls_and_saves_as_they_are_can_be_factored(tmp_path):
    """Mamba's mixer may read the weight of dt_proj; transformers joins Sarvam's q, k and v when it saves them."""
    mamba = build("mamba", CAUSAL["mamba"])
    calls = "self.dt_proj(" in inspect.getsource(type(mamba.get_submodule("backbone.layers.0.mixer")))
    found = {matrix.type: is_factorable(mamba, matrix) for matrix in Weights(mamba).matrices()[0]}
    assert found == {"mixer.in_proj": True, "mixer.x_proj": True, "mixer.dt_proj": calls, "mixer.out_proj": True}
    sarvam = build("sarvam_moe", TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12})
    found = {matrix.type: is_factorable(sarvam, matrix) for matrix in Weights(sarvam).matrices()[0]}
    assert not any(is_there for kind, is_there in found.items() if kind.endswith(("q_proj", "k_proj", "v_proj")))
    assert any(found.values())


def test_expanding_gives_back_the_kind_of_model_and_its_names(tmp_path):
    """EXAONE is of Llama's class, and its tensors have other names."""
    base = tmp_path / "base"
    build("exaone", TEXT).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    weights = Weights(model)
    weights.keep_factors()
    weights.reduce(weights.matrices()[0][0], 2)
    save_model(weights, tmp_path / "factored", None)
    expand(tmp_path / "factored", output=tmp_path / "dense")
    kinds = [json.loads((tmp_path / name / "config.json").read_text())["model_type"] for name in ("base", "dense")]
    assert kinds == ["exaone", "exaone"]
    assert load_file(tmp_path / "dense" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert all(torch.equal(again.get_parameter(name), parameter) for name, parameter in model.named_parameters())
