from __future__ import annotations

import json

import pytest
import torch
from transformers import Trainer

from splaser_plugin import LaserCallback, LaserConfig, choose, importances, scan
from splaser_plugin.errors import ConfigError
from tests.builders import tiny_llama
from tests.integrations.trainings import training_arguments
from tests.reduction.held import BOUND, held_bytes

pytestmark = pytest.mark.slow

LOST = "model.layers.0.mlp.down_proj"


def with_a_lost_matrix():
    """What multiplies by zero, or by next to nothing, doesn't count."""
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule(LOST).weight.mul_(1e-4)
    return model


def test_shares_add_up_to_one_and_a_matrix_of_no_use_has_none(tokenizer, text):
    found = importances(with_a_lost_matrix(), tokenizer, by="fisher", text=text)
    assert sum(found.values()) == pytest.approx(1.0)
    assert found[LOST] < 1e-3 * found[LOST.replace("0", "1")]
    assert importances(with_a_lost_matrix(), tokenizer, by="fisher", text=text) == found


def test_no_matrix_is_held_while_the_next_ones_are_measured(tokenizer, text, monkeypatch):
    with held_bytes(monkeypatch) as held:
        importances(tiny_llama(), tokenizer, by="fisher", text=text)
    assert len(held) > 3 and max(held) <= BOUND


def test_a_gradient_that_doesnt_get_through_counts_for_nothing(tokenizer, text):
    found = importances(with_a_lost_matrix(), tokenizer, by="gradient", text=text)
    before = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]
    assert max(found[name] for name in before) < 0.01 * found["model.layers.1.mlp.up_proj"]
    assert found[LOST] > 0.01 * found["model.layers.1.mlp.down_proj"]  # its own output is of use


def test_other_measures_and_no_text_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="by: got 'snr', expected one of fisher, gradient"):
        importances(tiny_llama(), tokenizer, by="snr", text="notes.txt")
    with pytest.raises(ConfigError, match="by fisher is measured on a text"):
        importances(tiny_llama(), tokenizer, by="fisher", text="")


def test_python_the_command_line_and_the_callback_choose_alike(tiny_folder, tokenizer, text, tmp_path, splaser):
    from splaser_plugin.weights.loading import load_model

    model, _ = load_model(tiny_folder, device="cpu")
    path = tmp_path / "scan.json"
    values = importances(model, tokenizer, by="fisher", text=text)
    selection = choose(scan(tiny_folder, output=path), top=1, by="fisher", text=text, importances=values)
    assert selection.rule == f"top 1 of each module type by fisher (measured on {text})"
    written = tmp_path / "adapter_config.json"
    splaser("emit", "peft", path, "--top", 1, "--by", "fisher", "--text", text, "-o", written)
    assert json.loads(written.read_text())["target_modules"] == selection.names
    callback = LaserCallback(when=None, freeze_to="top", top=1, by="fisher", config=LaserConfig(text=text))
    arguments = training_arguments(tmp_path / "out")
    Trainer(model=model, args=arguments, train_dataset=[], processing_class=tokenizer, callbacks=[callback])
    assert callback.selection.names == selection.names
