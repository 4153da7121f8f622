"""A finished run in experiment trackers: its metrics, a curve over the candidates, and a table of answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path
from typing import Any

from splaser_plugin.artifacts.results import Results, Verdict
from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.errors import ConfigError, MissingExtraError

TRACKERS = ("tensorboard", "wandb", "mlflow")
PROJECT = "splaser"
"""What W&B calls a project and MLflow an experiment."""
LOGS = "runs"
"""Folder beside the output, for TensorBoard."""
ANSWERS = "laser/answers"
COLUMNS = ["held out", "prompt", "chosen", "rejected", "base", "result", "change of the score"]


def check_trackers(names: Sequence[str]) -> None:
    """Refuse what `track` would, before any work.

    Raises ConfigError for a tracker that isn't known, MissingExtraError for one that isn't installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"--report-to: got '{name}', expected one of {', '.join(TRACKERS)}.")
        if find_spec(name) is None:
            raise MissingExtraError(
                f"--report-to {name}: it isn't installed. Install it: {sys.executable} -m pip install "
                f"'splaser_plugin[{name}]'"
            )


def track(names: Sequence[str], run: Results, config: LaserConfig, output: Path) -> None:
    """Log a run to trackers, by accelerate's; each run is called as its output folder.

    TensorBoard's files go to `runs` beside it, those of each run into a folder of their own.
    Whatever a tracker raises comes through.
    """
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers ask it which process is the main one
    for name in names:
        arguments: dict[str, dict[str, Any]] = {
            "tensorboard": {
                "run_name": _unused(output.parent / LOGS, output.name),
                "logging_dir": str(output.parent / LOGS),
            },
            "wandb": {"run_name": PROJECT, "name": output.name},
            "mlflow": {"experiment_name": PROJECT, "run_name": output.name},
        }
        tracker: Any = LOGGER_TYPE_TO_CLASS[name](**arguments[name])
        tracker.start()
        try:
            tracker.store_init_configuration({key: _plain(value) for key, value in config.to_dict().items()})
            points = curve(run)
            for step, point in enumerate(points, 1):
                tracker.log(point, step=step)
            tracker.log(metrics(run), step=len(points) + 1)
            _log_answers(name, tracker, answers(run), len(points) + 1)
        finally:
            tracker.finish()


def _unused(folder: Path, name: str) -> str:
    """The name, or with the first number from 2 on that nothing in the folder has: TensorBoard draws all event files of
    one folder as one curve.
    """
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(free for free in names if not (folder / free).exists())


def curve(run: Results) -> list[dict[str, float]]:
    """A point for each candidate, or budget, in the order tried: its score, the change, and whether it was kept."""
    tried = [(trial.score, trial.base_score, trial.outcome) for trial in run.budgets]
    tried = tried or [(trial.score, trial.best_before, trial.outcome) for trial in run.candidates]
    points = []
    for score, before, outcome in tried:
        point = {"laser/candidate_kept": float(outcome == "kept")}
        if score is not None:
            point["laser/candidate_score"] = score
            if before is not None:
                point["laser/candidate_change"] = score - before
        points.append(point)
    return points


def metrics(run: Results) -> dict[str, float]:
    """What came out: the scores on what was searched on, and the held-out difference with its interval."""
    found = {"laser/score_before": run.baseline.score, "laser/score_after": run.final.score}
    if isinstance(run.held_out, Verdict):
        low, high = run.held_out.interval
        found |= {"laser/held_out_difference": run.held_out.difference}
        found |= {"laser/held_out_low": low, "laser/held_out_high": high}
    return found


def answers(run: Results) -> list[list[str | float]]:
    """Rows of `COLUMNS`: what base and result answer, where answers were generated."""
    return [
        [
            "yes" if exchange.is_held_out else "no",
            exchange.asked.prompt,
            exchange.asked.chosen,
            exchange.asked.rejected or "",
            exchange.before,
            exchange.after,
            exchange.change,
        ]
        for exchange in run.answered
    ]


def _log_answers(name: str, tracker: Any, rows: list[list[str | float]], step: int) -> None:
    """As a table where the tracker has one, as Markdown in TensorBoard."""
    if not rows:
        return
    if name == "wandb":
        tracker.log_table(ANSWERS, columns=COLUMNS, data=rows, step=step)
    elif name == "mlflow":
        import mlflow

        mlflow.log_table(by_column(rows), artifact_file="answers.json")
    else:
        tracker.tracker.add_text(ANSWERS, markdown(rows), step)
        tracker.tracker.flush()


def by_column(rows: Sequence[Sequence[str | float]]) -> dict[str, list[str | float]]:
    """The same answers as a list for each of `COLUMNS`."""
    return {column: [row[place] for row in rows] for place, column in enumerate(COLUMNS)}


def markdown(rows: Sequence[Sequence[str | float]]) -> str:
    """The same answers as a table in Markdown, a line each."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: str | float) -> str:
    text = value if isinstance(value, str) else f"{value:+.4f}"
    return " ".join(text.replace("|", "\\|").split())


def _plain(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
