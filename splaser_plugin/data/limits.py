"""How long a prompt and an answer may be, in tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from splaser_plugin.config.stages import MAX_ANSWER_TOKENS, MAX_PROMPT_TOKENS
from splaser_plugin.data.formats import Message
from splaser_plugin.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARS_PER_TOKEN = 128
"""Of the longest tokens that usual vocabularies have. Texts of more for each token allowed aren't tokenized at all."""


@dataclass(frozen=True)
class TokenLimits:
    """The longest prompt and the longest answer of a pair, in tokens of a model's own tokenizer.

    Raises:
        ConfigError: A limit is below 1.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt: int = MAX_PROMPT_TOKENS
    """All turns together, the system's included; role names and the chat template are not counted."""
    answer: int = MAX_ANSWER_TOKENS
    """Of each answer."""
    fits: Callable[[Sequence[Message]], bool] | None = None
    """Whether a prompt of these turns leaves room for an answer in the model's context; None takes it for granted."""

    def __post_init__(self) -> None:
        for option, limit in (("max_prompt_tokens", self.prompt), ("max_answer_tokens", self.answer)):
            if limit < 1:
                raise ConfigError(f"{option}: {limit}, expected 1 or more.")

    def has_long_prompt(self, turns: Sequence[str]) -> bool:
        """Whether a prompt of these turns is longer than it may be."""
        return self._exceeds(turns, self.prompt)

    def has_long_answer(self, answers: Sequence[str]) -> bool:
        """Whether one of the answers is longer than it may be."""
        return any(self._exceeds([answer], self.answer) for answer in answers)

    def is_beyond_context(self, turns: Sequence[Message]) -> bool:
        """Whether a prompt of these turns, as the model reads it, leaves no room for an answer."""
        return self.fits is not None and not self.fits(turns)

    def _exceeds(self, texts: Sequence[str], limit: int) -> bool:
        if sum(map(len, texts)) > CHARS_PER_TOKEN * limit:
            return True
        rows = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return sum(map(len, rows)) > limit
