"""How a run measured, in words and counts, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from splaser_plugin.artifacts.results import Results, Scored
from splaser_plugin.config.tasks import task_of
from splaser_plugin.progress import duration

MEANINGS = {
    "semantic": "cos(answer, chosen) - cos(answer, rejected) of the model's own greedy answers",
    "margin": "mean log-probability of the chosen answer's tokens minus that of the rejected one's, in nats a token",
    "perplexity": "mean log-probability of a window of text, in nats a token",
}


@dataclass(frozen=True)
class AnswerCounts:
    """The answers of one model to one part of the pairs."""

    whose: str
    answers: int
    cut: int
    empty: int
    half_read: int


def measurement(run: Results, settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the score is and how it was taken: (name, text) of each fact.

    settings: the run's options, as far as they are known; those of another version have its names.
    """
    facts = [("score", _score(run, settings)), (run.unit, _items(run, settings))]
    if run.unit == "pairs" and (limits := _limits(run, settings)):
        facts.append(("limits", limits))
    seen = run.references
    if seen and (seen.half_read or seen.alike):
        facts.append(
            (
                "references",
                f"{seen.half_read:,} of {seen.texts:,} chosen and rejected answers are longer than the embedder reads; "
                f"{seen.alike:,} of {seen.pairs:,} pairs score 0 whatever the model says",
            )
        )
    if run.generated_tokens:
        facts.append(("generated", f"{run.generated_tokens:,} tokens by the search"))
    if run.elapsed_s is not None:
        facts.append(("duration", f"{duration(run.elapsed_s)} from the loaded model to the verdict"))
    return facts


def answer_counts(run: Results) -> list[AnswerCounts]:
    """How many answers each model gave, and how many of them were cut, empty or half read."""
    parts = [("base, searched on", run.baseline), ("result, searched on", run.final)]
    if run.verdict:
        parts += [("base, held out", run.verdict.base), ("result, held out", run.verdict.result)]
    return [_counts(whose, measured) for whose, measured in parts if measured.answers]


def _limits(run: Results, settings: Mapping[str, Any]) -> str:
    """How long texts could be; empty where that isn't known."""
    parts = []
    for unit in ("tokens", "chars"):
        of_prompt, of_answer = (settings.get(f"max_{part}_{unit}") for part in ("prompt", "answer"))
        if isinstance(of_prompt, int) and isinstance(of_answer, int):  # those of another version are unchecked
            name = "characters" if unit == "chars" else unit
            parts.append(f"prompts of up to {of_prompt:,} {name}, answers of up to {of_answer:,}")
    longest = settings.get("max_new_tokens")
    if longest is not None and run.baseline.answers:
        parts.append(f"the model's own answers end after {longest:,} tokens")
    return "; ".join(parts)


def _score(run: Results, settings: Mapping[str, Any]) -> str:
    of_task = "what the task's first metric gives for each document, minus it where less is better"
    meaning = of_task if task_of(run.scorer) else MEANINGS.get(run.scorer, "what this function of the user's own gives")
    text = f"{run.scorer}: {meaning}" if run.scorer else "not named in results.json"
    embedder = settings.get("embedder") if run.scorer == "semantic" else None
    return f"{text}, embedded by {embedder}" if embedder else text


def _items(run: Results, settings: Mapping[str, Any]) -> str:
    held_out = run.verdict.items if run.verdict else 0
    parts = f"{run.searched:,} searched on, {held_out:,} held out"
    if run.unit == "documents":
        return f"of {task_of(run.scorer)}: {parts}"
    if run.unit != "pairs":
        text, window = settings.get("text"), settings.get("window")
        return f"{text}, {window} tokens each: {parts}" if text and window else parts
    dropped = ", ".join(f"{count:,} {cause}" for cause, count in run.pairs.dropped.items() if count)
    return f"{run.pairs.source}: {parts}" + (f"; dropped: {dropped}" if dropped else "")


def _counts(whose: str, measured: Scored) -> AnswerCounts:
    counts = (measured.cut_answers, measured.empty_answers, measured.half_read_answers)
    return AnswerCounts(whose, len(measured.answers), *counts)
