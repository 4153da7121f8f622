"""A laser run as its report tells it: what results.json says, candidate by candidate and prompt by prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splaser_plugin.errors import RecipeError
from splaser_plugin.files.typed import check_types
from splaser_plugin.scanning.records import read_json
from splaser_plugin.statistics import paired_bootstrap

RESULTS_SCHEMA = "splaser.results/1"
RISK = 0.05
RESAMPLES = 2_000
"""For the interval of each candidate: enough to draw it, and quick where there are hundreds."""
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
    """Mean over the items it was scored on; None: it can't be scored."""
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
        run = _run(stored)
        check_types(run)
        return run
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise RecipeError(f"{source}: not whole ({repr(error)[:200]}). Make it anew with splaser laser.") from error


def _run(stored: Mapping[str, Any]) -> Run:
    baseline, final = _measured(stored["baseline"]), _measured(stored["final"])
    apart = stored["held_out"]
    before, after = (_measured(apart[key]) if apart["verdict"] is not None else None for key in ("base", "result"))
    asked = {part: [_pair(each) for each in pairs] for part, pairs in stored.get("texts", {}).items()}
    exchanges = _exchanges(asked.get("search", []), baseline, final, is_held_out=False)
    if before and after:
        exchanges += _exchanges(asked.get("held_out", []), before, after, is_held_out=True)
    changed = [each for each in exchanges if each.before != each.after]
    return Run(
        source=stored["pairs"]["source"],
        unit=stored.get("unit", "pairs"),
        searched=len(baseline.values),
        compared_with=stored.get("compared_with", "best"),
        parameters_removed=stored.get("parameters_removed", 0),
        baseline=baseline.score,
        final=final.score,
        attempts=tuple(_attempts(stored, baseline)),
        verdict=_verdict(apart, before, after, asked.get("held_out", [])) if before and after else None,
        split=apart["split"],
        exchanges=tuple(sorted(changed, key=lambda each: (-abs(each.change), each.prompt))),
        answers=len(exchanges),
    )


@dataclass(frozen=True)
class _Measured:
    """A model's scores of all items."""

    score: float
    values: tuple[float, ...]
    answers: tuple[str, ...]
    """Empty where nothing was generated."""


def _measured(stored: Mapping[str, Any]) -> _Measured:
    measured = _Measured(stored["score"], tuple(stored["per_pair"]), tuple(stored["answers"]))
    check_types(measured)
    return measured


def _pair(stored: Mapping[str, Any]) -> tuple[str, str, str | None]:
    return stored["prompt"], stored["chosen"], stored["rejected"]


def _attempts(stored: Mapping[str, Any], baseline: _Measured) -> Iterator[Attempt]:
    with_best = stored.get("compared_with", "best") == "best"
    best: Sequence[float] = baseline.values
    for each in stored["candidates"]:
        values: list[float] = each["per_pair"]
        differences = [value - best[place] for place, value in zip(each["pairs_scored"], values, strict=True)]
        yield Attempt(
            name=each["name"],
            rank=each["rank"],
            full_rank=each["full_rank"],
            verdict=each["verdict"],
            score=sum(values) / len(values) if values else None,
            change=sum(differences) / len(differences) if differences else None,
            interval=_interval(differences),
            reason=_reason(each, f"{len(values)} {stored.get('unit', 'pairs')}", with_best),
        )
        if each["verdict"] == "kept" and with_best:
            best = values


def _interval(differences: Sequence[float]) -> Interval | None:
    if len(differences) < 2:
        return None
    return paired_bootstrap(differences, risk=RISK, seed=0, resamples=RESAMPLES)


def _reason(candidate: Mapping[str, Any], items: str, with_best: bool) -> str:
    """items: how many it was scored on, and of what."""
    kept = "better than the best before it" if with_best else "by its test not worse than the base by the tolerance"
    guard_loss = candidate.get("guard_loss")
    guarded = (
        f"measured {guard_loss:.4f}, over its limit"
        if guard_loss is not None
        else f"says that {candidate.get('reason')}"
    )
    return {
        "kept": f"{kept}, on all {items}",
        "restored": f"scored on all {items} and not accepted by the rule of this run; put back bit for bit",
        "stopped": f"after {items} a bound said that it can't be accepted any more; put back bit for bit",
        "guarded": f"accepted on all {items}, but the guard {guarded}; put back",
        "failed": f"it can't be scored: {candidate.get('reason')}; put back bit for bit",
    }.get(candidate["verdict"], "")


def _exchanges(
    asked: Sequence[tuple[str, str, str | None]], before: _Measured, after: _Measured, *, is_held_out: bool
) -> list[Exchange]:
    """None where nothing was generated, or where the prompts were not recorded."""
    if not asked or not before.answers or not after.answers:
        return []
    return [
        Exchange(*pair, first, second, new - old, is_held_out)
        for pair, first, second, old, new in zip(
            asked, before.answers, after.answers, before.values, after.values, strict=True
        )
    ]


def _verdict(
    stored: Mapping[str, Any], base: _Measured, result: _Measured, asked: Sequence[tuple[str, str, str | None]]
) -> Verdict:
    low, high = stored["interval"]
    differences = (after - before for before, after in zip(base.values, result.values, strict=True))
    return Verdict(
        verdict=stored["verdict"],
        loss_verdict=stored.get("loss_verdict") or "",
        base=base.score,
        result=result.score,
        difference=stored["difference"],
        interval=(low, high),
        better=stored["better"],
        worse=stored["worse"],
        equal=stored["equal"],
        differences=tuple(differences),
        prompts=tuple(prompt for prompt, _, _ in asked),
    )


def _words(answer: str) -> list[str]:
    """Words with the spaces after them, so that they add up to the answer."""
    words = answer.split(" ")
    return [word + " " for word in words[:-1]] + words[-1:]
