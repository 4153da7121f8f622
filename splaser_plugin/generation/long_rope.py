"""Models that compute a whole batch otherwise once one of its rows is long: what they may have in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def turning_point(model: Any) -> int | None:
    """The length in tokens beyond which the model takes other position embeddings, for all rows of a batch.

    That is how transformers computes "longrope" (Ding et al. 2024, LongRoPE). None for other models, whose rows don't
    depend on each other.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):  # one for all layers, or one for each type of layer
        if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
            return int(parameters["original_max_position_embeddings"])
    return None


def side(turn: int | None, shortest: int, longest: int) -> bool | None:
    """On which side a row is while it grows: True beyond the turning point, False before it, None if it crosses it."""
    if turn is None or longest <= turn:
        return False
    return True if shortest > turn else None


def batches(lengths: Sequence[int], batch_size: int, turn: int | None) -> list[list[int]]:
    """Places of rows in batches: those of similar length together, so that little is padded, and on the same side."""
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    sides = [
        [place for place in order if side(turn, lengths[place], lengths[place]) is beyond] for beyond in (False, True)
    ]
    return [rows[first : first + batch_size] for rows in sides for first in range(0, len(rows), batch_size)]
