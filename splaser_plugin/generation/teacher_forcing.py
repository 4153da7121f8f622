"""What a model predicts at every token of a given answer: one forward pass, where generating takes one a token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from splaser_plugin.distributed import input_device, is_sharded
from splaser_plugin.generation.evaluation import evaluating, failures_told
from splaser_plugin.generation.long_rope import batches, turning_point
from splaser_plugin.progress import count_items

LOGITS_ROWS = 2048
"""About how many tokens one forward pass predicts: every one has logits over the whole vocabulary."""


def forced_logits(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Tensor]:
    """The logits that predict each token of each answer: one (tokens, vocabulary) tensor a prompt.

    prompts, answers: token ids; a prompt has at least one. One forward pass, padded on the right, where padding
    can't reach what a causal model computes before it. Gradients flow wherever they are enabled.

    Raises ScoreError when the model's own code fails, and ModelError when the device is out of memory.
    """
    rows = [torch.tensor([*prompt, *answer[:-1]]) for prompt, answer in zip(prompts, answers, strict=True)]
    device = input_device(model)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    kept = ids.shape[1] - min(len(prompt) for prompt in prompts) + 1
    only_needed = {"logits_to_keep": kept} if _can_leave_out_logits(model) else {}
    no_room = f"the device's memory has no room for {len(rows)} answers in one forward pass. Lower --batch-size."
    with failures_told(no_room, "the model fails at given answers"):
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False, **only_needed).logits
    left_out = ids.shape[1] - logits.shape[1]
    first = [len(prompt) - 1 - left_out for prompt in prompts]
    return [logits[row, start : start + len(answers[row])] for row, start in enumerate(first)]


def forced_means(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Tensor:
    """Mean log-probability of each answer's tokens after its prompt, in nats a token; 0 for an empty answer.

    Returns (answers,), float32 or, for a float64 model, float64. One forward pass; see `forced_logits`.
    """
    found = forced_logits(model, prompts, answers)
    return torch.stack([_mean(logits, answer) for logits, answer in zip(found, answers, strict=True)])


@torch.no_grad()
def mean_log_probabilities(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    batch_size: int,
    done: Callable[[int], None] = count_items,
) -> list[float]:
    """`forced_means` of any number of answers. The model is in evaluation mode meanwhile.

    batch_size: most answers in one forward pass. done: called after every forward pass with its number of answers.
    """
    means: dict[int, float] = {}
    with evaluating(model):
        turn = turning_point(model)
        lengths = [len(prompt) + len(answer) - 1 for prompt, answer in zip(prompts, answers, strict=True)]
        for batch in batches(lengths, 1 if turn and is_sharded(model) else batch_size, turn):
            found = forced_means(model, [prompts[index] for index in batch], [answers[index] for index in batch])
            means.update(zip(batch, found.tolist(), strict=True))
            done(len(batch))
    return [means[index] for index in range(len(prompts))]


def _mean(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Mean of the tokens' log-probabilities. logits: (tokens, vocabulary), which predict the tokens."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if not tokens:
        return torch.zeros((), dtype=dtype, device=logits.device)
    log_probabilities = torch.log_softmax(logits.to(dtype), dim=-1)
    return log_probabilities.gather(-1, torch.tensor(tokens, device=logits.device)[:, None]).mean()


def fitting_batch(batch_size: int, longest: int) -> int:
    """How many answers of at most `longest` tokens, at most `batch_size`, leave the logits within bounds."""
    return max(1, min(batch_size, LOGITS_ROWS // max(1, longest)))


def _can_leave_out_logits(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
