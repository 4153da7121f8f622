"""What each format of preference data means: the prompt, the answers and who said what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from splaser_plugin.data.formats import FORMATS
from splaser_plugin.data.pairs import load_pairs, pairs_from_rows
from splaser_plugin.errors import PairsError
from tests.builders import save_rows
from tests.data.rows import GOOD, SAMPLES, WITHOUT_REJECTED, assistant, dropped_cause, only_pair, system, user


@pytest.mark.parametrize("file", sorted(SAMPLES.iterdir()), ids=lambda file: file.name)
def test_every_format_gives_the_same_pairs(file: Path) -> None:
    pair_set = load_pairs(file)
    expected: list[tuple[str, str, str | None]] = [
        (
            "Which planet is known as the red planet?",
            "Mars is known as the red planet.",
            "Go look it up yourself.",
        ),
        (
            "How many legs does a spider have?\nAnswer in one sentence.",
            "A spider has eight legs.",
            "Six legs, like every insect.",
        ),
        (
            'Translate "good morning" into French.',
            'It is "bonjour", with the accent on the last syllable.',
            "Guten Morgen, né?",
        ),
    ]
    if file.name in WITHOUT_REJECTED:
        expected = [(prompt, chosen, None) for prompt, chosen, _ in expected]
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pair_set] == expected
    assert [pair.messages for pair in pair_set] == [(user(prompt),) for prompt, _, _ in expected]
    assert (pair_set.source, pair_set.dropped, pair_set.rows_read) == (str(file), {}, 3)


def test_parquet_gives_the_same_pairs_as_jsonl(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for name in ("ultrafeedback_binarized", "trl_standard", "trl_implicit_prompt"):
        rows = [json.loads(line) for line in (SAMPLES / f"{name}.jsonl").read_text("utf-8").splitlines()]
        file = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        assert load_pairs(file).pairs == load_pairs(SAMPLES / f"{name}.jsonl").pairs


def test_rows_of_a_dataset_give_the_same_pairs_as_its_file() -> None:
    import datasets

    file = SAMPLES / "ultrafeedback_binarized.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    from_dataset = pairs_from_rows(datasets.Dataset.from_list(rows), source="a dataset")
    assert from_dataset.pairs == load_pairs(file).pairs
    assert from_dataset.source == "a dataset"


def test_a_folder_of_data_files_is_read_as_a_dataset(tmp_path: Path) -> None:
    save_rows(tmp_path / "train.jsonl", [GOOD, {**GOOD, "rejected": GOOD["chosen"]}])
    save_rows(tmp_path / "test.jsonl", [{**GOOD, "chosen": "212 degrees Fahrenheit."}])
    assert load_pairs(tmp_path).dropped == {"chosen equals rejected": 1}
    assert load_pairs(tmp_path, split="test").pairs[0].chosen == "212 degrees Fahrenheit."
    with pytest.raises(PairsError, match=r"split nope: can't be read .*Available splits.*Check the id"):
        load_pairs(tmp_path, split="nope")


def test_an_answer_is_the_last_assistant_turn_never_the_users() -> None:
    """The published notebook compared the user's turns of both sides, so that its score was always 0."""
    pair = only_pair(
        {
            "prompt": "Hello",
            "chosen": [user("Hello"), assistant("Hi, how can I help?")],
            "rejected": [user("Hello"), assistant("What?")],
        }
    )
    assert (pair.chosen, pair.rejected) == ("Hi, how can I help?", "What?")


TURNS = [user("Name a fruit."), assistant("Apple."), user("Another one?")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TURNS, "chosen": [assistant("Pear.")], "rejected": [assistant("Stone.")]},
        {"prompt": TURNS, "chosen": "Pear.", "rejected": assistant("Stone.")},
        {
            "prompt": "Name a fruit.",
            "chosen": [*TURNS, assistant("Pear.")],
            "rejected": [*TURNS, assistant("Stone.")],
        },
        {
            "prompt": TURNS[:1],
            "chosen": [*TURNS[1:], assistant("Pear."), user("Thanks.")],
            "rejected": [*TURNS[1:], assistant("Stone.")],
        },
        {"chosen": [*TURNS, assistant("Pear.")], "rejected": [*TURNS, assistant("Stone.")]},
        {
            "conversations": [
                {"from": "human", "value": "Name a fruit."},
                {"from": "gpt", "value": "Apple."},
                {"from": "human", "value": "Another one?"},
            ],
            "chosen": {"from": "gpt", "value": "Pear."},
            "rejected": {"from": "gpt", "value": "Stone."},
        },
        {
            "instruction": "Another one?",
            "history": [["Name a fruit.", "Apple."]],
            "chosen": "Pear.",
            "rejected": "Stone.",
        },
    ],
)
@pytest.mark.parametrize("system_text", ["", "Be brief."])
def test_multi_turn_prompts_keep_their_turns(row: dict[str, Any], system_text: str) -> None:
    pair = only_pair({**row, "system": system_text})
    expected = [system(system_text), *TURNS] if system_text else TURNS
    assert list(pair.messages) == expected
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Another one?", "Pear.", "Stone.")


def test_a_system_turn_in_the_messages_wins_over_the_system_column() -> None:
    conversations = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}]
    row = {"conversations": conversations, "chosen": "Hello.", "rejected": "Go.", "system": "Be brief."}
    assert list(only_pair(row).messages) == [system("Be kind."), user("Hi")]


def test_a_system_turn_of_the_prompt_stays_when_the_answers_repeat_the_rest() -> None:
    row = {
        "prompt": [system("Be kind."), *TURNS[:1]],
        "chosen": [*TURNS, assistant("Pear.")],
        "rejected": [*TURNS, assistant("Stone.")],
    }
    assert list(only_pair(row).messages) == [system("Be kind."), *TURNS]


def test_two_texts_alone_share_their_first_words_as_the_prompt() -> None:
    pair = only_pair({"chosen": "The sky is green and blue.", "rejected": "The sky is grey."})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("The sky is", " green and blue.", " grey.")


def test_two_texts_beside_an_unknown_column_are_not_guessed_at() -> None:
    row = {"query": "What is the sky?", "chosen": "The sky is blue.", "rejected": "The sky is green."}
    assert dropped_cause(row) == "no known prompt column"


def test_unknown_columns_are_refused_with_those_got_and_the_formats_known() -> None:
    with pytest.raises(PairsError) as refusal:
        pairs_from_rows([7, {"question": "Why?", "best": "So.", "\x1b[31m": 1, 5: 2}], source="mine")
    message = str(refusal.value)
    assert message.startswith("mine, row 2: columns 'question', 'best', '\\x1b[31m', <int> make none")
    assert all(form.name in message for form in FORMATS)
    assert "orca_dpo_pairs (question, chosen, rejected)" in message


def test_later_rows_of_unknown_columns_are_dropped_and_counted() -> None:
    assert dropped_cause({"text": "Once upon a time"}) == "unknown columns"


def test_the_formats_listed_first_are_not_hidden_by_those_after_them() -> None:
    for position, form in enumerate(FORMATS):
        assert not any(earlier.columns <= form.columns for earlier in FORMATS[:position]), form.name


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": parts(GOOD["prompt"])}]},
        {"prompt": parts("What is the boiling point", " of water?")},
        {"chosen": parts(GOOD["chosen"]), "rejected": parts(GOOD["rejected"])},
        {"chosen": [{"role": "assistant", "content": parts("100 degrees ", "Celsius.")}], "rejected": GOOD["rejected"]},
    ],
)
def test_text_in_parts_is_joined(row: dict[str, Any]) -> None:
    assert only_pair({**GOOD, **row}) == only_pair(GOOD)


def test_the_prompt_of_messages_is_the_conversation_before_both_answers() -> None:
    good, bad = assistant(GOOD["chosen"]), assistant(GOOD["rejected"])
    turns = [system("Be brief."), user("Hi"), assistant("Hello."), user(GOOD["prompt"])]
    expected = only_pair({**GOOD, "prompt": turns})
    assert len(expected.messages) == 4
    for chosen, rejected in ((GOOD["chosen"], GOOD["rejected"]), (good, bad), ([good], [bad])):
        assert only_pair({"messages": turns, "chosen": chosen, "rejected": rejected}) == expected
    whole = {"messages": [*turns, good], "chosen": [*turns, good], "rejected": [*turns, bad]}
    assert only_pair(whole) == expected
    assert only_pair({**GOOD, "messages": [user("Another question?"), good]}) == only_pair(GOOD)


HI = [user("Hi"), assistant("Hello.")]
BEFORE = "\n\nHuman: Hi\n\nAssistant: Hello."


@pytest.mark.parametrize("begin", ["", BEFORE])
@pytest.mark.parametrize("speaker", ["Human", "User"])
def test_a_transcript_in_one_text_stands_for_its_turns(begin: str, speaker: str) -> None:
    begin = begin.replace("Human", speaker)
    question = f"{begin}\n\n{speaker}: {GOOD['prompt']}"
    expected = only_pair({**GOOD, "prompt": [*(HI if begin else []), user(GOOD["prompt"])]})
    whole = {key: f"{question}\n\nAssistant: {GOOD[key]}" for key in ("chosen", "rejected")}
    assert only_pair(whole) == expected
    assert only_pair({**whole, "prompt": f"{question}\n\nAssistant:"}) == expected
    assert only_pair({**GOOD, "prompt": f"{question}\n\nAssistant:"}) == expected


def test_what_only_looks_like_a_transcript_stays_one_text() -> None:
    for prompt in (
        "Human: who am I?",
        "Human: Hi\n\nAssistant: Hello.\n\nWas that polite?",
        "Read this.\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye",
        "User: the word\nAssistant: another word",
    ):
        assert only_pair({**GOOD, "prompt": prompt}).messages == (user(prompt),)
    assert only_pair({**GOOD, "chosen": "Assistant: 100 degrees."}).chosen == "Assistant: 100 degrees."
    chat = {**GOOD, "chosen": "User: Hi\n\nAssistant: Hello!", "rejected": "User: Hi\n\nAssistant: Go away."}
    found = only_pair(chat)
    assert (found.messages, found.chosen, found.rejected) == ((user(GOOD["prompt"]),), chat["chosen"], chat["rejected"])


def test_transcripts_that_differ_before_the_answer_are_counted_as_such() -> None:
    texts = {key: f"Human: {key}?\n\nAssistant: {GOOD[key]}" for key in ("chosen", "rejected")}
    assert dropped_cause(texts) == "answers to different prompts"
