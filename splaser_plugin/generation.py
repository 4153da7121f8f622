"""Greedy answers of a causal language model: batched, cached, padded on the left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from splaser_plugin.distributed import process_count
from splaser_plugin.prompts import Prompter

FIRST_BATCH = 8
LEAST_GAIN = 1.1


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt."""

    text: str
    tokens: tuple[int, ...]
    """Generated ids, with the end token if the model came to one."""


class BatchSize:
    """How many prompts are answered at once: `now`.

    fixed: that many; with 0 it starts at 8 and doubles for as long as tokens come at least a tenth faster.
    """

    def __init__(self, fixed: int) -> None:
        self.now = fixed or FIRST_BATCH
        self._grows = fixed == 0
        self._tokens_per_s = 0.0

    def took(self, prompts: int, tokens: int, seconds: float) -> None:
        """Learn from a batch that was answered."""
        if not self._grows or prompts < self.now:
            return
        if tokens / seconds >= LEAST_GAIN * self._tokens_per_s:
            self._tokens_per_s = tokens / seconds
            self.now *= 2
        else:
            self._grows = False
            self.now //= 2

    def halve(self) -> None:
        """Make it smaller for good: the memory was too small."""
        self._grows = False
        self.now //= 2


class Generator:
    """Answers prompts with one model.

    max_new_tokens: longest answer, in tokens; an answer also ends where the model's context does.
    batch_size: prompts at once, or 0 to find it by measurement; halved for good whenever the device runs out of
    memory.
    """

    def __init__(self, model: Any, prompter: Prompter, *, max_new_tokens: int, batch_size: int) -> None:
        self.model = model
        self.prompter = prompter
        self.max_new_tokens = max_new_tokens
        self.is_sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        self.batch = BatchSize(batch_size or FIRST_BATCH if self.is_sharded else batch_size)
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
        said: list[list[int]] = [[] for _ in prompts]
        waiting = sorted(range(len(prompts)), key=lambda index: (lengths[index], len(prompts[index])), reverse=True)
        while waiting:
            batch = waiting[: self.batch.now]
            try:
                more = self._generate([prompts[index] for index in batch], [said[index] for index in batch])
            except torch.OutOfMemoryError:
                if self.batch.now == 1 or self.is_sharded:
                    raise
                self.batch.halve()
                continue
            waiting = waiting[len(batch) :]
            for index, tokens in zip(batch, more, strict=True):
                said[index] += tokens
                if tokens and not self.is_sharded and self._room(prompts[index], said[index]):
                    waiting.append(index)
        return [self._answer(tokens) for tokens in said]

    def _room(self, prompt: Sequence[int], said: Sequence[int]) -> int:
        """How many tokens an answer that goes on may still get."""
        if said and said[-1] in self.end_tokens:
            return 0
        room = self.max_new_tokens
        if self.prompter.context is not None:
            room = min(room, self.prompter.context - len(prompt))
        return room - len(said)

    @torch.no_grad()
    def _generate(self, prompts: list[Sequence[int]], said: list[list[int]]) -> list[list[int]]:
        """What follows the beginnings of some answers, each up to its end or its room."""
        rooms = [self._room(prompt, tokens) for prompt, tokens in zip(prompts, said, strict=True)]
        rows = [[*prompt, *tokens] for prompt, tokens in zip(prompts, said, strict=True)]
        longest = max(len(row) for row in rows)
        steps = max(rooms) if self.prompter.context is None else min(max(rooms), self.prompter.context - longest)
        ids = torch.full((len(rows), longest), self._pad)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, longest - len(row) :] = torch.tensor(row)
            mask[place, longest - len(row) :] = 1
        greedy = GenerationConfig(
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=self.end_tokens or None,
            pad_token_id=self._pad,
            use_cache=True,
        )
        device = next(self.model.parameters()).device
        started = time.perf_counter()
        with plain_generation(self.model), evaluating(self.model):
            output = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=greedy,
                synced_gpus=process_count() > 1 and self.is_sharded,
            )[:, longest:].cpu()
        self.batch.took(len(rows), output.numel(), time.perf_counter() - started)
        return [self._until_end(row)[:room] for row, room in zip(output.tolist(), rooms, strict=True)]

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = [tokens.index(end) for end in self.end_tokens if end in tokens]
        return tokens[: min(ends) + 1] if ends else tokens

    def _answer(self, tokens: list[int]) -> Answer:
        has_end = bool(tokens) and tokens[-1] in self.end_tokens
        text = self.prompter.tokenizer.decode(tokens[:-1] if has_end else tokens, skip_special_tokens=True)
        if self.prompter.stop_text:
            text = text.split(self.prompter.stop_text)[0]
        return Answer(text.strip(), tuple(tokens))


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
