"""What a model expects at each token of a given answer: one forward pass, where generating takes one a token."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LOGITS_ROWS = 2048
"""Predicted tokens in one forward pass, about: each has logits over the whole vocabulary."""


def forced_logits(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Tensor]:
    """The logits that predict each token of each answer: one (tokens, vocabulary) tensor a prompt.

    prompts, answers: token ids; a prompt has at least one. One forward pass, padded on the right, where padding
    can't reach what a causal model computes before it. Gradients flow wherever they are enabled.
    """
    rows = [torch.tensor([*prompt, *answer[:-1]]) for prompt, answer in zip(prompts, answers, strict=True)]
    device = next(model.parameters()).device
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    kept = ids.shape[1] - min(len(prompt) for prompt in prompts) + 1
    only_needed = {"logits_to_keep": kept} if _can_leave_out_logits(model) else {}
    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False, **only_needed).logits
    left_out = ids.shape[1] - logits.shape[1]
    first = [len(prompt) - 1 - left_out for prompt in prompts]
    return [logits[row, start : start + len(answers[row])] for row, start in enumerate(first)]


def _can_leave_out_logits(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
