"""How much each matrix counts on a text, for choosing those to train by `fisher` or `gradient`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from splaser_plugin.config.stages import Measure, SelectConfig
from splaser_plugin.errors import ConfigError
from splaser_plugin.progress import SILENT, Progress

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedTokenizerBase

WINDOW = 256
WINDOWS = 48
"""Some 12,000 tokens."""


def importances(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, by: Measure, text: str, progress: Progress = SILENT
) -> dict[str, float]:
    """What `choose` takes for `by="fisher"` and `by="gradient"`: a value for each matrix, by its name.

    `fisher` is the matrix's share, 0 to 1, of what a reduction predicts that the removal of each matrix alone costs;
    `gradient` is the norm of its inputs times that of its output gradients. One forward and one backward pass over
    each of at most 48 windows of 256 tokens, for each group of matrices whose moments fit into 2 GiB.

    Args:
        model: A loaded causal language model, dense; under adapters the merged weights are what is measured.
        tokenizer: The model's.
        by: `fisher` or `gradient`.
        text: A UTF-8 file, or a hub data set, as for perplexity.
        progress: Told of each window.

    Returns:
        A number for each matrix's name.

    Raises:
        ConfigError: Another `by`, or no text.
        TextError: The text can't be read, or is too short.
        ModelError: The model is sharded over processes, or computes inf or nan.
    """
    from splaser_plugin.data.windows import read_windows
    from splaser_plugin.reduction.calibration import window_rows
    from splaser_plugin.reduction.importance import fisher_cost, gradient_size
    from splaser_plugin.reduction.moments import Moments, measure
    from splaser_plugin.scanning.measures import MEASURED
    from splaser_plugin.weights.in_memory import Weights
    from splaser_plugin.weights.loading import context_length

    if by not in MEASURED:
        raise ConfigError(f"by: got {by!r}, expected one of {', '.join(MEASURED)}.")
    _check_text(by, text)
    context = context_length(model)
    window = min(WINDOW, context or WINDOW)
    rows = window_rows(read_windows(text, tokenizer, window=window, count=WINDOWS, context=context))
    weights = Weights(model)
    found: dict[str, float] = {}
    for matrix, moments in measure(weights, weights.matrices()[0], rows, progress=progress):
        if isinstance(moments, Moments):
            found[matrix.name] = fisher_cost(moments) if by == "fisher" else gradient_size(moments, matrix)
        del moments  # or they would be held beside those of the next matrices, while these are measured
    whole = sum(found.values()) if by == "fisher" else 1.0
    return {name: value / whole if whole else 0.0 for name, value in found.items()}


def importances_of_folder(
    model: str | Path, select: SelectConfig, *, progress: Progress = SILENT
) -> dict[str, float] | None:
    """The same of a folder or hub id, where the choice is by one of them; else None, and nothing is loaded."""
    from splaser_plugin.scanning.measures import MEASURED

    if select.by not in MEASURED:
        return None
    _check_text(select.by, select.text)
    from splaser_plugin.weights.loading import load_model

    loaded, tokenizer = load_model(model)
    return importances(loaded, tokenizer, by=select.by, text=select.text, progress=progress)


def _check_text(by: str, text: str) -> None:
    if not text:
        raise ConfigError(f"--by {by} is measured on a text. Give --text FILE.")
