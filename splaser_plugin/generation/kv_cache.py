"""A cache of keys and values with room for more tokens: transformers' own copies all of them at every token."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from splaser_plugin.generation.evaluation import MODEL_ERRORS

LEAST_ROOM = 64
"""How many more tokens there is room for after the cache has grown; or a quarter of all tokens, if that is more."""


class RoomyLayer(DynamicLayer):
    """Transformers' own layer, but its tensors have room for more than they hold."""

    _keys_room: Tensor | None = None
    _values_room: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None or self.get_seq_length() == 0:
            return super().update(key_states, value_states, *rest, **named)
        self.keys, self._keys_room = _appended(self.keys, key_states, self._keys_room)
        self.values, self._values_room = _appended(self.values, value_states, self._values_room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._keys_room = self._values_room = None  # They would keep the rows that are left out in memory.


def roomy_cache(model: Any) -> DynamicCache | None:
    """An empty cache for the model. None where the model needs another kind of cache, which `generate` makes then."""
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if supports is None or not supports() or not _takes_a_cache(model):
        return None
    try:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    except MODEL_ERRORS:
        return None  # of a configuration that transformers makes no cache of: `generate` fails with the reason
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer() for _ in cache.layers]
    return cache


def _takes_a_cache(model: Any) -> bool:
    """Whether the model has a place for keys and values: the first GPT has none."""
    taken = inspect.signature(model.forward).parameters
    return "input_ids" not in taken or not taken.keys().isdisjoint({"cache", "past_key_values"})


def _appended(before: Tensor, new: Tensor, room: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both tensors joined along the tokens, and the tensor with room that the result is a view of.

    That is `room` as long as `before` is its beginning and everything fits in, else a new one.
    """
    start, end = before.shape[-2], before.shape[-2] + new.shape[-2]
    is_part = room is not None and before.data_ptr() == room.data_ptr() and before.shape[:-2] == room.shape[:-2]
    if room is None or not is_part or room.shape[-2] < end:
        room = before.new_empty(*before.shape[:-2], end + max(LEAST_ROOM, end // 4), before.shape[-1])
        room[..., :start, :] = before
    room[..., start:end, :] = new
    return room[..., :end, :], room
