"""Pairs, windows of text or documents of a task in two parts: one to search on, and one held out, never searched on."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from splaser_plugin.data.pairs import Pair, PairSet
from splaser_plugin.errors import PairsError

_Item = TypeVar("_Item")

LEAST = 6
"""The fewest items of a part: fewer can't reach a verdict at a risk of 0.05, even if all of them agree."""


@dataclass(frozen=True)
class Split:
    """Preference pairs in two parts that have no prompt in common, letter case and spaces aside."""

    pairs: PairSet
    """What was read, before a part of it was held out."""
    search: tuple[Pair, ...]
    held_out: tuple[Pair, ...]
    """Empty where there can be no verdict."""
    reason: str
    """Which pairs are held out, or why none are; for people."""
    warning: str = ""
    """What was lost with the rows that were dropped, and what would keep them, when that is much; for people."""


@dataclass(frozen=True)
class WindowSplit:
    """Windows of text in two parts that have none in common."""

    search: tuple[Sequence[int], ...] = ()
    held_out: tuple[Sequence[int], ...] = ()
    """Empty where there can be no verdict."""
    reason: str = ""
    """Which windows are held out, or why none are; for people."""


@dataclass(frozen=True)
class DocumentSplit:
    """Places of a task's documents in two parts that have no question in common."""

    search: tuple[int, ...]
    held_out: tuple[int, ...]
    """Empty where there can be no verdict."""
    reason: str
    """Which documents are held out, or why none are; for people."""


def split_by_prompt(pairs: PairSet, fraction: float, seed: int = 0) -> Split:
    """Hold out that fraction of the pairs: those whose prompts have the lowest seeded hashes.

    A prompt is its last user turn here, and stays whole, so a few pairs more may be held out. The order of the
    pairs doesn't matter. Nothing is held out where either side would have fewer than 6 pairs.
    """
    names = [_prompt(pair) for pair in pairs]
    search, held_out, reason = _parted(pairs.pairs, names, fraction, seed, "pairs", "give --held-out FILE")
    of_all = round(fraction * pairs.rows_read)
    if not held_out and pairs.dropped and min(of_all, pairs.rows_read - of_all) >= LEAST:
        warning = f"too few pairs are left for a verdict. {pairs.losses}"
    else:
        warning = pairs.warning
    return Split(pairs, search, held_out, reason, warning)


def split_windows(windows: Sequence[Sequence[int]], fraction: float, seed: int = 0) -> WindowSplit:
    """Hold out that fraction of the windows: those of lowest seeded hashes; equal ones stay together.

    Nothing is held out where either side would have fewer than 6 windows.
    """
    names = [" ".join(map(str, window)) for window in windows]
    return WindowSplit(*_parted(windows, names, fraction, seed, "windows", "give a longer --text"))


def split_documents(places: Sequence[int], questions: Sequence[str], fraction: float, seed: int = 0) -> DocumentSplit:
    """Hold out that fraction of a task's documents: those whose questions have the lowest seeded hashes.

    Documents of one question, letter case and spaces aside, stay together. Nothing is held out where either side would
    have fewer than 6.
    """
    names = [plain(question) for question in questions]
    return DocumentSplit(*_parted(places, names, fraction, seed, "documents", "take a larger task"))


def split_by_set(pairs: PairSet, held_out: PairSet) -> Split:
    """Search on all pairs, and hold out those of the other set whose prompts aren't among them.

    Raises PairsError when fewer than 6 are left.
    """
    searched = {_prompt(pair) for pair in pairs}
    others = tuple(pair for pair in held_out if _prompt(pair) not in searched)
    left_out = len(held_out) - len(others)
    if len(others) < LEAST:
        raise PairsError(
            f"{held_out.source}: {len(others)} pairs to hold out ({left_out} have a prompt that is searched on), "
            f"expected at least {LEAST}. Give --held-out more pairs, or leave it out to split --pairs."
        )
    dropped = f"; {left_out} left out, whose prompts are searched on" if left_out else ""
    warning = " ".join(filter(None, (pairs.warning, held_out.warning)))
    return Split(pairs, pairs.pairs, others, f"{len(others)} pairs of {held_out.source}{dropped}", warning)


@dataclass(frozen=True)
class Question:
    """What a model is asked."""

    whole: str
    core: str
    """The part of it that no template writes."""

    def shares(self, other: Question) -> bool:
        """Whether either shows the other's core, letter case and spaces aside."""
        return self._words[1] in other._words[0] or other._words[1] in self._words[0]

    @cached_property
    def _words(self) -> tuple[str, str]:
        return _words(self.whole), _words(self.core)


def questions_of(pairs: Sequence[Pair]) -> list[Question]:
    """The prompts of pairs."""
    return [Question(pair.prompt, pair.prompt) for pair in pairs]


def unshared(questions: Sequence[Question], held_out: Sequence[Question]) -> list[int]:
    """Places of the questions that share nothing with any that is held out."""
    return [place for place, question in enumerate(questions) if not any(map(question.shares, held_out))]


def _parted(
    items: Sequence[_Item], names: Sequence[str], fraction: float, seed: int, unit: str, advice: str
) -> tuple[tuple[_Item, ...], tuple[_Item, ...], str]:
    """The items to search on, those held out (of lowest hash by name, equal ones together), and the reason in words."""
    if fraction == 0:
        return tuple(items), (), "none, as asked for: no verdict"
    chosen = _lowest_hashes(Counter(names), round(fraction * len(items)), seed)
    held_out = tuple(item for item, name in zip(items, names, strict=True) if name in chosen)
    search = tuple(item for item, name in zip(items, names, strict=True) if name not in chosen)
    if min(len(held_out), len(search)) < LEAST:
        reason = (
            f"none, so no verdict: {len(items)} {unit} would be split into {len(search)} to search on and "
            f"{len(held_out)} held out, and each part needs {LEAST}. Raise --samples, or {advice}."
        )
        return tuple(items), (), reason
    return search, held_out, f"{len(held_out)} {unit}; {len(search)} to search on"


def _lowest_hashes(counts: Mapping[str, int], wanted: int, seed: int) -> set[str]:
    """The texts of lowest hash that count `wanted` together, or a few more. counts: text to how often it is there."""
    chosen: set[str] = set()
    for text in sorted(counts, key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest()):
        if wanted <= 0:
            break
        chosen.add(text)
        wanted -= counts[text]
    return chosen


def _prompt(pair: Pair) -> str:
    return plain(pair.prompt)


def plain(text: str) -> str:
    """Without letter case, and with single spaces."""
    return " ".join(text.casefold().split())


def _words(text: str) -> str:
    """Words and signs in lower case with a space around each."""
    words = re.findall(r"\w+|[^\w\s]", text.casefold())
    return f" {' '.join(words)} "
