"""Greedy answers of a causal language model: batched, cached, padded on the left."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput

from splaser_plugin.distributed import input_device, is_sharded, process_count
from splaser_plugin.errors import ModelError, ScoreError
from splaser_plugin.generation.kv_cache import RoomyLayer, roomy_cache
from splaser_plugin.generation.long_rope import side, turning_point
from splaser_plugin.generation.prompts import THOUGHT_BEGINS, THOUGHT_ENDS, Prompter, opens_thought, without_thought
from splaser_plugin.progress import measured

FIRST_BATCH = 8
LEAST_GAIN = 1.1
PADDING_TOLERANCE = 0.1
"""Largest change of a logit by padding, in standard deviations of all logits, that rounding may make."""
MODEL_ERRORS = (RuntimeError, ValueError, LookupError, ArithmeticError)
"""What a model's own code may raise over the numbers that it computes."""
PROMPT_END = 16
"""Tokens of a prompt in which the tag that opens a thought is looked for: more than any tokenizer makes of it."""
CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
"""What `generate` calls keys and values, taken and returned; renamed in transformers 5.24."""
SELECTABLE = (RoomyLayer, DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of a cache that hold keys and values of each row, and nothing else."""
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
"""Words in the errors of devices that have no error class of their own for it."""


@dataclass(frozen=True)
class Answer:
    """The model's answer to one prompt."""

    text: str
    """Without the thought, <think>...</think>, that it may begin with."""
    tokens: tuple[int, ...]
    """Generated token ids, with the end token if the model generated one."""
    is_cut: bool = False
    """Whether it was cut off at the longest length before the model ended it."""
    is_half_read: bool = False
    """Whether it is longer than what the embedder reads."""


class BatchSize:
    """How many prompts are answered at once: `now`.

    fixed: the size, or 0 to start at 8 and double it for as long as tokens are generated at least a tenth faster.
    """

    def __init__(self, fixed: int) -> None:
        self.now = fixed or FIRST_BATCH
        self._grows = fixed == 0
        self._tokens_per_s = 0.0

    def took(self, prompts: int, tokens: int, seconds: float) -> None:
        """Adapt the size to the speed of a batch that was answered."""
        if not self._grows or prompts < self.now:
            return
        if tokens / seconds >= LEAST_GAIN * self._tokens_per_s:
            self._tokens_per_s = tokens / seconds
            self.now *= 2
        else:
            self._grows = False
            self.now //= 2

    def halve(self) -> None:
        """Halve the size for good, as the memory was too small."""
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
        self.is_sharded = is_sharded(model)
        self.end_tokens = _end_tokens(model, prompter)
        self._pad = prompter.tokenizer.pad_token_id
        if self._pad is None:
            self._pad = self.end_tokens[0] if self.end_tokens else 0
        special = set(prompter.tokenizer.all_special_tokens) & {THOUGHT_BEGINS, THOUGHT_ENDS}
        self._tags = {prompter.tokenizer.convert_tokens_to_ids(tag): tag for tag in special}
        self._turn = turning_point(model)
        at_once = batch_size if self.honours_padding() and not (self.is_sharded and self._turn) else 1
        self.batch = BatchSize(at_once or FIRST_BATCH if self.is_sharded else at_once)

    def honours_padding(self) -> bool:
        """Whether the model leaves out what the attention mask hides: the state of RWKV takes padding in.

        Models with nothing but keys and values do. Others are tried on one prompt, with and without padding.
        """
        if self.is_sharded or roomy_cache(self.model) is not None:
            return True
        ids = torch.arange(1, 9)[None].to(input_device(self.model))
        padded = torch.nn.functional.pad(ids, (ids.shape[1], 0), value=self._pad)
        mask = (torch.arange(padded.shape[1], device=ids.device) >= ids.shape[1]).long()[None]
        try:
            alone, beside = self._first_logits(ids, torch.ones_like(ids)), self._first_logits(padded, mask)
        except MODEL_ERRORS:
            return True
        return bool((alone - beside).abs().max() <= PADDING_TOLERANCE * alone.std())

    @torch.no_grad()
    def _first_logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The logits of the token that follows a prompt, as `generate` computes them."""
        with plain_generation(self.model), evaluating(self.model):
            config = GenerationConfig(
                max_new_tokens=1,
                do_sample=False,
                pad_token_id=self._pad,
                return_dict_in_generate=True,
                output_logits=True,
            )
            found = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return found.logits[0].float()

    def answer(self, prompts: Sequence[Sequence[int]], expected: Sequence[int] | None = None) -> list[Answer]:
        """Greedy answers, in the prompts' order.

        prompts: token ids. expected: guessed lengths of the answers, in tokens; prompts of similar lengths
        are answered together, so that a batch doesn't wait for one long answer.
        """
        lengths = expected or [0] * len(prompts)
        said: list[list[int]] = [[] for _ in prompts]
        waiting = sorted(range(len(prompts)), key=lambda index: (lengths[index], len(prompts[index])), reverse=True)
        while waiting:
            batch = self._together(waiting, prompts)
            try:
                more = self._generate([prompts[index] for index in batch], [said[index] for index in batch])
            except MODEL_ERRORS as error:
                if _is_out_of_memory(error):
                    if self.batch.now == 1 or self.is_sharded:
                        raise ModelError(
                            f"the device's memory has no room for {len(batch)} answers at once. Lower "
                            "--max-new-tokens or --batch-size."
                        ) from error
                    self.batch.halve()
                    continue
                raise ScoreError(f"the model fails at its answers: {type(error).__name__}: {error}") from error
            waiting = [index for index in waiting if index not in batch]
            for index, tokens in zip(batch, more, strict=True):
                said[index] += tokens
                if tokens and not self.is_sharded and self._room(prompts[index], said[index]):
                    waiting.append(index)
                else:
                    measured(1)
        return [self._answer(prompt, tokens) for prompt, tokens in zip(prompts, said, strict=True)]

    def _together(self, waiting: list[int], prompts: Sequence[Sequence[int]]) -> list[int]:
        """The next batch: prompts that the model answers alike beside each other and alone."""
        sides = [side(self._turn, len(prompts[index]), len(prompts[index]) + self.max_new_tokens) for index in waiting]
        if sides[0] is None:
            return waiting[:1]
        return [index for index, beyond in zip(waiting, sides, strict=True) if beyond is sides[0]][: self.batch.now]

    def _room(self, prompt: Sequence[int], said: Sequence[int]) -> int:
        """How many tokens an answer that goes on may still get."""
        if self._has_ended(said):
            return 0
        room = self.max_new_tokens
        if self.prompter.context is not None:
            room = min(room, self.prompter.context - len(prompt))
        return room - len(said)

    @torch.no_grad()
    def _generate(self, prompts: list[Sequence[int]], said: list[list[int]]) -> list[list[int]]:
        """The tokens that follow some unfinished answers, every answer up to its end or as far as there is room."""
        rooms = [self._room(prompt, tokens) for prompt, tokens in zip(prompts, said, strict=True)]
        rows = [[*prompt, *tokens] for prompt, tokens in zip(prompts, said, strict=True)]
        longest = max(len(row) for row in rows)
        steps = max(rooms) if self.prompter.context is None else min(max(rooms), self.prompter.context - longest)
        ids = torch.full((len(rows), longest), self._pad)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, longest - len(row) :] = torch.tensor(row)
            mask[place, longest - len(row) :] = 1
        device = input_device(self.model)
        started = time.perf_counter()
        with plain_generation(self.model), evaluating(self.model):
            output = self._continue(ids.to(device), mask.to(device), steps)
        self.batch.took(len(rows), sum(map(len, output)), time.perf_counter() - started)
        return [tokens[:room] for tokens, room in zip(output, rooms, strict=True)]

    def _continue(self, ids: Tensor, mask: Tensor, steps: int) -> list[list[int]]:
        """Up to `steps` tokens that follow every row. Whenever half of the rows have ended, the others go on alone."""
        made: list[list[int]] = [[] for _ in ids]
        going = list(range(len(ids)))
        ends = torch.tensor(self.end_tokens, device=ids.device)
        cache = roomy_cache(self.model)
        nan = _SeenNan()
        while going and steps > 0:
            found = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=GenerationConfig(
                    max_new_tokens=steps,
                    do_sample=False,
                    eos_token_id=self.end_tokens or None,
                    pad_token_id=self._pad,
                    use_cache=True,
                    return_dict_in_generate=True,
                ),
                logits_processor=LogitsProcessorList([nan]),
                stopping_criteria=None if self.is_sharded else StoppingCriteriaList([_HalfEnded(len(ids), ends)]),
                synced_gpus=process_count() > 1 and self.is_sharded,
                **({} if cache is None else {CACHE: cache}),
            )
            new = found.sequences[:, ids.shape[1] :]
            steps = steps - new.shape[1] if new.shape[1] else 0
            for index, tokens in zip(going, new.tolist(), strict=True):
                made[index] += self._until_end(tokens)
            left = [place for place, index in enumerate(going) if not self._has_ended(made[index])]
            going = [going[place] for place in left]
            chosen = torch.tensor(left, dtype=torch.long)  # on the CPU: the layers of a cache may be on several devices
            ids = found.sequences[chosen]
            mask = torch.cat([mask, torch.ones_like(new)], dim=1)[chosen]
            cache = _rows_of(getattr(found, CACHE), chosen)
        if nan.was_seen:
            raise ScoreError("the model's logits are nan, so that it has no answers.")
        return made

    def _has_ended(self, tokens: Sequence[int]) -> bool:
        return bool(tokens) and tokens[-1] in self.end_tokens

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = [tokens.index(end) for end in self.end_tokens if end in tokens]
        return tokens[: min(ends) + 1] if ends else tokens

    def _answer(self, prompt: Sequence[int], tokens: list[int]) -> Answer:
        said = tokens[:-1] if self._has_ended(tokens) else tokens
        text = self._decoded(said)
        stopped = ""
        if self.prompter.stop_text:
            text, stopped, _ = text.partition(self.prompter.stop_text)
        if opens_thought(self.prompter.tokenizer.decode(prompt[-PROMPT_END:])):
            text = THOUGHT_BEGINS + text
        text = without_thought(text)
        return Answer(text.strip(), tuple(tokens), is_cut=not self._has_ended(tokens) and not stopped)

    def _decoded(self, tokens: Sequence[int]) -> str:
        """The text without special tokens, but for the tags of a thought where the tokenizer has them as such."""
        tokenizer = self.prompter.tokenizer
        parts = itertools.groupby(tokens, key=self._tags.get)
        return "".join(tag or tokenizer.decode(list(part), skip_special_tokens=True) for tag, part in parts)


class _SeenNan(LogitsProcessor):
    """Remembers whether any logit was nan, which greedy choice would take for the first token."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    @property
    def was_seen(self) -> bool:
        return self._seen is not None and bool(self._seen)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        now = scores.isnan().any()
        self._seen = now if self._seen is None else self._seen | now
        return scores


class _HalfEnded(StoppingCriteria):
    """Stops generating once half of the rows, or more, have ended."""

    def __init__(self, rows: int, ends: Tensor) -> None:
        self._ends = ends
        self._ended = torch.zeros(rows, dtype=torch.bool, device=ends.device)

    def __call__(self, input_ids: Tensor, scores: Any, **rest: Any) -> Tensor:
        self._ended |= torch.isin(input_ids[:, -1], self._ends)
        return (2 * self._ended.sum() >= len(self._ended)).expand(len(self._ended))


def _is_out_of_memory(error: Exception) -> bool:
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(words in said for words in OUT_OF_MEMORY)


def _rows_of(cache: Any, rows: Tensor) -> Any:
    """Some rows of a cache of keys and values. None where the cache holds anything else: it is then computed again."""
    if not all(type(layer) in SELECTABLE for layer in getattr(cache, "layers", [None])):
        return None
    cache.batch_select_indices(rows)
    return cache


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
    ends += [prompter.tokenizer.eos_token_id, prompter.end_token]
    if prompter.stop_text in prompter.tokenizer.get_vocab():
        ends.append(prompter.tokenizer.convert_tokens_to_ids(prompter.stop_text))
    return sorted({end for end in ends if end is not None})
