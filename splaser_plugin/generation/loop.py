"""The loop: batches of prompts through transformers' own `generate`, padded on the left, with a roomy cache."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput

from splaser_plugin.distributed import input_device, is_out_of_memory, is_sharded, process_count
from splaser_plugin.errors import ModelError, ScoreError
from splaser_plugin.generation.evaluation import MODEL_ERRORS, evaluating, plain_generation
from splaser_plugin.generation.kv_cache import RoomyLayer, roomy_cache
from splaser_plugin.generation.long_rope import side, turning_point
from splaser_plugin.progress import count_items

FIRST_BATCH = 8
LEAST_GAIN = 1.1
PADDING_TOLERANCE = 0.1
"""Largest change of a logit by padding, in standard deviations of all logits, that rounding may make."""
CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
"""What `generate` calls keys and values, taken and returned; renamed in transformers 5.24."""
SELECTABLE = (RoomyLayer, DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of a cache that hold keys and values of each row, and nothing else."""


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


class Loop:
    """The engine `transformers`.

    batch_size: prompts at once, or 0 to find it by measurement; halved for good whenever the device runs out of
    memory.
    """

    name = "transformers"

    def __init__(self, model: Any, ends: Sequence[int], *, pad: int, context: int | None, batch_size: int) -> None:
        self.model = model
        self.ends = list(ends)
        self.context = context
        self.is_sharded = is_sharded(model)
        self._pad = pad
        self._turn = turning_point(model)
        at_once = batch_size if self.honours_padding() and not (self.is_sharded and self._turn) else 1
        self.batch = BatchSize(at_once or FIRST_BATCH if self.is_sharded else at_once)

    @property
    def at_once(self) -> int:
        return self.batch.now

    def fixed(self) -> Loop:
        """The same, with the number of prompts at once that it has come to."""
        found = copy.copy(self)
        found.batch = BatchSize(self.batch.now)
        return found

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

    def write(self, prompts: Sequence[Sequence[int]], rooms: Sequence[int], expected: Sequence[int]) -> list[list[int]]:
        """See `Engine.write`. Prompts of similar expected lengths are answered together: none waits for a long one."""
        said: list[list[int]] = [[] for _ in prompts]
        waiting = sorted(range(len(prompts)), key=lambda index: (expected[index], len(prompts[index])), reverse=True)
        while waiting:
            batch = self._together(waiting, prompts, rooms)
            left = [self._left(rooms[index], said[index]) for index in batch]
            try:
                more = self._generate([[*prompts[index], *said[index]] for index in batch], left)
            except MODEL_ERRORS as error:
                if is_out_of_memory(error):
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
                if tokens and not self.is_sharded and self._left(rooms[index], said[index]):
                    waiting.append(index)
                else:
                    count_items(1)
        return said

    def _together(self, waiting: list[int], prompts: Sequence[Sequence[int]], rooms: Sequence[int]) -> list[int]:
        """The next batch: prompts that the model answers alike beside each other and alone."""
        lengths = {index: len(prompts[index]) for index in waiting}
        sides = [side(self._turn, lengths[index], lengths[index] + rooms[index]) for index in waiting]
        if sides[0] is None:
            return waiting[:1]
        return [index for index, beyond in zip(waiting, sides, strict=True) if beyond is sides[0]][: self.batch.now]

    def _left(self, room: int, said: Sequence[int]) -> int:
        """How many tokens an answer may still get."""
        return 0 if self._has_ended(said) else room - len(said)

    @torch.no_grad()
    def _generate(self, rows: list[list[int]], rooms: list[int]) -> list[list[int]]:
        """The tokens that follow some unfinished answers, every answer up to its end or as far as there is room."""
        longest = max(len(row) for row in rows)
        steps = max(rooms) if self.context is None else min(max(rooms), self.context - longest)
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
        ends = torch.tensor(self.ends, device=ids.device)
        cache = roomy_cache(self.model)
        nan = _SeenNan()
        while going and steps > 0:
            found = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=GenerationConfig(
                    max_new_tokens=steps,
                    do_sample=False,
                    eos_token_id=self.ends or None,
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
        return bool(tokens) and tokens[-1] in self.ends

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = [tokens.index(end) for end in self.ends if end in tokens]
        return tokens[: min(ends) + 1] if ends else tokens


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


def _rows_of(cache: Any, rows: Tensor) -> Any:
    """Some rows of a cache of keys and values. None where the cache holds anything else: it is then computed again."""
    if not all(type(layer) in SELECTABLE for layer in getattr(cache, "layers", [None])):
        return None
    cache.batch_select_indices(rows)
    return cache
