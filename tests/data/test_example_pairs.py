"""The example pairs are as examples/data/README.md says."""

from __future__ import annotations

import re
from statistics import fmean

import pytest

from splaser_plugin.data.pairs import load_pairs
from tests.builders import EXAMPLE_PAIRS

FOLDER = EXAMPLE_PAIRS.parent
FILES = [path.name for path in sorted(FOLDER.glob("*.jsonl"))]


def test_the_readme_names_every_file_and_how_many_rows_it_has():
    table = re.findall(r"^\| `(.+)` \| (\d+) \|", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name: int(rows) for name, rows in table} == {name: len(load_pairs(FOLDER / name)) for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_a_pair_of_the_lengths_the_readme_says(name):
    found = load_pairs(FOLDER / name)
    assert found.rows_read == len(found) and not found.dropped
    for pair in found:
        assert 20 <= len(pair.prompt) <= 120 and 40 <= len(pair.chosen) <= 220, pair.prompt


@pytest.mark.parametrize("name", FILES)
def test_length_does_not_tell_the_chosen_answer(name):
    lengths = [(len(pair.chosen), len(pair.rejected)) for pair in load_pairs(FOLDER / name)]
    assert all(abs(chosen - rejected) <= 0.2 * chosen for chosen, rejected in lengths)
    assert fmean(rejected for _, rejected in lengths) == pytest.approx(fmean(chosen for chosen, _ in lengths), rel=0.02)
    longer = sum(chosen > rejected for chosen, rejected in lengths)
    shorter = sum(chosen < rejected for chosen, rejected in lengths)
    assert abs(longer - shorter) <= 0.1 * len(lengths)


def test_no_text_occurs_twice_in_any_of_the_files():
    pairs = [pair for name in FILES for pair in load_pairs(FOLDER / name)]
    for texts in ([pair.prompt for pair in pairs], [text for pair in pairs for text in (pair.chosen, pair.rejected)]):
        assert len({" ".join(re.findall(r"\w+", text.casefold())) for text in texts}) == len(texts)
