"""What `--guard` asks for: other scores than the one searched by, and how much worse each may become."""

from __future__ import annotations

import math

from splaser_plugin.config.tasks import task_of
from splaser_plugin.errors import ConfigError

GUARDS = ("chosen", "margin", "perplexity", "semantic")
AUTO, NONE = "auto", "none"


def parse_guards(text: str) -> dict[str, float]:
    """Name to limit of `perplexity:1.02,chosen:0.05`: the largest ratio of perplexities, or fall of a mean score.

    Empty for `none`. Raises ConfigError for a part of another form, and for a name that stands twice.
    """
    found: dict[str, float] = {}
    for part in text.split(",") if text not in ("", NONE) else ():
        name, _, number = part.strip().rpartition(":")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if not (name in GUARDS or task_of(name)) or not (1.0 if name == "perplexity" else 0.0) <= limit < math.inf:
            raise ConfigError(
                f"--guard: got '{part}', expected perplexity:RATIO with a ratio of at least 1 (perplexity:1.02), or "
                "chosen:FALL, margin:FALL, semantic:FALL or lm-eval:TASK:FALL with a fall of at least 0 (margin:0.05); "
                "several with commas, or auto, or none."
            )
        if name in found:
            raise ConfigError(f"--guard: '{name}' stands twice in '{text}'. Leave one out.")
        found[name] = limit
    return found
