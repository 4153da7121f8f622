"""Which columns make a preference pair: rows in the formats of other projects, read into one shape.

A row is recognised by its columns alone (`FORMATS`). Its parts are then read without trust: anything that is
not the text or the turns it should be raises `UnusableRowError` with a short cause, which the loader counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict, TypeGuard


class Message(TypedDict):
    """One turn, as chat templates take it. `role` is system, user or assistant."""

    role: str
    content: str


class UnusableRowError(Exception):
    """A row that can't be a pair. `cause` is the short phrase under which it is counted."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


@dataclass(frozen=True)
class Format:
    """The columns a format needs. Others may stand beside them: `system` is read wherever it is found."""

    name: str
    prompt: str | None
    """None: the prompt is what both answers begin with."""
    chosen: str
    rejected: str | None
    """None: there is no rejected answer."""

    @cached_property
    def columns(self) -> frozenset[str]:
        return frozenset(column for column in (self.prompt, self.chosen, self.rejected) if column is not None)


# The first format whose columns are all there is taken, so what asks for more stands first.
FORMATS = (
    Format("LLaMA-Factory sharegpt ranking", "conversations", "chosen", "rejected"),
    Format("TRL preference or ultrafeedback_binarized", "prompt", "chosen", "rejected"),
    Format("orca_dpo_pairs", "question", "chosen", "rejected"),
    Format("LLaMA-Factory alpaca ranking", "instruction", "chosen", "rejected"),
    Format("Axolotl icr", "input", "chosen", "rejected"),
    Format("Axolotl prompt", "prompt", "chosen_response", "rejected_response"),
    Format("Axolotl instruction", "instruction", "chosen_response", "rejected_response"),
    Format("Axolotl input", "input", "chosen_response", "rejected_response"),
    Format("conversation in messages", "messages", "chosen", "rejected"),
    Format("Axolotl prompt without rejected", "prompt", "chosen_response", None),
    Format("Axolotl instruction without rejected", "instruction", "chosen_response", None),
    Format("Axolotl input without rejected", "input", "chosen_response", None),
    Format("openhermes", "instruction", "output", None),
    Format("TRL implicit prompt", None, "chosen", "rejected"),
)

TOOL_ROLES = frozenset({"tool", "function", "observation", "function_call", "ipython", "tool_call", "tool_response"})
TOOLS = "tool calls"
"""Cause of the rows in which a tool is called or answers: no template writes those without the tools' definitions."""

OPTIONAL_COLUMNS = frozenset({"system", "input", "history"})

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}

_SPEAKER = re.compile(r"(?:\A\s*|\n\s*\n)(Human|User|Assistant):")
"""What begins a turn of a conversation that is written down as one text, as in hh-rlhf."""


def recognise(columns: Iterable[object]) -> Format | None:
    """The format that these columns make, or None."""
    present = frozenset(columns)
    return next((form for form in FORMATS if form.columns <= present), None)


def read_parts(row: Mapping[str, Any], form: Format) -> tuple[list[Message], str, str | None]:
    """(prompt turns, chosen, rejected) of a row that has the columns of `form`.

    An answer is a text, one message, or a message list whose LAST assistant turn is the answer; the turns
    before it either repeat the prompt or continue it. A text that is a transcript ("Human: ... Assistant: ...") stands
    for its turns, as an answer where there is no prompt or it repeats it. The texts may still be empty, long or equal.
    Raises UnusableRowError.
    """
    if form.prompt is None:
        texts = [row["chosen"], row["rejected"]]
        if all(isinstance(text, str) for text in texts) and not all(_transcript(text) for text in texts):
            return _split_shared_text(row)
    prompt = _prompt_turns(row, form)
    chosen_context, chosen = _answer(row[form.chosen], prompt)
    messages = _join(prompt, chosen_context)
    if form.rejected is None:
        return messages, chosen, None
    rejected_context, rejected = _answer(row[form.rejected], prompt)
    if _join(prompt, rejected_context) != messages:
        raise UnusableRowError("answers to different prompts")
    return messages, chosen, rejected


def _split_shared_text(row: Mapping[str, Any]) -> tuple[list[Message], str, str]:
    """Two texts without a prompt column: the words that both begin with are the prompt, as TRL reads them."""
    if len(row) > 2:  # another column may well be a prompt that we don't know: don't guess one
        raise UnusableRowError("no known prompt column")
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen == rejected:
        raise UnusableRowError("chosen equals rejected")
    position_pairs = enumerate(zip(chosen, rejected, strict=False))
    shared_chars = next((n for n, (a, b) in position_pairs if a != b), min(len(chosen), len(rejected)))
    prompt_chars = max(chosen.rfind(" ", 0, shared_chars), chosen.rfind("\n", 0, shared_chars), 0)
    prompt = Message(role="user", content=chosen[:prompt_chars])
    return [prompt], chosen[prompt_chars:], rejected[prompt_chars:]


def _prompt_turns(row: Mapping[str, Any], form: Format) -> list[Message]:
    turns = [] if form.prompt is None else _turns(row[form.prompt])
    if form.prompt == "instruction":
        details = _text(row.get("input"))
        if details.strip() and turns:
            turns[-1]["content"] += "\n" + details
        turns = _history(row.get("history")) + turns
    system = _text(row.get("system"))
    if system.strip() and (not turns or turns[0]["role"] != "system"):
        turns.insert(0, Message(role="system", content=system))
    return turns


def _history(value: object) -> list[Message]:
    """Earlier rounds of LLaMA-Factory's alpaca format: [[user, assistant], ...]."""
    turns = []
    for pair in _list(value):
        if len(_list(pair)) != 2:
            raise UnusableRowError("wrong type")
        question, answer = pair
        turns.append(Message(role="user", content=_text(question)))
        turns.append(Message(role="assistant", content=_text(answer)))
    return turns


def _answer(value: object, prompt: list[Message]) -> tuple[list[Message], str]:
    """(turns before the answer, answer)."""
    is_text = value is None or isinstance(value, str) or _is_parts(value)
    turns = _transcript(_text(value)) if is_text else _turns([value] if isinstance(value, Mapping) else value)
    places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    before = turns[: places[-1]] if places else []
    if is_text and (not places or (prompt and not _repeats(before, prompt))):
        return [], _text(value)
    if not places:
        raise UnusableRowError("no assistant turn")
    return before, turns[places[-1]]["content"]


def _repeats(context: list[Message], prompt: list[Message]) -> bool:
    return prompt[len(prompt) - len(context) :] == context


def _join(prompt: list[Message], context: list[Message]) -> list[Message]:
    """The prompt of an answer, from the row's prompt and the turns that stand before the answer.

    The context is nothing, a repetition (of the last turns or of the whole conversation), or a continuation.
    """
    if _repeats(context, prompt):
        return prompt
    if not prompt or context[0]["role"] == "assistant":
        return prompt + context
    if prompt[0]["role"] == "system" and context[0]["role"] != "system":
        return prompt[:1] + context
    return context


def _turns(value: object) -> list[Message]:
    if isinstance(value, str) or _is_parts(value):
        text = _text(value)
        turns = _transcript(text)
        if turns and turns[-1] == Message(role="assistant", content=""):
            del turns[-1]
        if turns and turns[-1]["role"] == "user":
            return turns
        return [Message(role="user", content=text)]
    turns = [_message(turn) for turn in _list(value)]
    if turns and turns[0]["role"] == "system" and not turns[0]["content"].strip():
        del turns[0]
    return turns


def _transcript(text: str) -> list[Message]:
    """The turns of a conversation that is written as one text; none where it doesn't begin as one, or has one speaker.

    That is "Human: ..." or "User: ...", then, after an empty line each, "Assistant: ..." and "Human: ..." by turns.
    """
    parts = _SPEAKER.split(text)
    if parts[0] or len(set(parts[1::2])) < 2 or parts[1] == "Assistant":
        return []
    names = zip(parts[1::2], parts[2::2], strict=True)
    return [Message(role=ROLES[name.lower()], content=content.strip()) for name, content in names]


def _message(turn: object) -> Message:
    if not isinstance(turn, Mapping):
        raise UnusableRowError("wrong type")
    role_key, content_key = ("role", "content") if turn.get("role") is not None else ("from", "value")
    name = _text(turn.get(role_key))
    if name in TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
        raise UnusableRowError(TOOLS)
    role = ROLES.get(name)
    if role is None:
        raise UnusableRowError("unknown role")
    return Message(role=role, content=_text(turn.get(content_key)))


def _list(value: object) -> list[Any] | tuple[Any, ...]:
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise UnusableRowError("wrong type")
    return value


def _is_parts(value: object) -> TypeGuard[list[Mapping[str, Any]]]:
    """Whether a text comes in parts, as multimodal templates take it: [{"type": "text", "text": ...}, ...]."""
    if not isinstance(value, list) or not value:
        return False
    return all(
        isinstance(part, Mapping) and "type" in part and part.keys().isdisjoint(("role", "from")) for part in value
    )


def _text(value: object) -> str:
    """A text, or its parts joined. A missing value is empty text: data sets fill absent columns with nulls."""
    if value is None:
        return ""
    if _is_parts(value):
        if any(part["type"] != "text" for part in value):
            raise UnusableRowError("content that is no text")
        return "".join(_text(part.get("text")) for part in value)
    if not isinstance(value, str):
        raise UnusableRowError("wrong type")
    return value


def describe_formats() -> str:
    """The known formats with their columns, as a phrase for an error message."""
    return "; ".join(f"{form.name} ({_column_list(form)})" for form in FORMATS)


def _column_list(form: Format) -> str:
    return ", ".join(column for column in (form.prompt, form.chosen, form.rejected) if column is not None)


def describe_columns(columns: Iterable[object], max_columns: int = 20, max_chars: int = 40) -> str:
    """Untrusted column names, short and safe to print: control characters are escaped."""
    names = [repr(c[:max_chars]) if isinstance(c, str) else f"<{type(c).__name__}>" for c in columns]
    more = f" and {len(names) - max_columns} more" if len(names) > max_columns else ""
    return (", ".join(names[:max_columns]) or "none") + more
