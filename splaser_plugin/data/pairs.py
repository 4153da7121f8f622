"""Preference pairs: a prompt, a chosen answer and, mostly, a rejected one.

`load_pairs` takes a local file or a hub data set, `pairs_from_rows` takes rows in memory. Both recognise the
formats of `data.formats` by their columns, and drop and count the rows that can't be used.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splaser_plugin.config.stages import MeasureConfig
from splaser_plugin.data.formats import (
    TOOLS,
    Message,
    UnusableRowError,
    describe_columns,
    describe_formats,
    read_parts,
    recognise,
)
from splaser_plugin.data.limits import TokenLimits
from splaser_plugin.data.sources import open_source
from splaser_plugin.errors import ConfigError, PairsError

__all__ = ["Message", "Pair", "PairSet", "load_pairs", "pairs_from_rows", "pairs_sha256"]

ROWS = "rows"
"""The source of pairs that come from no file or data set."""
COMPLETE = "Each row needs a prompt that ends with a user turn, a chosen answer and a different rejected one."
WITHOUT_TOOLS = "Turns in which tools are called or answer aren't supported: give pairs without them."
BEYOND = "prompt beyond the model's context"
FITTING = "Give shorter prompts, or a model of a longer context."
MANY = 0.2
"""Share of the rows: when more are dropped, that is said aloud."""


@dataclass(frozen=True)
class Pair:
    messages: tuple[Message, ...]
    """The prompt: a system turn or none, then user and assistant turns by turns; the last is a user's."""
    chosen: str
    rejected: str | None
    """None: data without a rejected answer."""

    @property
    def prompt(self) -> str:
        """Text of the last user turn."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class PairSet:
    pairs: tuple[Pair, ...]
    source: str
    """Path or hub id, for the records."""
    dropped: Mapping[str, int]
    """How many of the rows read were dropped, by cause."""
    rows_read: int
    """Reading stops at the last sample wanted, so a source may have more rows."""

    def __repr__(self) -> str:
        return f"PairSet({self.source!r}, {len(self.pairs)} pairs)"

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    @property
    def summary(self) -> str:
        """One line for people: source, pairs, rows read, and what was dropped."""
        dropped = f"; dropped: {_describe_counts(self.dropped)}" if self.dropped else ""
        return f"{self.source}: {len(self.pairs):,} pairs from {self.rows_read:,} rows{dropped}"

    @property
    def warning(self) -> str:
        """One line for people when more than a fifth of the rows was dropped, with the mend; else empty."""
        if sum(self.dropped.values()) <= MANY * self.rows_read:
            return ""
        return self.losses

    @property
    def losses(self) -> str:
        """How many rows were dropped and why, and what would keep them."""
        lost = f"{sum(self.dropped.values()):,} of {self.rows_read:,} rows were dropped"
        return f"{self.source}: {lost} ({_describe_counts(self.dropped)}). {_mend(self.dropped)}"


PairSource = str | Path | PairSet | Iterable[Mapping[str, Any]]


def read_pairs_from(source: PairSource, config: MeasureConfig, limits: TokenLimits | None) -> PairSet:
    """Pairs in whatever form they come: a source of `load_pairs`, rows of `pairs_from_rows`, or a PairSet as it is.

    limits: how long prompts and answers may be; None takes them at any length.
    """
    if isinstance(source, PairSet):
        return source
    if isinstance(source, (str, Path)):
        return load_pairs(source, samples=config.samples, limits=limits)
    return pairs_from_rows(source, samples=config.samples, limits=limits)


def load_pairs(
    source: str | Path,
    *,
    samples: int | None = None,
    limits: TokenLimits | None = None,
    split: str | None = None,
) -> PairSet:
    """The first `samples` usable pairs of a source, in its own order; None takes them all.

    Everything but a json array is streamed, so memory grows with the pairs kept, not with the source.

    Args:
        source: A .json (array, or object per line), .jsonl, .csv (text columns only) or .parquet file; a folder of data
            files; `orca_dpo`, `ultrafeedback` or `openhermes`; or the id of a data set on the hub.
        samples: How many, at most.
        limits: How long prompts and answers may be; None takes them at any length.
        split: Of a data set; None is "train" ("train_prefs" for ultrafeedback).

    Returns:
        The pairs, and how many rows were dropped for which causes.

    Raises:
        PairsError: The source can't be read, a line is damaged, or no pair is usable.
    """
    try:
        name, rows = open_source(source, split)
        with closing(rows):
            return pairs_from_rows(rows, source=name, samples=samples, limits=limits)
    except OSError as error:
        raise PairsError(f"{source}: can't be read ({error.strerror}). Check the file and its rights.") from error


def pairs_from_rows(
    rows: Iterable[object],
    *,
    source: str = ROWS,
    samples: int | None = None,
    limits: TokenLimits | None = None,
) -> PairSet:
    """The first `samples` usable pairs of rows in any recognised format: dicts, a `datasets.Dataset`.

    limits: how long prompts and answers may be; None takes them at any length. What is dropped is counted under
    "not an object", "unknown columns", "no known prompt column", "wrong type", "unknown role",
    "tool calls" (a turn in which a tool is called or answers), "content that is no text" (an image, say),
    "no assistant turn", "turns out of order", "answers to different prompts", "empty prompt", "empty answer",
    "over-long prompt", "over-long answer", "invalid characters" (lone surrogates, NUL),
    "chosen equals rejected" (spaces around them aside) and "prompt beyond the model's context".
    Raises PairsError when the first object has unknown columns or no pair is usable, ConfigError for a number
    below 1.
    """
    if samples is not None and samples < 1:
        raise ConfigError(f"samples: {samples}, expected 1 or more.")
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    rows_read = 0
    for row in rows:
        rows_read += 1
        try:
            pairs.append(_read_pair(row, limits))
        except UnusableRowError as unusable:
            nothing_recognised = not pairs and dropped.keys() <= {"not an object"}
            if nothing_recognised and isinstance(row, Mapping) and unusable.cause == "unknown columns":
                raise PairsError(_unknown_columns(source, rows_read, row)) from unusable
            dropped[unusable.cause] += 1
        if len(pairs) == samples:
            break
    if not pairs:
        raise PairsError(_no_usable_pair(source, rows_read, dropped, limits))
    return PairSet(tuple(pairs), source, dict(sorted(dropped.items())), rows_read)


def pairs_sha256(pairs: Iterable[Pair]) -> str:
    """Identity of pairs, in hex: the same prompts and answers in the same order give the same, whatever the
    format they came in.
    """
    digest = hashlib.sha256()
    for pair in pairs:
        turns = [[turn["role"], turn["content"]] for turn in pair.messages]
        digest.update(json.dumps([turns, pair.chosen, pair.rejected], ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def _read_pair(row: object, limits: TokenLimits | None) -> Pair:
    if not isinstance(row, Mapping):
        raise UnusableRowError("not an object")
    form = recognise(row)
    if form is None:
        raise UnusableRowError("unknown columns")
    messages, chosen, rejected = read_parts(row, form)
    answers = [chosen] if rejected is None else [chosen, rejected]
    turns = [turn["content"] for turn in messages]
    _check_texts(turns, "prompt")
    _check_texts(answers, "answer")
    _check_order(messages)
    if limits is not None and limits.has_long_prompt(turns):
        raise UnusableRowError("over-long prompt")
    if limits is not None and limits.has_long_answer(answers):
        raise UnusableRowError("over-long answer")
    if rejected is not None and chosen.strip() == rejected.strip():
        raise UnusableRowError("chosen equals rejected")
    if limits is not None and limits.is_beyond_context(messages):
        raise UnusableRowError(BEYOND)
    return Pair(tuple(messages), chosen, rejected)


def _check_texts(texts: list[str], kind: str) -> None:
    """No empty text, and none that a tokenizer refuses (a lone surrogate can't be encoded) or cuts (NUL)."""
    if not texts or not all(text.strip() for text in texts):
        raise UnusableRowError(f"empty {kind}")
    for text in texts:
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:
            raise UnusableRowError("invalid characters") from error
        if b"\0" in encoded:
            raise UnusableRowError("invalid characters")


def _check_order(messages: list[Message]) -> None:
    """System or none, then user, assistant, ..., user: the one order that every chat template takes."""
    roles = [turn["role"] for turn in messages]
    if roles[0] == "system":
        del roles[0]
    if len(roles) % 2 == 0 or any(r != ("user", "assistant")[n % 2] for n, r in enumerate(roles)):
        raise UnusableRowError("turns out of order")


def _unknown_columns(source: str, row_number: int, columns: Iterable[object]) -> str:
    return (
        f"{source}, row {row_number}: columns {describe_columns(columns)} make none of the known formats. "
        f"Rename them to those of one: {describe_formats()}."
    )


def _no_usable_pair(source: str, rows_read: int, dropped: Mapping[str, int], limits: TokenLimits | None) -> str:
    if rows_read == 0:
        return f"{source}: no rows. Give at least one pair."
    next_step = _mend(dropped)
    if limits is not None and any(cause.startswith("over-long") for cause in dropped):
        next_step = (
            f"Raise --max-prompt-tokens (now {limits.prompt}) or --max-answer-tokens "
            f"(now {limits.answer}), or give shorter pairs."
        ) + f" {FITTING}" * (BEYOND in dropped)
    return f"{source}: no usable pair in {rows_read:,} rows: {_describe_counts(dropped)}. {next_step}"


def _mend(dropped: Mapping[str, int]) -> str:
    options = [f"--max-{part}-tokens" for part in ("prompt", "answer") if f"over-long {part}" in dropped]
    steps = [f"Raise {' and '.join(options)}."] if options else []
    steps += [FITTING] if BEYOND in dropped else []
    if steps:
        return " ".join(steps)
    return WITHOUT_TOOLS if TOOLS in dropped else COMPLETE


def _describe_counts(dropped: Mapping[str, int]) -> str:
    by_count = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{cause} {count:,}" for cause, count in by_count)
