"""The model card: README.md of a lasered model, as the hub shows it. It names nothing of the machine it was made on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from splaser_plugin.artifacts.recipe import Recipe
from splaser_plugin.artifacts.results import Results, Verdict
from splaser_plugin.files.sources import is_hub_id
from splaser_plugin.files.text import printable

TAGS = ["splaser", "laser", "low-rank"]
LASER_PAPER = "https://arxiv.org/abs/2312.13558"


def model_card(recipe: Recipe, run: Results | None = None) -> ModelCard:
    """The card of the model that a recipe makes.

    run: of the search that found it; without it, as for a rebuilt model, the card has no verdict.
    """
    base = public_name(recipe.model)
    data = ModelCardData(
        base_model=base if _is_on_hub(recipe.model) and _is_repo_id(base) else None,
        datasets=[run.pairs.source] if run and _is_on_hub(run.pairs.source) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
    )
    sections = [
        f"# {code(PurePath(base).name)}, lasered",
        _what_was_done(recipe, run, base),
        "## Recipe",
        _recipe_table(recipe),
        "## Scores",
        _scores(recipe, run),
        "## Rebuild it",
        _rebuild(recipe, base),
        "## Made with",
        ", ".join(f"{code(name)} {code(version)}" for name, version in recipe.versions.items()) + ".",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def public_name(name: str) -> str:
    """A hub id as it is, and of a path only its last part: what is above it is nobody else's business."""
    if _is_on_hub(name):
        return name
    return PurePath(name.replace("\\", "/")).name


def code(text: str) -> str:
    """Untrusted text as a code span, in which Markdown and HTML mean nothing; also inside a table."""
    text = printable(text).replace("|", "\\|") or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _is_on_hub(name: str) -> bool:
    return "/" in name and is_hub_id(name)


def _is_repo_id(name: str) -> bool:
    """Whether the hub takes it as a base model: it refuses a card with anything else."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _what_was_done(recipe: Recipe, run: Results | None, base: str) -> str:
    count = len(recipe.steps)
    lines = [
        f"{code(base)} with {count} of its weight matrices replaced by low-rank versions of themselves "
        f"([LASER]({LASER_PAPER})) by splaser."
        if count
        else f"{code(base)}, unchanged: splaser found no weight matrix whose reduction made its answers better."
    ]
    if not _is_on_hub(recipe.model):
        lines.append("That is the last part of its name where it was made: a folder, a file or a model in memory.")
    if run and run.budgets:
        lines.append(
            f"{len(run.budgets)} budgets were tried from gentle to hard, each with the ranks of least predicted cost "
            f"for the whole model, up to the first that didn't pass: the model {_rule(run)} on {_material(run)}."
        )
    elif run:
        lines.append(
            f"{len(run.candidates)} candidates were tried one after the other, and a change was kept only where the "
            f"model {_rule(run)} on {_material(run)}; everything else was put back bit for bit."
        )
    lines.append(_how_stored(recipe))
    return "\n".join(lines)


def _rule(run: Results) -> str:
    return "scored better" if run.compared_with == "best" else "surely scored no worse than the base by the tolerance"


def _material(run: Results) -> str:
    if run.unit != "pairs":
        return f"{run.searched} {run.unit} of text"
    return f"{run.searched} preference pairs of {code(public_name(run.pairs.source))}"


def _how_stored(recipe: Recipe) -> str:
    if recipe.config.save != "factored":
        return "A reduced matrix has a lower rank and its old shape: the model is as large as before."
    return (
        "Reduced matrices are stored as factors, so splaser is needed to load the model: "
        "`splaser_plugin.load(FOLDER)`, or `import splaser_plugin` and then transformers' `from_pretrained`. "
        "`splaser expand FOLDER -o DENSE` makes a plain folder of it."
    )


def _recipe_table(recipe: Recipe) -> str:
    if not recipe.steps:
        return "Nothing was kept."
    rows = ["| matrix | shape | rank | edge or share kept | threshold |", "| --- | --- | --- | --- | --- |"]
    for step in recipe.steps:
        shape = " x ".join(map(str, step.shape))
        threshold = "" if step.threshold is None else f"{step.threshold:.4g}"
        rows.append(f"| {code(step.name)} | {shape} | {step.rank} | {code(str(step.edge))} | {threshold} |")
    return "\n".join(rows)


def _scores(recipe: Recipe, run: Results | None) -> str:
    rows = ["| on | before | after |", "| --- | --- | --- |"]
    searched = f"{run.searched} {run.unit} that the search used" if run else "what the search used"
    rows.append(f"| {searched} | {_signed(recipe.scores, 'baseline')} | {_signed(recipe.scores, 'final')} |")
    lines = ["The search chose what scored best on what it used, so on anything new expect less. " + _verdict(run)]
    if run and run.verdict:
        before, after = run.verdict.base.score, run.verdict.result.score
        rows.append(f"| {run.verdict.items} {run.unit} held out | {before:+.4f} | {after:+.4f} |")
    if run and run.held_out_text:
        text = run.held_out_text
        words = "; ".join(filter(None, (text.verdict, text.loss_verdict)))
        rows.append(f"| {text.items} windows of text held out | {text.base.score:+.4f} | {text.result.score:+.4f} |")
        lines.append(f"On text that the search never saw: **{words}**. {_interval(text)}")
    return "\n".join([*rows, "", *_budget_table(run), *lines])


def _budget_table(run: Results | None) -> list[str]:
    """What each budget cost; nothing where none was tried."""
    if run is None or not run.budgets:
        return []
    rows = ["| parameters removed | predicted cost | score | text, nats a token | verdict |", "| --- " * 5 + "|"]
    for budget in run.budgets:
        cells = [_number(budget.predicted_cost), _number(budget.change), _number(budget.text_change), budget.verdict]
        rows.append(f"| {100 * budget.share:g} %: {budget.parameters_removed:,} | {' | '.join(cells)} |")
    return ["What each budget changed, on what the search used:", "", *rows, ""]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _verdict(run: Results | None) -> str:
    if run is None:
        return "The verdict on what the search never saw stands in the card of the run that made the recipe."
    if run.verdict is None:
        return "Nothing was held out, so there is no verdict."
    words = "; ".join(filter(None, (run.verdict.verdict, run.verdict.loss_verdict)))
    return f"On {run.unit} that the search never saw: **{words}**. {_interval(run.verdict)}"


def _interval(verdict: Verdict) -> str:
    low, high = verdict.interval
    return (
        f"Mean difference {verdict.difference:+.4f} (95 % interval {low:+.4f} to {high:+.4f}): {verdict.better} "
        f"better, {verdict.worse} worse, {verdict.equal} equal."
    )


def _rebuild(recipe: Recipe, base: str) -> str:
    model = base if _is_on_hub(recipe.model) else "BASE_MODEL"
    if recipe.config.reducer != "svd":
        return (
            "```sh\nsplaser laser --config run.yaml -o again\n```\n\n"
            "with the run.yaml of the run, its pairs and its text: what the matrices were measured on doesn't stand in "
            "recipe.json, which records the ranks and can't be applied."
        )
    whose = "" if model == base else f"`BASE_MODEL` is your copy of {code(base)}. "
    return (
        f"```sh\nsplaser apply recipe.json {model} -o rebuilt\n```\n\n"
        f"{whose}Only weights with the identity {code(recipe.weights_identity[:12])}, in {code(recipe.dtype)}, are "
        "accepted; on a machine of the same kind, with the versions below, the result is the same bit for bit."
    )


def _signed(scores: Mapping[str, float], key: str) -> str:
    return f"{scores[key]:+.4f}" if key in scores else "-"
