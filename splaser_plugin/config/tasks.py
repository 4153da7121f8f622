"""How options name tasks of lm-evaluation-harness: `lm-eval:TASK` beside other scorers, and a list of them alone."""

from __future__ import annotations

from splaser_plugin.errors import ConfigError

LM_EVAL = "lm-eval:"


def task_of(scorer: str) -> str:
    """The task of `lm-eval:TASK`; empty for any other scorer."""
    return scorer.removeprefix(LM_EVAL) if scorer.startswith(LM_EVAL) else ""


def parse_tasks(text: str) -> tuple[str, ...]:
    """The names in `arc_easy,my_task`; none for an empty text. Raises ConfigError for one that stands twice."""
    names = tuple(filter(None, (part.strip() for part in text.split(","))))
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--tasks: '{name}' stands twice in '{text}'. Leave one out.")
    return names
