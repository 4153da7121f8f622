"""From the turns of a prompt to token ids, by the tokenizer's own chat template or a named one."""

from __future__ import annotations

import copy
import datetime
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from splaser_plugin.data.pairs import Message
from splaser_plugin.errors import ModelError, PairsError
from splaser_plugin.files.text import first_line_of

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
    "{% else %}### Response:\n{{ message['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
_NAMED = {"chatml": CHATML, "instruct": INSTRUCT}
_ANSWER = "an answer to look for"
_TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": "Goodbye"},
]
THOUGHT_BEGINS, THOUGHT_ENDS = "<think>", "</think>"
_STOPS = {"chatml": "<|im_end|>", "instruct": "### Instruction:"}
DAY = datetime.date(2024, 7, 26)
"""The date in every prompt, so that runs of two days ask the same: Llama 3's template writes it where it knows none."""
_DATE = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>[^'"]*)(?P=quote)\s*\)""")


class Prompter:
    """Writes prompts for one model.

    template: `auto` for the tokenizer's own chat template, or `chatml` or `instruct`.
    context: the model's longest input in tokens, or None when it has no limit.
    variables: of the template, name to value.
    `end_token` is what the template ends an answer with, None where that is no token of its own. `date` is what stands
    for today's date where the template writes that, else empty.
    Raises ModelError when `auto` is asked for and the tokenizer has no template, or one that doesn't begin the
    assistant's turn or doesn't know one of the variables.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str = "auto",
        context: int | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        if template == "auto" and not tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template. Name the format the model was trained on: "
                "--template chatml or --template instruct."
            )
        self.tokenizer = prepared(tokenizer, variables or {}) if template == "auto" else tokenizer
        self.context = context
        self.stop_text = _STOPS.get(template)
        self._template = _NAMED.get(template)
        self.date = f"{DAY:%d %b %Y}" if self._template is None and _writes_date(_own_template(tokenizer)) else ""
        self._refuse_unknown_variables(variables or {})
        self._refuse_missing_header()
        self.end_token = self._find_end_token()

    def text(self, messages: Sequence[Message]) -> str:
        """The prompt as the model reads it, ready for the assistant's turn.

        Where the template has no system turn, its content comes first in the next one.
        Raises ModelError when the template fails.
        """
        turns = [{"role": message["role"], "content": message["content"]} for message in messages]
        ways = [turns]
        if turns[0]["role"] == "system" and len(turns) > 1:
            ways.append([{**turns[1], "content": turns[0]["content"] + "\n\n" + turns[1]["content"]}, *turns[2:]])
        for way in ways:
            try:
                return self._render(way)
            except Exception as error:  # a template is a program, and may fail in any way
                failed = error
        raise ModelError(
            f"the chat template fails at the prompt {turns[-1]['content'][:40]!r}: {type(failed).__name__}: "
            f"{first_line_of(failed).rstrip('.')}. Mend the template, leave such prompts out, or name another with "
            "--template chatml."
        ) from failed

    def tokens(self, messages: Sequence[Message], *, before_answer: bool = False) -> list[int]:
        """Token ids of the prompt.

        before_answer: an answer without a thought is to follow, so a thought that the template opens is closed.
        Raises PairsError when the model's context has no room for an answer.
        """
        text = self.text(messages)
        if before_answer and opens_thought(text):
            text += f"\n{THOUGHT_ENDS}\n\n"
        ids = self.tokenizer(text, add_special_tokens=self._template is not None)["input_ids"]
        if self.context is not None and len(ids) >= self.context:
            raise PairsError(
                f"a prompt of {len(ids)} tokens ({messages[-1]['content'][:40]!r}...) leaves no room for an answer "
                f"in the model's context of {self.context}. Leave it out, or take a model of a longer context."
            )
        return ids

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether the prompt leaves room for an answer in the model's context. Raises ModelError as `text` does."""
        try:
            self.tokens(messages, before_answer=True)
        except PairsError:
            return False
        return True

    def _refuse_unknown_variables(self, variables: Mapping[str, Any]) -> None:
        template = self._template or _own_template(self.tokenizer)
        for name in variables:
            if not re.search(rf"\b{name}\b", template):
                raise ModelError(
                    f"--template-kwargs: the chat template has no '{name}', so that it would change nothing. Check the "
                    "name, or leave it out."
                )

    def _refuse_missing_header(self) -> None:
        """Raise ModelError when a prompt ends before what the template writes between it and the answer."""
        try:
            prompt, unfinished = self._render(_TURNS[:1]), self._render(_TURNS[:1], add_generation_prompt=False)
            whole = self._render(_TURNS[:2], add_generation_prompt=False)
        except Exception:  # what it says of real prompts counts
            return
        header, found, _ = whole.removeprefix(prompt).partition(_ANSWER)
        if prompt == unfinished and whole.startswith(prompt) and found and header.strip():
            raise ModelError(
                f"the chat template ignores add_generation_prompt, so that the model would write {header!r} itself "
                "before each answer. Mend the template, or name another with --template chatml."
            )

    def _find_end_token(self) -> int | None:
        """The added token that follows an answer, at the conversation's end or, where nothing does there, within it."""
        for turns in (_TURNS[:2], _TURNS):
            try:
                whole = self._render(turns, add_generation_prompt=False)
            except Exception:  # what it says of real prompts counts
                return None
            rest = whole.partition(_ANSWER)[2].lstrip()
            if rest:
                first = self.tokenizer(rest, add_special_tokens=False)["input_ids"][0]
                return first if first in self.tokenizer.added_tokens_decoder else None
        return None

    def _render(self, turns: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            turns, chat_template=self._template, tokenize=False, add_generation_prompt=add_generation_prompt
        )


def prepared(tokenizer: Any, variables: Mapping[str, Any]) -> Any:
    """A tokenizer whose `apply_chat_template` sets these variables, and writes `DAY` for today's date.

    Raises ModelError for a template that makes the date's format itself.
    """
    found, template = copy.copy(tokenizer), _own_template(tokenizer)
    if _writes_date(template):
        dated = _DATE.sub(lambda call: repr(DAY.strftime(call["format"])), template)
        if re.search(r"strftime_now\(", dated):
            raise ModelError(
                "the chat template writes today's date in a format that it makes itself, so that runs of two days "
                "would differ. Write the date into the template."
            )
        found.chat_template = dated
    if variables:
        found.apply_chat_template = partial(found.apply_chat_template, **variables)
    return found


def _own_template(tokenizer: Any) -> str:
    """The tokenizer's chat template, of several the default one; empty for none."""
    found = tokenizer.chat_template or ""
    return found.get("default", "") if isinstance(found, dict) else found


def _writes_date(template: str) -> bool:
    return "strftime_now(" in template


def opens_thought(text: str) -> bool:
    """Whether a text ends inside a thought that has just been opened."""
    return text.rstrip().endswith(THOUGHT_BEGINS)


def without_thought(text: str) -> str:
    """An answer without the thought that it begins with; nothing is left where the thought doesn't end."""
    if not text.lstrip().startswith(THOUGHT_BEGINS):
        return text
    return text.partition(THOUGHT_ENDS)[2]
