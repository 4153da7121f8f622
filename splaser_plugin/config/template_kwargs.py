"""Variables of a chat template, as `--template-kwargs enable_thinking=false` sets them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from splaser_plugin.errors import ConfigError

WORDS = {"true": True, "false": False, "null": None, "none": None}
OURS = frozenset({
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
    "continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip
"""What the program, or the tokenizer's method, sets itself."""

Value = bool | int | float | str | None


def parse_template_kwargs(texts: Sequence[str]) -> dict[str, Value]:
    """Name to value of `KEY=VALUE` texts.

    A value is true, false or none in any case, a number, or else text: in a template the text `False` would be true.
    Raises ConfigError for a text of another form, a name that isn't the user's to set, and one that stands twice.
    """
    found: dict[str, Value] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--template-kwargs: got '{text}', expected KEY=VALUE, as in enable_thinking=false.")
        if name in OURS:
            raise ConfigError(f"--template-kwargs: '{name}' is set by splaser. Leave it out.")
        if name in found:
            raise ConfigError(f"--template-kwargs: '{name}' stands there twice. Leave one out.")
        found[name] = _value(value)
    return found


def _value(text: str) -> Value:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, (int, float)) else text
