"""Rows of preference data, good and bad, and what has to be true of the pairs that come of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from splaser_plugin.data.pairs import Pair, PairSet, pairs_from_rows, pairs_sha256

SAMPLES = Path(__file__).parents[1] / "data" / "pairs"
WITHOUT_REJECTED = {"openhermes.json", "axolotl_without_rejected.jsonl"}
GOOD = {
    "prompt": "What is the boiling point of water?",
    "chosen": "100 degrees Celsius.",
    "rejected": "Cold.",
}
LINE = json.dumps(GOOD).encode() + b"\n"
CSV = b"prompt,chosen,rejected\nHi,Hello.,Go.\n"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def only_pair(row: dict[str, Any]) -> Pair:
    (pair,) = pairs_from_rows([row])
    return pair


def dropped_cause(row: object) -> str:
    pair_set = pairs_from_rows([GOOD, row])
    (cause,) = pair_set.dropped
    assert (len(pair_set), pair_set.dropped[cause], pair_set.rows_read) == (1, 1, 2)
    return cause


def check_pair_set(pair_set: PairSet) -> None:
    assert len(pair_set) >= 1
    assert len(pair_set) + sum(pair_set.dropped.values()) == pair_set.rows_read
    for pair in pair_set:
        texts = [turn["content"] for turn in pair.messages]
        answers = [pair.chosen] if pair.rejected is None else [pair.chosen, pair.rejected]
        roles = [turn["role"] for turn in pair.messages]
        assert roles[-1] == "user" and "system" not in roles[1:]
        assert all(type(text) is str and text.strip() and "\0" not in text for text in texts + answers)
        assert len({answer.strip() for answer in answers}) == len(answers)
    assert len(pairs_sha256(pair_set)) == 64
