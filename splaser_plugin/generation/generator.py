"""Greedy answers of a causal language model: its engine writes the tokens, here they become text."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from splaser_plugin.errors import ModelError
from splaser_plugin.generation.continuous import ContinuousBatching
from splaser_plugin.generation.engines import PROBE_LENGTH, Engine, check_alike
from splaser_plugin.generation.loop import FIRST_BATCH, Loop
from splaser_plugin.generation.prompts import THOUGHT_BEGINS, THOUGHT_ENDS, Prompter, opens_thought, without_thought
from splaser_plugin.generation.vllm import Vllm

PROMPT_END = 16
"""Tokens of a prompt in which the tag that opens a thought is looked for: more than any tokenizer makes of it."""


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
        self.end_tokens = _end_tokens(model, prompter)
        pad = prompter.tokenizer.pad_token_id
        if pad is None:
            pad = self.end_tokens[0] if self.end_tokens else 0
        self._pad, self._batch_size = pad, batch_size
        self.engine: Engine = Loop(model, self.end_tokens, pad=pad, context=prompter.context, batch_size=batch_size)
        special = set(prompter.tokenizer.all_special_tokens) & {THOUGHT_BEGINS, THOUGHT_ENDS}
        self._tags = {prompter.tokenizer.convert_tokens_to_ids(tag): tag for tag in special}

    def use_continuous(self) -> None:
        """Have transformers' continuous batching write from now on.

        Raises ModelError when it can't take the model, or doesn't write what the loop does.
        """
        at_once = self._batch_size or FIRST_BATCH
        self._try(ContinuousBatching(self.model, self.end_tokens, pad=self._pad, batch_size=at_once))

    def use_vllm(self, longest_prompt: int, *, url: str = "", llm: Any = None) -> None:
        """Have vLLM write from now on: the server at `url`, an engine that is there, or a new one in this process.

        longest_prompt: tokens, the template's among them. llm: a `vllm.LLM`. Raises ModelError as `use_continuous`
        does, and when vLLM isn't installed.
        """
        longest = max(longest_prompt + self.max_new_tokens, PROBE_LENGTH)
        longest = min(longest, self.prompter.context or longest)
        at_once = self._batch_size or FIRST_BATCH
        engine = Vllm(self.model, self.end_tokens, longest=longest, batch_size=at_once, url=url, llm=llm)
        try:
            self._try(engine)
        except ModelError:
            engine.stop()
            raise

    def _try(self, engine: Engine) -> None:
        check_alike(engine, self.engine, self.model)
        self.use(engine)

    def use(self, engine: Engine) -> None:
        """Have an engine that was found to write what the loop does write from now on."""
        self.engine = engine

    def limited(self, max_new_tokens: int) -> Generator:
        """The same engine for answers of at most so many tokens, and of as many prompts at once as now."""
        found = copy.copy(self)
        found.max_new_tokens, found.engine = max_new_tokens, self.engine.fixed()
        return found

    def answer(self, prompts: Sequence[Sequence[int]], expected: Sequence[int] | None = None) -> list[Answer]:
        """Greedy answers, in the prompts' order.

        prompts: token ids. expected: guessed lengths of the answers, in tokens.
        """
        context = self.prompter.context
        rooms = [
            self.max_new_tokens if context is None else min(self.max_new_tokens, context - len(prompt))
            for prompt in prompts
        ]
        said = self.engine.write(prompts, rooms, expected or [0] * len(prompts))
        return [self._answer(prompt, tokens) for prompt, tokens in zip(prompts, said, strict=True)]

    def _answer(self, prompt: Sequence[int], tokens: list[int]) -> Answer:
        has_ended = bool(tokens) and tokens[-1] in self.end_tokens
        text = self._decoded(tokens[:-1] if has_ended else tokens)
        stopped = ""
        if self.prompter.stop_text:
            text, stopped, _ = text.partition(self.prompter.stop_text)
        if opens_thought(self.prompter.tokenizer.decode(prompt[-PROMPT_END:])):
            text = THOUGHT_BEGINS + text
        text = without_thought(text)
        return Answer(text.strip(), tuple(tokens), is_cut=not has_ended and not stopped)

    def _decoded(self, tokens: Sequence[int]) -> str:
        """The text without special tokens, but for the tags of a thought where the tokenizer has them as such."""
        tokenizer = self.prompter.tokenizer
        parts = itertools.groupby(tokens, key=self._tags.get)
        return "".join(tag or tokenizer.decode(list(part), skip_special_tokens=True) for tag, part in parts)


def _end_tokens(model: Any, prompter: Prompter) -> list[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = list(own) if isinstance(own, (list, tuple)) else [own]
    ends += [prompter.tokenizer.eos_token_id, prompter.end_token]
    if prompter.stop_text in prompter.tokenizer.get_vocab():
        ends.append(prompter.tokenizer.convert_tokens_to_ids(prompter.stop_text))
    return sorted({end for end in ends if end is not None})
