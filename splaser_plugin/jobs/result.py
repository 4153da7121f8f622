"""What a laser run made and found, and the folder it is saved in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from splaser_plugin.artifacts.base_card import base_card
from splaser_plugin.artifacts.card import model_card
from splaser_plugin.artifacts.recipe import Recipe
from splaser_plugin.artifacts.report import write_report
from splaser_plugin.artifacts.results import (
    Asked,
    NoVerdict,
    Results,
    Scored,
    Texts,
    Tried,
    TriedBudget,
    UsedPairs,
    UsedReferences,
    Verdict,
)
from splaser_plugin.config.run_file import run_file
from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.data.pairs import ROWS, Pair, PairSet
from splaser_plugin.data.split import Split
from splaser_plugin.distributed import in_main, meet
from splaser_plugin.files.output import check_output, held, whole_folder
from splaser_plugin.scanning.records import Scan
from splaser_plugin.scoring.scores import Scores
from splaser_plugin.scoring.semantic import References
from splaser_plugin.search.budgets import BudgetTrial
from splaser_plugin.search.search import SearchResult, Trial
from splaser_plugin.search.verdict import HeldOut
from splaser_plugin.weights.factored_folder import parameter_counts, save_model
from splaser_plugin.weights.in_memory import Weights

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from splaser_plugin.search.candidates import Candidate

NO_PAIRS = "none"
"""Source of the pairs where there are none."""
WINDOWS = "windows of --text"
"""What is held out for the verdict beside that of the pairs."""


@dataclass(frozen=True)
class LaserResult:
    """What a laser run made and found."""

    weights: Weights
    tokenizer: PreTrainedTokenizerBase
    scan: Scan
    recipe: Recipe
    search: SearchResult
    split: Split
    held_out: HeldOut | None
    """The verdict; None where no pairs are held out."""
    held_out_text: HeldOut | None = None
    """The verdict of held-out windows of text, where they are judged beside the pairs."""
    references: References | None = None
    """What the embedder sees of the reference answers; None where none are embedded."""
    elapsed_s: float | None = None
    """From the loaded model to the verdict."""
    engine: str | None = None
    """What wrote the answers; None where none were generated."""

    def __repr__(self) -> str:
        score = f"{self.score_before:+.4f} -> {self.score_after:+.4f}"
        kept = f"{len(self.kept)} of {len(self.search.trials)} candidates kept"
        if self.search.budgets:
            kept = f"{self.search.kept_budget or 'no budget'} kept"
        return f"LaserResult({self.recipe.model!r}, {kept}, score {score}, {self.verdict or 'no verdict'})"

    def _repr_html_(self) -> str:
        return self.search._repr_html_()

    def to_dataframe(self) -> DataFrame:
        """The trials of the search, one a row, as a `pandas.DataFrame`."""
        return self.search.to_dataframe()

    @property
    def score_before(self) -> float:
        """Mean score of the model as it came, on the pairs that were searched on."""
        return self.search.baseline.mean

    @property
    def score_after(self) -> float:
        """Mean score of the result, on the same pairs: better than on new ones, since the search chose by it."""
        return self.search.final.mean

    @property
    def kept(self) -> tuple[Candidate, ...]:
        """The candidates that were kept, in order; none where whole models were tried: see `search.kept_budget`."""
        return self.search.kept

    @property
    def is_unchanged(self) -> bool:
        """Whether nothing was kept, so that the model is as it came."""
        return not self.recipe.steps

    @property
    def is_copy(self) -> bool:
        """Whether the model is the one that was named, as it is stored: nothing was kept, merged or converted."""
        rest = self.weights.rest
        is_stored_so = not (self.config.adapter or (rest and rest.quantised) or self.recipe.model.endswith(".gguf"))
        return self.is_unchanged and is_stored_so and self.config.dtype == "auto"

    @property
    def verdict(self) -> str | None:
        """What the held-out pairs say: `better`, `worse` or `no difference ...`; None where none are held out."""
        return self.held_out.verdict if self.held_out else None

    @property
    def config(self) -> LaserConfig:
        """The options of the run."""
        return self.recipe.config

    @property
    def pairs(self) -> PairSet:
        """All pairs that were read, but those of --held-out."""
        return self.split.pairs

    @property
    def model(self) -> PreTrainedModel:
        """The model, lasered in place."""
        return cast("PreTrainedModel", self.weights.model)

    @property
    def parameters(self) -> tuple[int, int]:
        """How many numbers the dense model has, and how many `save` writes."""
        return parameter_counts(self.weights)

    @property
    def record(self) -> Results:
        """What results.json says, and the report and the card are made from."""
        scored = self.split if self.config.unit == "pairs" else replace(self.split, search=(), held_out=())
        return Results(
            model=self.recipe.model,
            pairs=UsedPairs(source=self.pairs.source, used=len(self.pairs.pairs), dropped=dict(self.pairs.dropped)),
            scorer=self.config.scored_by,
            engine=self.engine,
            unit=self.config.unit,
            compared_with="base" if self.config.acceptance == "harmless" else "best",
            baseline=_scores_of(self.search.baseline),
            final=_scores_of(self.search.final),
            generated_tokens=self.search.generated_tokens,
            elapsed_s=None if self.elapsed_s is None else round(self.elapsed_s, 3),
            parameters_removed=self.search.parameters_removed,
            candidates=tuple(map(_tried, self.search.trials)),
            budgets=tuple(map(_tried_budget, self.search.budgets)),
            held_out=_verdict(self.held_out, self.split.reason) or NoVerdict(split=self.split.reason),
            held_out_text=_verdict(self.held_out_text, WINDOWS),
            texts=Texts(search=_asked(scored.search), held_out=_asked(scored.held_out)),
            references=UsedReferences(**asdict(self.references)) if self.references else None,
        )

    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        return self.record.to_dict()

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the model, its tokenizer and card, its scan, recipe, run.yaml and results, and the report, or nothing.

        Under several processes all have to call it, and the main one writes.

        Raises:
            OutputError: The folder exists and isn't empty, or can't be written.
        """
        meet("LaserResult.save()")
        state = self.weights.state_dict()

        def write() -> None:
            path = check_output(out, overwrite=overwrite, inputs=(self.recipe.model,))
            with held(path):
                self._write(path, state, with_model=True)

        in_main(write)
        return Path(out).expanduser().resolve()

    def save_held(self, path: Path, *, with_model: bool) -> None:
        """The same as `save`, to a folder that this run has checked and holds.

        with_model: whether the model, its tokenizer and its card are written, too.
        """
        state = self.weights.state_dict() if with_model else None
        in_main(lambda: self._write(path, state, with_model=with_model))

    def _write(self, path: Path, state: Mapping[str, Tensor] | None, *, with_model: bool) -> None:
        record = self.record
        with whole_folder(path, needed=self.weights.size if with_model else 0) as folder:
            if with_model:
                save_model(self.weights, folder, state)
                self.tokenizer.save_pretrained(folder)
                base = base_card(self.recipe.model, self.weights.model.config)
                model_card(self.recipe, record, base).save(folder / "README.md")
                if self.weights.rest is not None:
                    self.weights.rest.write(folder)
            self.scan.save(folder / "scan.json")
            self.recipe.save(folder / "recipe.json")
            (folder / "run.yaml").write_text(self._run_file(), encoding="utf-8")
            record.save(folder / "results.json")
            write_report(folder / "report.html", self.scan, record, settings=self.config.to_dict(), output=path)

    def _run_file(self) -> str:
        source = "" if self.pairs.source in (ROWS, NO_PAIRS) else self.pairs.source
        return run_file({"model": self.recipe.model, "pairs": source}, self.config.to_dict())


def _scores_of(scores: Scores) -> Scored:
    return Scored(
        score=scores.mean,
        per_pair=scores.values,
        answers=tuple(answer.text for answer in scores.answers),
        empty_answers=scores.empty_answers,
        cut_answers=scores.cut_answers,
        half_read_answers=scores.half_read_answers,
        generated_tokens=scores.generated_tokens,
    )


def _asked(pairs: Iterable[Pair]) -> tuple[Asked, ...]:
    return tuple(Asked(prompt=pair.prompt, chosen=pair.chosen, rejected=pair.rejected) for pair in pairs)


def _verdict(held_out: HeldOut | None, split: str) -> Verdict | None:
    if held_out is None:
        return None
    return Verdict(
        pairs=len(held_out.base.items),
        split=split,
        verdict=held_out.verdict,
        loss_verdict=held_out.loss_verdict or None,
        difference=held_out.difference,
        interval=held_out.interval,
        trimmed=held_out.trimmed,
        better=held_out.better,
        worse=held_out.worse,
        equal=held_out.equal,
        base=_scores_of(held_out.base),
        result=_scores_of(held_out.result),
    )


def _tried(trial: Trial) -> Tried:
    candidate, judgement = trial.candidate, trial.judgement
    scores = judgement.scores
    return Tried(
        name=candidate.matrix.name,
        rank=candidate.rank,
        full_rank=min(candidate.matrix.shape),
        edge=candidate.edge,
        snr=candidate.snr,
        predicted=candidate.predicted,
        parameters_removed=candidate.parameters_removed,
        outcome=judgement.outcome,
        score=scores.mean if scores else None,
        best_before=judgement.best_before,
        guard=judgement.guard or None,
        guard_loss=judgement.guard_loss,
        reason=judgement.reason,
        pairs_scored=scores.items if scores else (),
        per_pair=scores.values if scores else (),
        generated_tokens=scores.generated_tokens if scores else 0,
        elapsed_s=round(trial.elapsed_s, 3),
    )


def _tried_budget(trial: BudgetTrial) -> TriedBudget:
    budget, judgement, text = trial.budget, trial.judgement, trial.text
    scores = judgement.scores
    return TriedBudget(
        share=budget.share,
        matrices=len(budget.ranks),
        parameters_removed=budget.parameters_removed,
        predicted_cost=budget.predicted_cost,
        outcome=trial.outcome,
        score=scores.mean if scores else None,
        base_score=judgement.best_before,
        text_score=text.scores.mean if text and text.scores else None,
        text_base_score=text.best_before if text else None,
        guard=judgement.guard or None,
        guard_loss=judgement.guard_loss,
        reason=(text.reason if text else None) or judgement.reason,
        items=len(scores.items) if scores else 0,
        elapsed_s=round(trial.elapsed_s, 3),
    )
