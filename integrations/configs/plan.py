"""What a generated configuration has to say, whichever tool it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from splaser_plugin.data.formats import describe_columns, recognise
from splaser_plugin.errors import ConfigError, PairsError
from splaser_plugin.scanning.selection import Selection, adapter_sides, matched_rank

MODES = ("unfrozen", "lora", "qlora")
STAGES = ("sft", "dpo")
DEFAULT_RANK = 32


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One training run: which matrices, how, on what."""

    selection: Selection
    mode: str
    """unfrozen: full fine-tuning of the chosen matrices. lora: adapters on them. qlora: the same on 4-bit weights."""
    stage: str = "sft"
    model: str = ""
    """Folder or hub id; empty: the scan's own."""
    dataset: Path | None = None
    output_dir: str = ""
    rank: int | None = None
    """LoRA rank; None: `DEFAULT_RANK`, or what the user's own file has."""
    rank_reason: str = ""
    """How the rank was computed, when it was."""

    def __post_init__(self) -> None:
        for flag, value, choices in (("--mode", self.mode, MODES), ("--stage", self.stage, STAGES)):
            if value not in choices:
                raise ConfigError(f"{flag}: got '{value}', expected one of {', '.join(choices)}.")
        if self.rank is not None and self.mode == "unfrozen":
            raise ConfigError("--lora-rank: --mode unfrozen has no adapters. Leave it out, or use --mode lora.")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"--lora-rank: got {self.rank}, expected at least 1.")

    @property
    def base_model(self) -> str:
        """Raises ConfigError when neither the plan nor the scan names a model."""
        model = self.model or self.selection.model
        if not model:
            raise ConfigError(f"{self.selection.source}: doesn't name its model. Give --model.")
        return model


def choose_rank(selection: Selection, lora_rank: str | None, match_rank: int) -> tuple[int | None, str]:
    """The rank that `--lora-rank` means, and in words how it was computed.

    lora_rank: a number, `auto`, or None for the default.
    Raises ConfigError for anything else; see `matched_rank` for `auto`.
    """
    if lora_rank is None:
        return None, ""
    if lora_rank != "auto":
        if not lora_rank.isdecimal() or int(lora_rank) < 1:
            raise ConfigError(f"--lora-rank: got '{lora_rank}', expected a number of at least 1, or auto.")
        return int(lora_rank), ""
    rank = matched_rank(selection, match_rank)
    reason = (
        f"rank {rank} trains as many parameters as rank {match_rank} on every matrix of the blocks: "
        f"{match_rank} x {selection.block_sides} / {adapter_sides(selection)} (sums of rows + columns), rounded"
    )
    return rank, reason


def lacks_dataset(plan: Plan, base: Path | None) -> bool:
    """Whether nothing names the data set: neither --dataset nor a file of the user's own, `base`."""
    return base is None and plan.dataset is None


def header(plan: Plan, run: str, *, base: Path | None, dataset_key: str) -> list[str]:
    """Comment lines for the top of what is generated.

    run: the command that uses it. base: the user's own file that it is made from. dataset_key: names the data set.
    """
    selection = plan.selection
    what = {"unfrozen": "Trains", "lora": "Trains LoRA adapters on", "qlora": "Trains QLoRA adapters on"}[plan.mode]
    lines = [
        f"{what} {len(selection.matrices)} of {selection.considered} matrices: {selection.rule}.",
        f"Scan: {selection.source}; model: {selection.model or 'not named in it'}.",
    ]
    if plan.rank_reason:
        lines.append(f"LoRA: {plan.rank_reason}.")
    if lacks_dataset(plan, base):
        lines.append(f"Data: no --dataset was given, so nothing trains before you add `{dataset_key}`.")
    return [*lines, f"Run: {run}"]


def first_row(dataset: Path) -> Mapping[str, Any]:
    """The first row of a json, jsonl, csv or parquet file. Raises PairsError when there is none."""
    from splaser_plugin.data.sources import open_source

    rows = list(islice(open_source(dataset)[1], 1))
    if not rows or not isinstance(rows[0], Mapping):
        raise PairsError(f"{dataset}: its first row is no object with columns. Give a jsonl file.")
    return rows[0]


def unusable(dataset: Path, row: Mapping[str, Any], tool: str, stage: str, wanted: str) -> PairsError:
    """The refusal of a data set that a tool has no format for."""
    form = recognise(row)
    found = f"{form.name}: " if form else ""
    return PairsError(
        f"{dataset}: {tool} can't train {stage} on its columns ({found}{describe_columns(row)}). "
        f"Expected {wanted}; or name the data set in a file of your own and give that with --base."
    )
