"""A laser run as its report tells it: what results.json says, candidate by candidate and prompt by prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splaser_plugin.errors import RecipeError
from splaser_plugin.scan_records import read_json
from splaser_plugin.statistics import paired_bootstrap

RESULTS_SCHEMA = "splaser.results/1"
RISK = 0.05
SHOWN = 12
"""Most prompts of a report whose answers stand side by side."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Attempt:
    """One candidate of the search."""

    name: str
    rank: int
    full_rank: int
    verdict: str
    score: float | None
    """Mean over the items it was scored on; None: it was screened out."""
    change: float | None
    """That mean minus that of the model it was compared with, on the same items."""
    interval: Interval | None
    """95 % interval of `change` by paired bootstrap, for this candidate alone; None for fewer than 2 items."""
    reason: str
    """Why it ended as it did, for people."""


@dataclass(frozen=True)
class Exchange:
    """One prompt with the answers of the base model and the result."""

    prompt: str
    chosen: str
    rejected: str | None
    before: str
    after: str
    change: float
    """Score after minus before."""
    is_held_out: bool

    @property
    def shared(self) -> int:
        """How many characters the two answers have in common at their beginning, in whole words."""
        length = 0
        for first, second in zip(_words(self.before), _words(self.after), strict=False):
            if first != second:
                break
            length += len(first)
        return length


@dataclass(frozen=True)
class Verdict:
    """The comparison on the held-out items."""

    verdict: str
    loss_verdict: str
    """Whether a loss of the tolerance can be ruled out; empty where there is no tolerance."""
    base: float
    """Mean score of the base model."""
    result: float
    difference: float
    interval: Interval
    better: int
    worse: int
    equal: int
    differences: tuple[float, ...]
    """Of each item."""
    prompts: tuple[str, ...]
    """Of each pair; none for windows, or if they were not recorded."""

    @property
    def items(self) -> int:
        return self.better + self.worse + self.equal


@dataclass(frozen=True)
class Run:
    """Everything of results.json that the report shows."""

    source: str
    """Where the pairs come from."""
    unit: str
    """What a score is of: `pairs`, or `windows` of text."""
    searched: int
    """How many of them the search scored on."""
    compared_with: str
    """What each candidate had to beat or to equal: the `best` model so far, or the `base`."""
    parameters_removed: int
    """How many parameters fewer the kept matrices have, stored as factors."""
    baseline: float
    final: float
    attempts: tuple[Attempt, ...]
    verdict: Verdict | None
    split: str
    """Which items are held out, or why none are."""
    exchanges: tuple[Exchange, ...]
    """Those whose answers changed, most changed first."""
    answers: int
    """How many prompts there were before and after, changed or not."""

    @property
    def kept(self) -> tuple[Attempt, ...]:
        return tuple(attempt for attempt in self.attempts if attempt.verdict == "kept")


def load_results(path: Path) -> Run:
    """Read a results.json. Raises RecipeError when it is missing, damaged or of another version."""
    return run_from_results(read_json(path), str(path))


def run_from_results(stored: Any, source: str = "results") -> Run:
    """Raises RecipeError when `stored` is not the whole content of a results.json."""
    if not isinstance(stored, Mapping) or stored.get("schema") != RESULTS_SCHEMA:
        got = stored.get("schema") if isinstance(stored, Mapping) else type(stored).__name__
        raise RecipeError(f"{source}: schema is {got!r}, expected '{RESULTS_SCHEMA}'. Make it anew with splaser laser.")
    try:
        return _run(stored)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise RecipeError(f"{source}: not whole ({error!r}). Make it anew with splaser laser.") from error


def _run(stored: Mapping[str, Any]) -> Run:
    texts = stored.get("texts") or {"search": [], "held_out": []}
    baseline, final, held_out = stored["baseline"], stored["final"], stored["held_out"]
    exchanges = _exchanges(texts["search"], baseline, final, is_held_out=False)
    if held_out["verdict"] is not None:
        exchanges += _exchanges(texts["held_out"], held_out["base"], held_out["result"], is_held_out=True)
    changed = [each for each in exchanges if each.before != each.after]
    return Run(
        source=stored["pairs"]["source"],
        unit=stored.get("unit", "pairs"),
        searched=len(baseline["per_pair"]),
        compared_with=stored.get("compared_with", "best"),
        parameters_removed=stored.get("parameters_removed", 0),
        baseline=baseline["score"],
        final=final["score"],
        attempts=tuple(_attempts(stored)),
        verdict=_verdict(held_out, texts["held_out"]),
        split=held_out["split"],
        exchanges=tuple(sorted(changed, key=lambda each: (-abs(each.change), each.prompt))),
        answers=len(exchanges),
    )


def _attempts(stored: Mapping[str, Any]) -> Iterator[Attempt]:
    unit, with_best = stored.get("unit", "pairs"), stored.get("compared_with", "best") == "best"
    best: list[float] = stored["baseline"]["per_pair"]
    for each in stored["candidates"]:
        values: list[float] = each["per_pair"]
        differences = [value - best[place] for place, value in zip(each["pairs_scored"], values, strict=True)]
        yield Attempt(
            name=each["name"],
            rank=each["rank"],
            full_rank=each["full_rank"],
            verdict=each["verdict"],
            score=each["score"],
            change=sum(differences) / len(differences) if differences else None,
            interval=paired_bootstrap(differences, risk=RISK, seed=0) if len(differences) > 1 else None,
            reason=_reason(each, f"{len(values)} {unit}", with_best),
        )
        if each["verdict"] == "kept" and with_best:
            best = values


def _reason(candidate: Mapping[str, Any], items: str, with_best: bool) -> str:
    """items: how many it was scored on, and of what."""
    kept = "better than the best before it" if with_best else "surely not worse than the base by the tolerance"
    return {
        "kept": f"{kept}, on all {items}",
        "restored": f"scored on all {items} and not accepted by the rule of this run; put back bit for bit",
        "stopped": f"after {items} a bound said that it can't be accepted any more; put back bit for bit",
        "screened": f"the screen's score fell by {-(candidate.get('screen_change') or 0):.4f}, so it was not scored",
        "guarded": f"accepted on all {items}, but the guard measured {candidate.get('guard_loss') or 0:.4f}, over its "
        "limit; put back bit for bit",
    }.get(candidate["verdict"], "")


def _exchanges(
    texts: Sequence[Mapping[str, Any]], before: Mapping[str, Any], after: Mapping[str, Any], *, is_held_out: bool
) -> list[Exchange]:
    """None where nothing was generated, or where the prompts were not recorded."""
    if not texts or not before["answers"] or not after["answers"]:
        return []
    return [
        Exchange(text["prompt"], text["chosen"], text["rejected"], first, second, new - old, is_held_out)
        for text, first, second, old, new in zip(
            texts, before["answers"], after["answers"], before["per_pair"], after["per_pair"], strict=True
        )
    ]


def _verdict(held_out: Mapping[str, Any], texts: Sequence[Mapping[str, Any]]) -> Verdict | None:
    if held_out["verdict"] is None:
        return None
    low, high = held_out["interval"]
    pairs = zip(held_out["base"]["per_pair"], held_out["result"]["per_pair"], strict=True)
    return Verdict(
        verdict=held_out["verdict"],
        loss_verdict=held_out.get("loss_verdict") or "",
        base=held_out["base"]["score"],
        result=held_out["result"]["score"],
        difference=held_out["difference"],
        interval=(low, high),
        better=held_out["better"],
        worse=held_out["worse"],
        equal=held_out["equal"],
        differences=tuple(result - base for base, result in pairs),
        prompts=tuple(text["prompt"] for text in texts),
    )


def _words(text: str) -> list[str]:
    """Words with the spaces after them, so that they add up to the text."""
    words = text.split(" ")
    return [word + " " for word in words[:-1]] + words[-1:]
