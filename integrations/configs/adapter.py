"""PEFT's adapter_config.json for exactly the chosen matrices."""

from __future__ import annotations

from typing import Any

from splaser_plugin.errors import ConfigError, MatrixError, RankError
from splaser_plugin.scanning.selection import Selection, adapter_sides, known_shapes, lora_targets


def adapter_config(
    selection: Selection,
    *,
    rank: int = 32,
    alpha: int | None = None,
    dropout: float = 0.0,
    rank_pattern: bool = False,
    model: str = "",
) -> dict[str, Any]:
    """The content of an adapter_config.json; arguments as for `lora_config`.

    Only keys that every version of PEFT knows: it has no place for a comment, and warns of a key it doesn't know.
    Raises as `lora_targets` does, RankError when a rank is out of range, and ConfigError for dropout with what PEFT
    adapts as a parameter.
    """
    modules, parameters = lora_targets(selection)
    if parameters and dropout:
        raise ConfigError(f"dropout {dropout:g}: PEFT has none for {parameters[0]}. Leave it at 0, or experts out.")
    if rank < 1:
        raise RankError(f"rank {rank}: expected at least 1.")
    alpha = 2 * rank if alpha is None else alpha
    ranks = rank_patterns(selection, rank) if rank_pattern else {}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model or selection.model or None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "target_modules": modules,
        **({"target_parameters": parameters} if parameters else {}),
        "rank_pattern": ranks,
        # LoRA scales by alpha / rank: the same scale for every matrix
        "alpha_pattern": {name: matrix_rank * alpha / rank for name, matrix_rank in ranks.items()},
    }


def rank_patterns(selection: Selection, rank: int) -> dict[str, int]:
    """Adapter rank by full name (of the parameter, where that is the target), in proportion to the rank above the edge.

    As many parameters are trained as at `rank`: r_i = c k_i with k_i the rank above the edge and c such that
    sum r_i (n_i + m_i) = rank sum (n_i + m_i), over each matrix of a stack too; then rounded, and held between 1 and
    the matrix's smaller side. Raises MatrixError when the scan has no shapes, or no chosen matrix has a value above
    the edge.
    """
    shapes = known_shapes(selection)
    above = {matrix.name: matrix.rank or 0 for matrix in selection.matrices}
    total = sum(above[matrix.name] * matrix.experts * sum(shapes[matrix.name]) for matrix in selection.matrices)
    if total == 0:
        raise MatrixError("no chosen matrix has a singular value above the edge. Leave rank_pattern off.")
    share = rank * adapter_sides(selection) / total
    return {
        matrix.parameter or matrix.name: min(max(1, round(share * above[matrix.name])), min(shapes[matrix.name]))
        for matrix in selection.matrices
    }
