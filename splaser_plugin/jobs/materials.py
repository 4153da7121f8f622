"""What a laser run measures on, in two parts: what it searches on, and what it holds out."""

from __future__ import annotations

from dataclasses import replace

from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.config.tasks import task_of
from splaser_plugin.data.split import Split, split_documents, split_windows
from splaser_plugin.scoring.scorers import Material, Scorers


def materials(split: Split, scorers: Scorers, config: LaserConfig) -> tuple[Split, Material, Material | None]:
    """What is searched on and, if anything, held out; the split's reason is that of what the scorer measures on.

    Raises TextError, TaskError and MissingExtraError when a text or a task can't be used.
    """
    split, searched, unseen = _pairs_and_windows(split, scorers, config)
    tasks = {task.name: task for task in scorers.tasks()}
    parts = {
        name: split_documents(range(len(task)), task.questions, config.held_out_fraction, config.seed)
        for name, task in tasks.items()
    }
    searched = replace(searched, tasks={name: tasks[name].part(part.search) for name, part in parts.items()})
    name = task_of(config.scored_by)
    if not name:
        return split, searched, unseen
    split = replace(split, reason=f"{parts[name].reason}; task {name} by its {tasks[name].metric}")
    unseen = unseen or Material(())
    held_out = parts[name].held_out
    return split, searched, replace(unseen, tasks={name: tasks[name].part(held_out)} if held_out else {})


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
