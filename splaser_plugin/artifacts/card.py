"""The model card: README.md of a lasered model, as the hub shows it. It names nothing of the machine it was made on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from splaser_plugin.artifacts.base_card import BaseCard, is_on_hub
from splaser_plugin.artifacts.recipe import Recipe
from splaser_plugin.artifacts.results import Results, Verdict
from splaser_plugin.config.tasks import task_of
from splaser_plugin.files.text import printable

TAGS = ["splaser", "laser", "low-rank"]
LASER_PAPER = "https://arxiv.org/abs/2312.13558"
PLACE = "FOLDER_OR_HUB_ID"
"""Stands in the card for where the model is; an upload writes the repository's id there."""


def model_card(recipe: Recipe, run: Results | None = None, base: BaseCard | None = None) -> ModelCard:
    """The card of the model that a recipe makes.

    Args:
        recipe: What was done to the base model.
        run: The search that found it; without it, as for a rebuilt model, the card has no verdict.
        base: What is known of the base model.
    """
    base = base or BaseCard(hub_id=recipe.model if is_on_hub(recipe.model) else None)
    name = public_name(recipe.model)
    sections = [
        f"# {code(PurePath(name).name)}, lasered",
        _what_was_done(recipe, run, name),
        _origin(recipe, base),
        "## Use it",
        _snippet(recipe, base),
        "## Recipe",
        _recipe_table(recipe),
        "## Scores",
        _scores(recipe, run),
        "## Rebuild it",
        _rebuild(recipe, name),
        "## Made with",
        ", ".join(f"{code(name)} {code(version)}" for name, version in recipe.versions.items()) + ".",
    ]
    data = _metadata(recipe, run, base)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _metadata(recipe: Recipe, run: Results | None, base: BaseCard) -> ModelCardData:
    own = [run.pairs.source] if run and is_on_hub(run.pairs.source) else []
    results = _eval_results(run) if run else []
    return ModelCardData(
        base_model=base.hub_id,
        datasets=list(dict.fromkeys([*base.datasets, *own])) or None,
        eval_results=results or None,
        language=list(base.languages) or None,
        library_name="splaser" if recipe.config.save == "factored" else "transformers",
        license=base.license,
        license_link=base.license_link,
        license_name=base.license_name,
        model_name=f"{printable(PurePath(public_name(recipe.model)).name)}, lasered" if results else None,
        pipeline_tag=base.pipeline_tag,
        tags=TAGS,
    )


def _eval_results(run: Results) -> list[EvalResult]:
    """What was held out, as the hub's model-index: the score, and how it differs from the base's."""
    pairs = run.pairs.source if run.unit == "pairs" else ""
    found = []
    for verdict, scorer, unit, source in (
        (run.verdict, run.scorer, run.unit, pairs),
        (run.held_out_text, "perplexity", "windows of text", ""),
    ):
        if verdict is None:
            continue
        kind = printable(task_of(scorer) or scorer.rpartition(".")[2]) or "score"
        measure = "log_probability" if kind == "perplexity" else f"{kind}_score"
        words = "; ".join(filter(None, (verdict.verdict, verdict.loss_verdict)))
        low, high = verdict.interval
        for metric, value, name in (
            (measure, verdict.result.score, f"mean {measure.replace('_', ' ')} on {verdict.items} {unit} held out"),
            (
                f"{measure}_difference",
                verdict.difference,
                f"difference to the base on the same {unit}, 95 % interval {low:+.4f} to {high:+.4f}: {words}",
            ),
        ):
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=source if is_on_hub(source) else "private",
                    dataset_name=printable(public_name(source) or task_of(scorer)) or "held-out text",
                    dataset_split="held out",
                    metric_type=metric,
                    metric_value=round(value, 6),
                    metric_name=name,
                )
            )
    return found


def public_name(name: str) -> str:
    """A hub id as it is, and of a path only its last part: what is above it is nobody else's business."""
    if is_on_hub(name):
        return name
    return PurePath(name.replace("\\", "/")).name


def code(text: str) -> str:
    """Untrusted text as a code span, in which Markdown and HTML mean nothing; also inside a table."""
    text = printable(text).replace("|", "\\|") or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _what_was_done(recipe: Recipe, run: Results | None, base: str) -> str:
    count = len(recipe.steps)
    lines = [
        f"{code(base)} with {count} of its weight matrices replaced by low-rank versions of themselves "
        f"([LASER]({LASER_PAPER})) by splaser."
        if count
        else f"{code(base)}, unchanged: splaser found no weight matrix whose reduction made its answers better."
    ]
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


def _origin(recipe: Recipe, base: BaseCard) -> str:
    """What the base is, where its licence is from, and why either is missing."""
    lines = []
    if not is_on_hub(recipe.model):
        lines.append(
            "That is the last part of the base's name where this was made: a folder, a file or a model in memory."
        )
        lines.append(
            f"Its own files say that it comes from {code(base.hub_id)}."
            if base.hub_id
            else "Neither its config.json nor its card names a model on the hub, so `base_model` is left out."
        )
    lines.append(
        f"The licence, {code(base.license)}, is that of the base's card."
        if base.license
        else "The base's card wasn't there or names no licence: look it up before you share this model."
    )
    return "\n".join(lines)


def _snippet(recipe: Recipe, base: BaseCard) -> str:
    """Code that loads the model and answers a question."""
    kind = base.auto_class
    if recipe.config.save == "factored":
        imports = "from transformers import AutoTokenizer\n\nfrom splaser_plugin import load"
        loading = "load(place)"
    else:
        imports = f"from transformers import {', '.join(sorted((kind, 'AutoTokenizer')))}"
        loading = f'{kind}.from_pretrained(place, dtype="auto")'
    return f"""```python
{imports}

place = "{PLACE}"
model = {loading}
tokenizer = AutoTokenizer.from_pretrained(place)
inputs = tokenizer("What is the capital of France?", return_tensors="pt")
if tokenizer.chat_template:
    messages = [{{"role": "user", "content": "What is the capital of France?"}}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```"""


def _rule(run: Results) -> str:
    return "scored better" if run.compared_with == "best" else "surely scored no worse than the base by the tolerance"


def _material(run: Results) -> str:
    if run.unit == "documents":
        return f"{run.searched} documents of the task {code(task_of(run.scorer))}"
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
    rows = ["| parameters removed | predicted cost | score | text, nats a token | outcome |", "| --- " * 5 + "|"]
    for budget in run.budgets:
        cells = [_number(budget.predicted_cost), _number(budget.change), _number(budget.text_change), budget.outcome]
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
    trimmed = "" if verdict.trimmed is None else f"; {verdict.trimmed:+.4f} without the outer tenths"
    return (
        f"Mean difference {verdict.difference:+.4f} (95 % interval {low:+.4f} to {high:+.4f}{trimmed}): "
        f"{verdict.better} better, {verdict.worse} worse, {verdict.equal} equal."
    )


def _rebuild(recipe: Recipe, base: str) -> str:
    model = base if is_on_hub(recipe.model) else "BASE_MODEL"
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
