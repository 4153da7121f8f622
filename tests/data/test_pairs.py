"""Which rows become pairs, which are dropped and why, and the identity of what is left."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from splaser_plugin.data.formats import FORMATS, OPTIONAL_COLUMNS
from splaser_plugin.data.limits import TokenLimits
from splaser_plugin.data.pairs import load_pairs, pairs_from_rows, pairs_sha256
from splaser_plugin.errors import ConfigError, PairsError
from tests.builders import run_python
from tests.data.rows import (
    GOOD,
    SAMPLES,
    WITHOUT_REJECTED,
    assistant,
    check_pair_set,
    dropped_cause,
    only_pair,
    system,
    user,
)

LONG = "word " * 2500
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"rejected": " 100 degrees Celsius.\n"}, "chosen equals rejected"),
        ({"prompt": " \n"}, "empty prompt"),
        ({"prompt": None}, "empty prompt"),
        ({"prompt": []}, "empty prompt"),
        ({"chosen": ""}, "empty answer"),
        ({"rejected": None}, "empty answer"),
        ({"prompt": 5}, "wrong type"),
        ({"prompt": {"role": "user", "content": "Hi"}}, "wrong type"),
        ({"prompt": ["Hi"]}, "wrong type"),
        ({"prompt": [{"role": "user", "content": ["Hi"]}]}, "wrong type"),
        ({"system": ["Be brief."]}, "wrong type"),
        ({"chosen": float("nan")}, "wrong type"),
        ({"rejected": b"Cold."}, "wrong type"),
        ({"prompt": [{"role": "critic", "content": "4"}]}, "unknown role"),
        ({"prompt": [user("Hi"), CALL, {"role": "tool", "content": "4"}]}, "tool calls"),
        ({"prompt": [user("Hi"), CALL, user("And?")]}, "tool calls"),
        ({"prompt": [{"from": "observation", "value": "4"}]}, "tool calls"),
        ({"chosen": [CALL]}, "tool calls"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "content that is no text"),
        ({"chosen": [{"type": "text", "text": 4}]}, "wrong type"),
        ({"prompt": [{}]}, "unknown role"),
        ({"chosen": [user("Hi")]}, "no assistant turn"),
        ({"chosen": []}, "no assistant turn"),
        ({"prompt": [user("Hi"), assistant("Hello.")]}, "turns out of order"),
        ({"prompt": [assistant("Hello."), user("Hi")]}, "turns out of order"),
        ({"prompt": [user("Hi"), user("Hi?")]}, "turns out of order"),
        ({"prompt": [user("Hi"), system("Be brief."), user("Hi?")]}, "turns out of order"),
        ({"prompt": [system("Be brief.")]}, "turns out of order"),
        ({"chosen": [user("Hi"), assistant("Hello.")]}, "answers to different prompts"),
        ({"prompt": "lone \ud800 surrogate"}, "invalid characters"),
        ({"chosen": "a NUL \0 character"}, "invalid characters"),
    ],
)
def test_unusable_rows_are_dropped_and_counted_by_cause(change: dict[str, Any], cause: str) -> None:
    assert dropped_cause({**GOOD, **change}) == cause


def test_rows_with_tool_calls_alone_are_refused_with_the_reason() -> None:
    with pytest.raises(
        PairsError, match=r"in 3 rows: tool calls 3\. Turns in which tools are called .* without them\."
    ):
        pairs_from_rows([{**GOOD, "chosen": [CALL]}] * 3)
    one_left = pairs_from_rows([GOOD, {**GOOD, "chosen": [CALL]}])
    assert "tool calls 1" in one_left.warning and "without them" in one_left.warning


@pytest.mark.parametrize("row", [None, 3, "text", ["a"], [GOOD]])
def test_rows_that_are_not_objects_are_dropped(row: object) -> None:
    assert dropped_cause(row) == "not an object"


def test_history_of_the_wrong_shape_is_dropped() -> None:
    row = {"instruction": "Hi", "history": [["only one"]], "chosen": "Hello.", "rejected": "Go."}
    assert dropped_cause(row) == "wrong type"


def test_limits_count_every_token_of_every_turn_of_the_prompt(tokenizer: Any) -> None:
    turns = [system("Be brief."), user("é🙂 Bonjour"), assistant("Bonjour."), user("Ça va?")]
    row = {"prompt": turns, "chosen": "Fine.", "rejected": "Not at all fine."}
    of_prompt = sum(len(tokenizer.tokenize(turn["content"])) for turn in turns)
    of_answer = len(tokenizer.tokenize("Not at all fine."))
    assert of_prompt < sum(len(turn["content"]) for turn in turns)
    assert len(pairs_from_rows([row], limits=TokenLimits(tokenizer, of_prompt, of_answer))) == 1
    for limits, cause in (((of_prompt - 1, of_answer), "prompt"), ((of_prompt, of_answer - 1), "answer")):
        with pytest.raises(PairsError, match=f"over-long {cause} 1"):
            pairs_from_rows([row], limits=TokenLimits(tokenizer, *limits))


def test_without_limits_any_length_is_taken() -> None:
    assert only_pair({**GOOD, "prompt": "x" * 10_000_000}).rejected == GOOD["rejected"]


def test_an_endless_text_is_over_long_without_being_tokenized() -> None:
    limits = TokenLimits(tokenizer=None)
    assert limits.has_long_prompt(["x" * 10**6]) and limits.has_long_answer(["x" * 10**6])


def test_control_and_formula_like_text_is_kept_as_it_is() -> None:
    pair = only_pair({"prompt": "=1+1", "chosen": "\x1b[31mred\x1b[0m\ttab", "rejected": "@SUM(A1)"})
    assert (pair.prompt, pair.chosen) == ("=1+1", "\x1b[31mred\x1b[0m\ttab")


def test_no_usable_pair_is_refused_with_counts_and_the_next_step(tokenizer: Any) -> None:
    long, equal = {**GOOD, "chosen": LONG}, {**GOOD, "rejected": GOOD["chosen"]}
    with pytest.raises(PairsError) as refusal:
        pairs_from_rows([equal, long, long], source="mine.jsonl", limits=TokenLimits(tokenizer))
    assert str(refusal.value) == (
        "mine.jsonl: no usable pair in 3 rows: over-long answer 2, chosen equals rejected 1. "
        "Raise max_prompt_tokens (now 2048) or max_answer_tokens (now 1024), or give shorter pairs."
    )
    limits = TokenLimits(tokenizer, fits=lambda turns: False)
    with pytest.raises(PairsError, match=r"or give shorter pairs\. Give shorter prompts, or a model of a longer"):
        pairs_from_rows([GOOD, long], limits=limits)
    with pytest.raises(PairsError, match=r"equals rejected 1\. Each row needs a prompt that ends with a user"):
        pairs_from_rows([equal])
    with pytest.raises(PairsError, match=r"rows: no rows\. Give at least one pair"):
        pairs_from_rows([])


def test_a_summary_says_what_was_read_and_dropped() -> None:
    pair_set = pairs_from_rows([GOOD, {**GOOD, "chosen": ""}, 3, 4], source="mine.jsonl")
    expected = "mine.jsonl: 1 pairs from 4 rows; dropped: not an object 2, empty answer 1"
    assert pair_set.summary == expected


@pytest.mark.parametrize(
    ("change", "mend"),
    [
        ({"chosen": LONG}, "(over-long answer 3). Raise --max-answer-tokens."),
        ({"prompt": LONG}, "(over-long prompt 3). Raise --max-prompt-tokens."),
        ({"chosen": ""}, "(empty answer 3). Each row needs a prompt that ends with a user turn, a chosen answer"),
    ],
)
def test_more_than_a_fifth_dropped_is_a_warning_with_the_mend(
    tokenizer: Any, change: dict[str, Any], mend: str
) -> None:
    dropped, limits = [{**GOOD, **change}] * 3, TokenLimits(tokenizer)
    warning = pairs_from_rows([GOOD] * 11 + dropped, limits=limits).warning
    assert f"rows: 3 of 14 rows were dropped {mend}" in warning
    assert pairs_from_rows([GOOD] * 12 + dropped, limits=limits).warning == ""


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="samples: 0, expected 1 or more"):
        pairs_from_rows([GOOD], samples=0)
    with pytest.raises(ConfigError, match="max_prompt_tokens: 0, expected 1 or more"):
        TokenLimits(None, prompt=0)
    with pytest.raises(ConfigError, match="max_answer_tokens: -1, expected 1 or more"):
        TokenLimits(None, answer=-1)


def many_rows(count: int) -> Iterator[dict[str, str]]:
    for n in range(count):
        yield {"prompt": f"Question {n}?", "chosen": f"Answer {n}.", "rejected": "" if n % 2 else "No."}


def test_samples_are_the_first_usable_rows_and_reading_stops_there() -> None:
    rows = many_rows(1000)
    pair_set = pairs_from_rows(rows, samples=3)
    assert [pair.prompt for pair in pair_set] == ["Question 0?", "Question 2?", "Question 4?"]
    assert (pair_set.rows_read, pair_set.dropped) == (5, {"empty answer": 2})
    assert next(rows)["prompt"] == "Question 5?"


def test_the_same_pairs_have_the_same_identity_in_every_format() -> None:
    identities = {
        file.name: pairs_sha256(load_pairs(file)) for file in SAMPLES.iterdir() if file.name not in WITHOUT_REJECTED
    }
    assert len(set(identities.values())) == 1
    assert set(identities.values()) != {pairs_sha256(load_pairs(SAMPLES / "openhermes.json"))}


def test_identity_is_stable_over_time() -> None:
    """Journals and recipes keep it: if this fails, they no longer match the pairs they were made with."""
    rows = [{**GOOD, "chosen": "100 °C."}, {"instruction": "Hi", "output": "Hello."}]
    content = (
        b'[[["user", "What is the boiling point of water?"]], "100 \\u00b0C.", "Cold."]\n'
        b'[[["user", "Hi"]], "Hello.", null]\n'
    )
    assert pairs_sha256(pairs_from_rows(rows)) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_identity_changes_with_every_text_and_with_the_order(column: str) -> None:
    changed = {**GOOD, column: GOOD[column] + "!"}
    original, other = pairs_from_rows([GOOD, changed]), pairs_from_rows([changed, GOOD])
    assert len({pairs_sha256(pairs) for pairs in (original, other, original.pairs[:1], other.pairs[:1])}) == 4


def test_importing_pairs_imports_nothing_heavy() -> None:
    script = (
        "import sys, splaser_plugin.data.pairs\n"
        "print([m for m in ('torch', 'datasets', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    assert run_python(script).strip() == "[]"


TEXTS = st.one_of(
    st.sampled_from(["", " ", "Hi", "Hello.", "\ud800", "\0", "user", "assistant", "x" * 20]),
    st.text(st.characters(codec=None), max_size=12),
)
ROLE_NAMES = st.sampled_from(["system", "user", "human", "assistant", "gpt", "tool", "", None, 1])
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": ROLE_NAMES, "content": TEXTS}),
        st.fixed_dictionaries({"from": ROLE_NAMES, "value": TEXTS}),
    ),
    max_size=5,
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.binary(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(TEXTS, st.integers()), inner, max_size=3),
    ),
    max_leaves=6,
)
COLUMNS = st.sampled_from(sorted(OPTIONAL_COLUMNS.union(*(form.columns for form in FORMATS))))
ROWS = st.one_of(
    ANYTHING,
    st.sampled_from(FORMATS).flatmap(
        lambda form: st.fixed_dictionaries(
            {column: st.one_of(TEXTS, MESSAGES, ANYTHING) for column in sorted(form.columns)},
            optional={column: st.one_of(TEXTS, ANYTHING) for column in sorted(OPTIONAL_COLUMNS - form.columns)},
        )
    ),
    st.dictionaries(COLUMNS, st.one_of(TEXTS, MESSAGES, ANYTHING), max_size=6),
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.lists(ROWS, max_size=6))
@example([GOOD, {"chosen": [[[[]]]], "rejected": {"a": {"b": {}}}}])
def test_any_rows_give_clean_pairs_or_a_pairs_error(tokenizer: Any, rows: list[object]) -> None:
    limits = TokenLimits(tokenizer, 12, 12)
    for given_rows in (rows, [GOOD, *rows]):
        try:
            pair_set = pairs_from_rows(given_rows, limits=limits)
        except PairsError:
            assert given_rows is rows
        else:
            check_pair_set(pair_set)
            for pair in pair_set:
                assert not limits.has_long_prompt([turn["content"] for turn in pair.messages])
                assert not limits.has_long_answer([pair.chosen, pair.rejected or ""])
