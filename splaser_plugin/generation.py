"""Greedy answers of a causal language model: batched, cached, padded on the left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from splaser_plugin.distributed import process_count
from splaser_plugin.prompts import Prompter


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt."""

    text: str
    tokens: tuple[int, ...]
    """Generated ids, with the end token if the model came to one."""


class Generator:
    """Answers prompts with one model.

    max_new_tokens: longest answer, in tokens. batch_size: prompts at once; halved for good whenever the
    device runs out of memory.
    """

    def __init__(self, model: Any, prompter: Prompter, *, max_new_tokens: int, batch_size: int) -> None:
        self.model = model
        self.prompter = prompter
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.end_tokens = _end_tokens(model, prompter)
        self._pad = prompter.tokenizer.pad_token_id
        if self._pad is None:
            self._pad = self.end_tokens[0] if self.end_tokens else 0

    def answer(self, prompts: Sequence[Sequence[int]], expected: Sequence[int] | None = None) -> list[Answer]:
        """Greedy answers, in the prompts' order.

        prompts: token ids. expected: guessed lengths of the answers, in tokens; prompts of similar lengths
        are answered together, so that a batch doesn't wait for one long answer.
        """
        lengths = expected or [0] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda index: (lengths[index], len(prompts[index])), reverse=True)
        answers: dict[int, Answer] = {}
        start = 0
        while start < len(order):
            batch = order[start : start + self.batch_size]
            try:
                generated = self._generate([prompts[index] for index in batch])
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                continue
            answers.update(zip(batch, generated, strict=True))
            start += len(batch)
        return [answers[index] for index in range(len(prompts))]

    @torch.no_grad()
    def _generate(self, prompts: list[Sequence[int]]) -> list[Answer]:
        longest = max(len(prompt) for prompt in prompts)
        room = self.max_new_tokens
        if self.prompter.context is not None:
            room = min(room, self.prompter.context - longest)
        ids = torch.full((len(prompts), longest), self._pad)
        mask = torch.zeros((len(prompts), longest), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        greedy = GenerationConfig(
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=self.end_tokens or None,
            pad_token_id=self._pad,
            use_cache=True,
        )
        device = next(self.model.parameters()).device
        with plain_generation(self.model), evaluating(self.model):
            output = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=greedy,
                synced_gpus=process_count() > 1 and _is_sharded(self.model),
            )
        return [self._trim(row) for row in output[:, longest:].tolist()]

    def _trim(self, tokens: list[int]) -> Answer:
        ends = [tokens.index(end) for end in self.end_tokens if end in tokens]
        said = tokens[: min(ends)] if ends else tokens
        text = self.prompter.tokenizer.decode(said, skip_special_tokens=True)
        if self.prompter.stop_text:
            text = text.split(self.prompter.stop_text)[0]
        return Answer(text.strip(), tuple(tokens[: min(ends) + 1] if ends else tokens))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Hide the model's own generation defaults: its sampling settings and penalties would change greedy answers."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _end_tokens(model: Any, prompter: Prompter) -> list[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = list(own) if isinstance(own, (list, tuple)) else [own]
    ends.append(prompter.tokenizer.eos_token_id)
    if prompter.stop_text in prompter.tokenizer.get_vocab():
        ends.append(prompter.tokenizer.convert_tokens_to_ids(prompter.stop_text))
    return sorted({end for end in ends if end is not None})


def _is_sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
