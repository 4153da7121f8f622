"""What a laser run measures on, in two parts: what it searches on, and what it holds out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.config.tasks import task_of
from splaser_plugin.data.split import Question, Split, questions_of, split_documents, split_windows, unshared
from splaser_plugin.errors import PairsError, TaskError
from splaser_plugin.scoring.scorers import Material, Scorers


def materials(split: Split, scorers: Scorers, config: LaserConfig) -> tuple[Split, Material, Material | None]:
    """What is searched on and, if anything, held out; the split's reason is that of what the scorer measures on.

    Nothing that is searched on, guarded or calibrated by shares a question with what the scorer holds out.

    Raises TextError, PairsError, TaskError and MissingExtraError when a text or a task can't be used.
    """
    split, searched, unseen = _pairs_and_windows(split, scorers, config)
    tasks = {task.name: task for task in scorers.tasks()}
    parts = {
        name: split_documents(range(len(task)), task.questions, config.held_out_fraction, config.seed)
        for name, task in tasks.items()
    }
    searched = replace(searched, tasks={name: tasks[name].part(part.search) for name, part in parts.items()})
    name = task_of(config.scored_by)
    held_out: Sequence[Question] = questions_of(split.held_out) if config.unit == "pairs" else ()
    if name:
        split = replace(split, reason=f"{parts[name].reason}; task {name} by its {tasks[name].metric}")
        documents = tasks[name].part(parts[name].held_out)
        unseen = replace(unseen or Material(()), tasks={name: documents} if len(documents) else {})
        held_out = documents.asked
    return (*_without(held_out, split, searched, name), unseen)


def _without(held_out: Sequence[Question], split: Split, searched: Material, scorer: str) -> tuple[Split, Material]:
    """Without the pairs, and the documents of tasks beside the scorer's own, that share a held-out question.

    Raises PairsError or TaskError when none of them are left.
    """
    tasks, lost = dict(searched.tasks), []
    for name, task in tasks.items():
        kept = unshared(task.asked, held_out) if name != scorer else range(len(task))
        if not kept:
            raise TaskError(
                f"task '{name}': all its documents have questions that are held out, so it can't guard. Use another "
                "guard, or --held-out-fraction 0."
            )
        if len(kept) < len(task):
            lost.append(f"{len(task) - len(kept)} documents of task {name}")
            tasks[name] = task.part(kept)
    if scorer:  # pairs aren't held out then
        kept = unshared(questions_of(split.search), held_out)
        if split.search and not kept:
            raise PairsError("all prompts of --pairs are held-out questions of the task. Give --pairs others.")
        if len(kept) < len(split.search):
            lost.append(f"{len(split.search) - len(kept)} pairs")
            pairs = tuple(split.search[place] for place in kept)
            split, searched = replace(split, search=pairs), replace(searched, pairs=pairs)
    if lost:
        split = replace(split, reason=f"{split.reason}; left out, as they share its questions: {', '.join(lost)}")
    return split, replace(searched, tasks=tasks)


def _pairs_and_windows(split: Split, scorers: Scorers, config: LaserConfig) -> tuple[Split, Material, Material | None]:
    if config.unit != "windows" and not config.judges_text:
        windows = scorers.windows() if "perplexity" in config.guards else []
        return split, Material(split.search, windows), Material(split.held_out) if split.held_out else None
    parts = split_windows(scorers.windows(), config.held_out_fraction, config.seed)
    if config.unit == "windows":
        unseen = Material((), parts.held_out) if parts.held_out else None
        split = replace(split, reason=parts.reason, warning=split.pairs.warning)
        return split, Material(split.search, parts.search), unseen
    return split, Material(split.search, parts.search), Material(split.held_out, parts.held_out)
