"""From the turns of a prompt to token ids, by the tokenizer's own chat template or a named one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from splaser_plugin.data.pairs import Message
from splaser_plugin.errors import ModelError, PairsError

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
_STOPS = {"chatml": "<|im_end|>", "instruct": "### Instruction:"}


class Prompter:
    """Writes prompts for one model.

    template: `auto` for the tokenizer's own chat template, or `chatml` or `instruct`.
    context: the model's longest input in tokens, or None when it has no limit.
    Raises ModelError when `auto` is asked for and the tokenizer has no template.
    """

    def __init__(self, tokenizer: Any, template: str = "auto", context: int | None = None) -> None:
        if template == "auto" and not tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template. Name the format the model was trained on: "
                "--template chatml or --template instruct."
            )
        self.tokenizer = tokenizer
        self.context = context
        self.stop_text = _STOPS.get(template)
        self._template = _NAMED.get(template)

    def text(self, messages: Sequence[Message]) -> str:
        """The prompt as the model reads it, ready for the assistant's turn."""
        from jinja2 import TemplateError

        turns = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            return self._render(turns)
        except TemplateError:
            if turns[0]["role"] != "system" or len(turns) < 2:
                raise
        first = {**turns[1], "content": turns[0]["content"] + "\n\n" + turns[1]["content"]}
        return self._render([first, *turns[2:]])

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the prompt. Raises PairsError when the model's context has no room for an answer."""
        ids = self.tokenizer(self.text(messages), add_special_tokens=self._template is not None)["input_ids"]
        if self.context is not None and len(ids) >= self.context:
            raise PairsError(
                f"a prompt of {len(ids)} tokens ({messages[-1]['content'][:40]!r}...) leaves no room for an answer "
                f"in the model's context of {self.context}. Lower --max-prompt-chars."
            )
        return ids

    def _render(self, turns: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(
            turns, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
