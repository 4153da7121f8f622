"""The results of a laser run: what results.json says, candidate by candidate and prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from splaser_plugin.artifacts.rank_source import OptionalRankSource
from splaser_plugin.errors import RecipeError
from splaser_plugin.files.json import read_json, write_json
from splaser_plugin.files.validation import InvalidRecordError, Number, Whole, plain, validated
from splaser_plugin.statistics import RISK, paired_bootstrap

SCHEMA = "splaser.results/1"
MAX_BYTES = 2_000_000_000
RESAMPLES = 2_000
"""For the interval of each candidate: enough to draw it, and quick where there are hundreds."""
Interval = tuple[Number, Number]
StoredOutcome = Annotated[str, Field(alias="verdict")]
"""What became of a candidate or a budget, as `Judgement.outcome` says it; its key in the file is `verdict`."""


@dataclass(frozen=True, kw_only=True)
class UsedPairs:
    """The pairs that a run had."""

    source: str
    used: Whole
    dropped: Mapping[str, Whole]
    """Cause to count."""


@dataclass(frozen=True, kw_only=True)
class UsedReferences:
    """What the embedder sees of the chosen and rejected answers, held-out ones among them."""

    texts: Whole
    half_read: Whole
    """How many are longer than what it reads."""
    pairs: Whole
    alike: Whole
    """Pairs that score 0 whatever the model says: their two answers have the same vector."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One pair, as far as a reader needs it."""

    prompt: str
    """The last user turn."""
    chosen: str
    rejected: str | None


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What was asked, in the order of `per_pair` and `answers`."""

    search: tuple[Asked, ...] = ()
    held_out: tuple[Asked, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A model's scores of all items."""

    score: Number
    """Their mean."""
    per_pair: tuple[Number, ...]
    answers: tuple[str, ...]
    """Empty where nothing was generated."""
    empty_answers: Whole = 0
    cut_answers: Whole = 0
    half_read_answers: Whole = 0
    """Longer than what the embedder reads."""
    generated_tokens: Whole = 0


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One candidate of the search."""

    name: str
    rank: Whole
    full_rank: Whole
    edge: OptionalRankSource = None
    """Where the rank comes from; None in files that don't say."""
    snr: Number | None = None
    predicted: Number | None = None
    parameters_removed: Whole = 0
    outcome: StoredOutcome
    score: Number | None = None
    best_before: Number | None = None
    guard: str | None = None
    """Name of the guard that `guard_loss` is of; None where none was asked, and in files that don't say."""
    guard_loss: Number | None = None
    reason: str | None = None
    pairs_scored: tuple[Whole, ...]
    """Places of the items it was scored on; none: it can't be scored."""
    per_pair: tuple[Number, ...]
    generated_tokens: Whole = 0
    elapsed_s: Number = 0.0


@dataclass(frozen=True, kw_only=True)
class TriedBudget:
    """One budget of the search: the whole model with that share of its parameters removed."""

    share: Number
    matrices: Whole
    """How many it reduced."""
    parameters_removed: Whole
    predicted_cost: Number | None = None
    """In nats a token."""
    outcome: StoredOutcome
    score: Number | None = None
    base_score: Number | None = None
    """Of the base, on the same items."""
    text_score: Number | None = None
    """Mean log-probability of the text, in nats a token; None where it wasn't asked."""
    text_base_score: Number | None = None
    guard: str | None = None
    """Name of the guard that `guard_loss` is of; None where none was asked, and in files that don't say."""
    guard_loss: Number | None = None
    reason: str | None = None
    items: Whole = 0
    """How many it was scored on."""
    elapsed_s: Number = 0.0

    @property
    def change(self) -> float | None:
        """Of the score, against the base."""
        return None if self.score is None or self.base_score is None else self.score - self.base_score

    @property
    def text_change(self) -> float | None:
        """Of the text's log-probability, against the base."""
        if self.text_score is None or self.text_base_score is None:
            return None
        return self.text_score - self.text_base_score


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The comparison on the held-out items."""

    pairs: Whole
    split: str
    """Which items are held out."""
    verdict: str
    loss_verdict: str | None = None
    """Whether a loss of the tolerance can be ruled out; None where there is no tolerance."""
    difference: Number
    interval: Interval
    trimmed: Number | None = None
    """Mean without the lowest and the highest tenth of the differences; None in files that don't say."""
    better: Whole
    worse: Whole
    equal: Whole
    base: Scored
    result: Scored

    @property
    def items(self) -> int:
        return self.better + self.worse + self.equal

    @cached_property
    def differences(self) -> tuple[float, ...]:
        """Result minus base, of each item."""
        pairs = zip(self.base.per_pair, self.result.per_pair, strict=True)
        return tuple(after - before for before, after in pairs)


@dataclass(frozen=True, kw_only=True)
class NoVerdict:
    """Nothing was held out."""

    pairs: Whole = 0
    split: str
    """Why not."""
    verdict: None = None


def _held_out_kind(stored: Any) -> str:
    verdict = stored.get("verdict") if isinstance(stored, Mapping) else getattr(stored, "verdict", None)
    return "none" if verdict is None else "some"


@dataclass(frozen=True)
class Compared:
    """A candidate beside the model that it was compared with."""

    tried: Tried
    score: float | None
    """Mean over the items it was scored on; None: it can't be scored."""
    change: float | None
    """That mean minus that of the model it was compared with, on the same items."""
    interval: tuple[float, float] | None
    """95 % interval of `change` by paired bootstrap, for this candidate alone; None for fewer than 2 items."""
    explanation: str
    """Why it ended as it did, for people."""

    @property
    def score_before(self) -> float | None:
        """Mean of the model that it was compared with, over the same items."""
        return None if self.score is None or self.change is None else self.score - self.change


@dataclass(frozen=True)
class Exchange:
    """One prompt with the answers of the base model and the result."""

    asked: Asked
    before: str
    after: str
    change: float
    """Score after minus before."""
    is_held_out: bool

    @property
    def is_changed(self) -> bool:
        return self.before != self.after

    @property
    def shared(self) -> int:
        """How many characters the two answers have in common at their beginning, in whole words."""
        length = 0
        for first, second in zip(_words(self.before), _words(self.after), strict=False):
            if first != second:
                break
            length += len(first)
        return length


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything of results.json."""

    model: str = ""
    pairs: UsedPairs
    scorer: str = ""
    engine: str | None = None
    """What wrote the answers; None where none were generated, and in files that don't say."""
    unit: str = "pairs"
    """What a score is of: `pairs`, `windows` of text, or `documents` of a task."""
    compared_with: Literal["best", "base"] = "best"
    """What each candidate had to beat or to equal: the best model so far, or the base."""
    baseline: Scored
    final: Scored
    generated_tokens: Whole = 0
    elapsed_s: Number | None = None
    """From the loaded model to the verdict, in this process; None in files that don't say."""
    parameters_removed: Whole = 0
    """How many parameters fewer the kept matrices have, stored as factors."""
    candidates: tuple[Tried, ...]
    budgets: tuple[TriedBudget, ...] = ()
    """Instead of candidates, where whole models were tried."""
    held_out: Annotated[
        Annotated[Verdict, Tag("some")] | Annotated[NoVerdict, Tag("none")], Discriminator(_held_out_kind)
    ]
    held_out_text: Verdict | None = None
    """Of held-out windows of text, beside that of the pairs."""
    texts: Texts = Texts()
    references: UsedReferences | None = None
    """None where no answers are embedded."""

    @property
    def searched(self) -> int:
        """How many items the search scored on."""
        return len(self.baseline.per_pair)

    @property
    def verdict(self) -> Verdict | None:
        """What the held-out items say; None where there are none."""
        return self.held_out if isinstance(self.held_out, Verdict) else None

    @cached_property
    def compared(self) -> tuple[Compared, ...]:
        """The candidates, each beside what it was compared with."""
        best: Sequence[float] = self.baseline.per_pair
        found = []
        for tried in self.candidates:
            values = tried.per_pair
            differences = [value - best[place] for place, value in zip(tried.pairs_scored, values, strict=True)]
            score, change = _mean(values), _mean(differences)
            found.append(Compared(tried, score, change, _interval(differences), self._explanation(tried)))
            if tried.outcome == "kept" and self.compared_with == "best":
                best = values
        return tuple(found)

    @property
    def kept_budget(self) -> TriedBudget | None:
        """The budget that was kept; None for none."""
        return next((budget for budget in reversed(self.budgets) if budget.outcome == "kept"), None)

    @property
    def kept(self) -> tuple[Compared, ...]:
        return tuple(found for found in self.compared if found.tried.outcome == "kept")

    @cached_property
    def answered(self) -> tuple[Exchange, ...]:
        """All prompts with their answers; none where nothing was generated, or where no prompts were recorded."""
        searched = _exchanges(self.texts.search, self.baseline, self.final, is_held_out=False)
        if self.verdict is None:
            return searched
        return searched + _exchanges(self.texts.held_out, self.verdict.base, self.verdict.result, is_held_out=True)

    def exchanges(self, *, is_held_out: bool) -> tuple[Exchange, ...]:
        """The answers to held-out prompts or to those that were searched on, the most changed score first."""
        part = [answer for answer in self.answered if answer.is_held_out == is_held_out]
        return tuple(sorted(part, key=lambda pair: (-abs(pair.change), not pair.is_changed, pair.asked.prompt)))

    def to_dict(self) -> dict[str, Any]:
        """The content of results.json."""
        return {"schema": SCHEMA, **plain(self)}

    def save(self, path: str | Path) -> None:
        """Write results.json, whole or not at all. Raises OutputError when it can't be written."""
        write_json(path, self.to_dict())

    @classmethod
    def from_dict(cls, stored: Any, source: str = "results") -> Results:
        """Raises RecipeError when `stored` is not the whole content of a results.json."""
        if not isinstance(stored, Mapping) or stored.get("schema") != SCHEMA:
            got = stored.get("schema") if isinstance(stored, Mapping) else type(stored).__name__
            raise RecipeError(f"{source}: schema is {got!r:.80}, expected '{SCHEMA}'. Make it anew with splaser laser.")
        try:
            results = validated(cls, stored)
            results._check()
        except (InvalidRecordError, ValueError, IndexError, OverflowError) as error:
            raise RecipeError(f"{source}: not whole ({str(error)[:200]}). Make it anew with splaser laser.") from error
        return results

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a results.json. Raises RecipeError when it is missing, damaged or of another version."""
        return cls.from_dict(read_json(path, RecipeError, max_bytes=MAX_BYTES), str(path))

    def _check(self) -> None:
        """Raises ValueError or IndexError where parts of different lengths don't fit together."""
        changes = chain(
            (found.change for found in self.compared if found.change is not None),
            chain.from_iterable(found.interval for found in self.compared if found.interval is not None),
            (answer.change for answer in self.answered),
            self.verdict.differences if self.verdict else (),
        )
        if not all(map(math.isfinite, changes)):
            raise ValueError("a difference of scores is too large for a number")

    def _explanation(self, tried: Tried) -> str:
        items = f"{len(tried.per_pair)} {self.unit}"
        kept = (
            "better than the best before it"
            if self.compared_with == "best"
            else "by its test not worse than the base by the tolerance"
        )
        guarded = f"of {tried.guard} " if tried.guard else ""
        guarded += (
            f"measured {tried.guard_loss:.4f}, over its limit"
            if tried.guard_loss is not None
            else f"says that {tried.reason}"
        )
        return {
            "kept": f"{kept}, on all {items}",
            "restored": f"scored on all {items} and not accepted by the rule of this run; put back bit for bit",
            "stopped": f"after {items} a bound said that it can't be accepted any more; put back bit for bit",
            "guarded": f"accepted on all {items}, but the guard {guarded}; put back",
            "failed": f"it can't be scored: {tried.reason}; put back bit for bit",
        }.get(tried.outcome, "")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _interval(differences: Sequence[float]) -> tuple[float, float] | None:
    if len(differences) < 2:
        return None
    return paired_bootstrap(differences, risk=RISK, seed=0, resamples=RESAMPLES)


def _exchanges(asked: Sequence[Asked], before: Scored, after: Scored, *, is_held_out: bool) -> tuple[Exchange, ...]:
    if not asked or not before.answers or not after.answers:
        return ()
    scored = zip(asked, before.answers, after.answers, before.per_pair, after.per_pair, strict=True)
    return tuple(Exchange(pair, first, second, new - old, is_held_out) for pair, first, second, old, new in scored)


def _words(answer: str) -> list[str]:
    """Words with the spaces after them, so that they add up to the answer."""
    words = answer.split(" ")
    return [word + " " for word in words[:-1]] + words[-1:]
