from __future__ import annotations

import json
import random
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from splaser_plugin.errors import MatrixError, RankError
from splaser_plugin.integrations.configs.adapter import adapter_config, rank_patterns
from splaser_plugin.integrations.peft import adapted_modules, lora_config
from splaser_plugin.scanning.scan import Scan
from splaser_plugin.scanning.selection import choose
from splaser_plugin.weights.matrices import model_matrices
from tests.builders import entry, fit, scan_of, tiny_llama


def small_llama(blocks: int = 12):
    return tiny_llama(vocabulary=64, hidden_size=16, intermediate_size=24, num_hidden_layers=blocks)


def scan_with_random_snr(model: nn.Module, seed: int) -> Scan:
    draw = random.Random(seed)
    matrices, skipped = model_matrices(model)
    return scan_of(
        *(
            entry(
                matrix.name,
                draw.random(),
                kind=matrix.type,
                shape=matrix.shape,
                iqr=fit(draw.random(), rank=draw.randint(1, 9)),
            )
            for matrix in matrices
        ),
        skipped=tuple(skipped),
    )


class Wrapped(nn.Module):
    """A model inside another, as a reward model or a vision model holds its language model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.language_model = model


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("top", [1, 2, 5, 11])
def test_exactly_the_chosen_modules_get_an_adapter(top, wrap):
    for seed in range(3):
        model = small_llama()
        selection = choose(scan_with_random_snr(model, seed), top=top)
        assert len(selection.names) == 7 * top
        prefix = "language_model." if wrap else ""
        config = lora_config(selection, rank=2, task_type=None if wrap else "CAUSAL_LM")
        adapted = get_peft_model(Wrapped(model) if wrap else model, config)
        assert set(adapted_modules(adapted)) == {prefix + name for name in selection.names}


def test_blocks_whose_numbers_begin_alike_are_kept_apart():
    model = small_llama()
    names = ["model.layers.1.mlp.down_proj", "model.layers.11.self_attn.q_proj"]
    chosen = {name: entry(name, 1.0) for name in names}
    selection = choose(scan_of(*chosen.values()), top=1)
    assert adapted_modules(get_peft_model(model, lora_config(selection))) == names


def test_a_name_that_is_the_end_of_another_is_refused_unless_both_are_chosen():
    model = small_llama(2)
    model.draft = small_llama(2)
    scan = scan_with_random_snr(model, 0)
    with pytest.raises(MatrixError, match=r"is the end of draft\.model\.layers.*PEFT would adapt both"):
        lora_config(choose(scan, top=1))
    every = choose(scan, top=2)
    assert set(adapted_modules(get_peft_model(model, lora_config(every)))) == set(every.names)


def test_saving_and_loading_keeps_the_chosen_modules(tmp_path):
    selection = choose(scan_with_random_snr(small_llama(), 0), top=5)
    get_peft_model(small_llama(), lora_config(selection, rank=2)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small_llama(), tmp_path)
    assert set(adapted_modules(loaded)) == set(selection.names)


def test_the_rank_pattern_gives_each_matrix_its_own_rank_and_the_same_scale():
    model = small_llama()
    selection = choose(scan_with_random_snr(model, 1), top=6)
    ranks = rank_patterns(selection, 4)
    assert len(set(ranks.values())) > 3
    adapted = get_peft_model(model, lora_config(selection, rank=4, rank_pattern=True))
    layers = {name: adapted.get_base_model().get_submodule(name) for name in selection.names}
    assert {name: layer.r["default"] for name, layer in layers.items()} == ranks
    assert {round(layer.scaling["default"], 9) for layer in layers.values()} == {2.0}


def test_the_rank_pattern_is_proportional_and_keeps_the_number_of_parameters():
    shape = (400, 600)
    matrices = [
        entry(f"model.layers.{n}.mlp.up_proj", 1.0, shape=shape, iqr=fit(1.0, rank=10 * n)) for n in range(1, 9)
    ]
    selection = choose(scan_of(*matrices), top=8)
    ranks = rank_patterns(selection, 45)
    assert ranks == {f"model.layers.{n}.mlp.up_proj": 10 * n for n in range(1, 9)}
    assert sum(ranks.values()) == 8 * 45


def test_ranks_stay_between_one_and_what_the_shape_allows():
    nothing = entry("model.layers.0.mlp.up_proj", 0.0, shape=(40, 60), iqr=fit(0.0, rank=0))
    much = entry("model.layers.1.mlp.up_proj", 1.0, shape=(40, 60), iqr=fit(1.0, rank=40))
    selection = choose(scan_of(nothing, much), top=2)
    assert rank_patterns(selection, 30) == {much.name: 40, nothing.name: 1}
    with pytest.raises(MatrixError, match="no chosen matrix has a singular value above the edge"):
        rank_patterns(choose(scan_of(nothing), top=1), 30)
    with pytest.raises(RankError, match="rank 0: expected at least 1"):
        lora_config(selection, rank=0)


def test_the_emitted_file_is_a_configuration_that_peft_reads_without_a_word(tmp_path):
    model = small_llama()
    selection = choose(scan_with_random_snr(model, 2), top=3)
    values = adapter_config(selection, rank=4, rank_pattern=True)
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = LoraConfig.from_pretrained(tmp_path)
    assert config == lora_config(selection, rank=4, rank_pattern=True, base_model_name_or_path="a/model")
    assert set(adapted_modules(get_peft_model(model, config))) == set(selection.names)


def test_the_adapted_model_trains_the_adapters_alone():
    model = small_llama(2)
    selection = choose(scan_with_random_snr(model, 3), top=1)
    adapted = get_peft_model(model, lora_config(selection, rank=2))
    loss = adapted(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss
    loss.backward()
    trained = {name.split(".lora_")[0] for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert trained == {f"base_model.model.{name}" for name in selection.names}
