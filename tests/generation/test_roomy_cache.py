from __future__ import annotations

import weakref

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM
from transformers.cache_utils import DynamicLayer

from splaser_plugin.generation.kv_cache import LEAST_ROOM, RoomyLayer, roomy_cache
from tests.builders import tiny_llama


def test_it_holds_what_transformers_own_layer_holds_whatever_is_done_to_it():
    ours, theirs = RoomyLayer(), DynamicLayer()
    generator = torch.Generator().manual_seed(0)

    def add(tokens):
        keys, values = torch.randn(
            2, ours.keys.shape[0] if ours.keys is not None else 5, 3, tokens, 4, generator=generator
        )
        for mine, expected in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(mine, expected)

    for step in range(200):
        add(7 if step == 0 else 1)
        if step in (20, 150):
            rows = torch.tensor([3, 1, 0] if step == 20 else [0])
            ours.batch_select_indices(rows)
            theirs.batch_select_indices(rows)
        if step == 90:
            ours.crop(-30)
            theirs.crop(-30)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_most_tokens_are_added_without_a_copy_of_those_before():
    layer = RoomyLayer()
    places = set()
    for _ in range(3 * LEAST_ROOM):
        places.add(layer.update(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4))[0].data_ptr())
    assert len(places) <= 4


def test_rows_that_are_left_out_do_not_stay_in_memory():
    layer = RoomyLayer()
    for _ in range(2):
        layer.update(torch.ones(8, 1, 1, 4), torch.ones(8, 1, 1, 4))
    rooms = [weakref.ref(room) for room in (layer._keys_room, layer._values_room)]
    assert all(room() is not None for room in rooms)
    layer.batch_select_indices(torch.tensor([1]))
    assert [room() for room in rooms] == [None, None]


def test_a_model_with_other_layers_gets_its_own_cache(tiny_model):
    assert [type(layer) for layer in roomy_cache(tiny_model).layers] == [RoomyLayer, RoomyLayer]
    small = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    assert roomy_cache(Gemma2ForCausalLM(Gemma2Config(**small, **heads))) is None
    assert roomy_cache(MambaForCausalLM(MambaConfig(**small))) is None


@pytest.mark.slow
def test_the_models_logits_are_the_same():
    model = tiny_llama()
    ids = torch.randint(0, 100, (3, 150), generator=torch.Generator().manual_seed(1))
    cache = roomy_cache(model)
    with torch.no_grad():
        found = [model(input_ids=ids[:, :9], past_key_values=cache).logits[:, -1]]
        found += [
            model(input_ids=ids[:, place : place + 1], past_key_values=cache).logits[:, -1] for place in range(9, 150)
        ]
        expected = model(input_ids=ids).logits[:, 8:]
    torch.testing.assert_close(torch.stack(found, 1), expected, rtol=1e-4, atol=1e-4)


def test_a_model_of_whose_configuration_no_cache_can_be_made_gets_none(tiny_model, monkeypatch):
    """As Blt's, which has no number of layers: `generate` says so then."""
    monkeypatch.delattr(type(tiny_model.config), "num_hidden_layers", raising=False)
    monkeypatch.delattr(tiny_model.config, "num_hidden_layers")
    assert roomy_cache(tiny_model) is None
