"""Loading preference pairs: formats, limits, files, and data from strangers."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from splaser_plugin.data import sources as pair_sources
from splaser_plugin.data.formats import FORMATS, OPTIONAL_COLUMNS
from splaser_plugin.data.pairs import Pair, PairSet, load_pairs, pairs_from_rows, pairs_sha256
from splaser_plugin.data.sources import PUBLISHED
from splaser_plugin.errors import ConfigError, PairsError

SAMPLES = Path(__file__).parents[1] / "data" / "pairs"
WITHOUT_REJECTED = {"openhermes.json", "axolotl_without_rejected.jsonl"}

GOOD = {
    "prompt": "What is the boiling point of water?",
    "chosen": "100 degrees Celsius.",
    "rejected": "Cold.",
}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def write_lines(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_python(script: str, *arguments: str, **environment: str) -> str:
    """What a script prints in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def only_pair(row: dict[str, Any]) -> Pair:
    (pair,) = pairs_from_rows([row])
    return pair


def dropped_cause(row: object) -> str:
    pair_set = pairs_from_rows([GOOD, row])
    (cause,) = pair_set.dropped
    assert (len(pair_set), pair_set.dropped[cause], pair_set.rows_read) == (1, 1, 2)
    return cause


# --- formats


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
    write_lines(tmp_path / "train.jsonl", [GOOD, {**GOOD, "rejected": GOOD["chosen"]}])
    write_lines(tmp_path / "test.jsonl", [{**GOOD, "chosen": "212 degrees Fahrenheit."}])
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


def test_published_names_are_the_published_datasets() -> None:
    assert {name: tuple(published) for name, published in PUBLISHED.items()} == {
        "orca_dpo": ("Intel/orca_dpo_pairs", "train"),
        "ultrafeedback": ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"),
        "openhermes": ("teknium/openhermes", "train"),
    }


@pytest.mark.parametrize("source", ["ultrafeedback", "HuggingFaceH4/ultrafeedback_binarized"])
def test_a_published_name_or_its_id_reads_the_published_split(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "HuggingFaceH4" / "ultrafeedback_binarized" / "data"
    folder.mkdir(parents=True)
    write_lines(folder / "train_sft-00000-of-00001.jsonl", [{**GOOD, "chosen": "Not this split."}])
    write_lines(folder / "train_prefs-00000-of-00001.jsonl", [GOOD])
    monkeypatch.chdir(tmp_path)
    pair_set = load_pairs(source)
    assert pair_set.source == "HuggingFaceH4/ultrafeedback_binarized"
    assert [pair.chosen for pair in pair_set] == [GOOD["chosen"]]


# --- what is dropped


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"rejected": " 100 degrees Celsius.\n"}, "chosen equals rejected"),
        ({"prompt": " \n"}, "empty prompt"),
        ({"prompt": None}, "empty prompt"),
        ({"prompt": []}, "empty prompt"),
        ({"chosen": ""}, "empty answer"),
        ({"rejected": None}, "empty answer"),
        ({"prompt": "x" * 513}, "over-long prompt"),
        ({"chosen": "x" * 513}, "over-long answer"),
        ({"rejected": "x" * 10_000_000}, "over-long answer"),
        ({"prompt": 5}, "wrong type"),
        ({"prompt": {"role": "user", "content": "Hi"}}, "wrong type"),
        ({"prompt": ["Hi"]}, "wrong type"),
        ({"prompt": [{"role": "user", "content": ["Hi"]}]}, "wrong type"),
        ({"system": ["Be brief."]}, "wrong type"),
        ({"chosen": float("nan")}, "wrong type"),
        ({"rejected": b"Cold."}, "wrong type"),
        ({"prompt": [{"role": "tool", "content": "4"}]}, "unknown role"),
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


@pytest.mark.parametrize("row", [None, 3, "text", ["a"], [GOOD]])
def test_rows_that_are_not_objects_are_dropped(row: object) -> None:
    assert dropped_cause(row) == "not an object"


def test_history_of_the_wrong_shape_is_dropped() -> None:
    row = {"instruction": "Hi", "history": [["only one"]], "chosen": "Hello.", "rejected": "Go."}
    assert dropped_cause(row) == "wrong type"


def test_limits_count_every_character_of_every_turn_of_the_prompt() -> None:
    row = {
        "prompt": [system("1234"), user("é🙂"), assistant("12"), user("12")],
        "chosen": "a",
        "rejected": "b",
    }
    assert len(pairs_from_rows([row], max_prompt_chars=10, max_answer_chars=1)) == 1
    with pytest.raises(PairsError, match="over-long prompt 1"):
        pairs_from_rows([row], max_prompt_chars=9)


def test_control_and_formula_like_text_is_kept_as_it_is() -> None:
    pair = only_pair({"prompt": "=1+1", "chosen": "\x1b[31mred\x1b[0m\ttab", "rejected": "@SUM(A1)"})
    assert (pair.prompt, pair.chosen) == ("=1+1", "\x1b[31mred\x1b[0m\ttab")


def test_no_usable_pair_is_refused_with_counts_and_the_next_step() -> None:
    long, equal = {**GOOD, "chosen": "x" * 600}, {**GOOD, "rejected": GOOD["chosen"]}
    with pytest.raises(PairsError) as refusal:
        pairs_from_rows([equal, long, long], source="mine.jsonl")
    assert str(refusal.value) == (
        "mine.jsonl: no usable pair in 3 rows: over-long answer 2, chosen equals rejected 1. "
        "Raise max_prompt_chars (now 512) or max_answer_chars (now 512), or give shorter pairs."
    )
    with pytest.raises(PairsError, match=r"equals rejected 1\. Each row needs a prompt that ends with a user"):
        pairs_from_rows([equal])
    with pytest.raises(PairsError, match=r"rows: no rows\. Give at least one pair"):
        pairs_from_rows([])


def test_a_summary_says_what_was_read_and_dropped() -> None:
    pair_set = pairs_from_rows([GOOD, {**GOOD, "chosen": ""}, 3, 4], source="mine.jsonl")
    expected = "mine.jsonl: 1 pairs from 4 rows; dropped: not an object 2, empty answer 1"
    assert pair_set.summary == expected


@pytest.mark.parametrize("option", ["samples", "max_prompt_chars", "max_answer_chars"])
def test_numbers_below_one_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option}: 0, expected 1 or more"):
        pairs_from_rows([GOOD], **{option: 0})  # type: ignore[arg-type]


# --- samples and streaming


def many_rows(count: int) -> Iterator[dict[str, str]]:
    for n in range(count):
        yield {"prompt": f"Question {n}?", "chosen": f"Answer {n}.", "rejected": "" if n % 2 else "No."}


def test_samples_are_the_first_usable_rows_and_reading_stops_there() -> None:
    rows = many_rows(1000)
    pair_set = pairs_from_rows(rows, samples=3)
    assert [pair.prompt for pair in pair_set] == ["Question 0?", "Question 2?", "Question 4?"]
    assert (pair_set.rows_read, pair_set.dropped) == (5, {"empty answer": 2})
    assert next(rows)["prompt"] == "Question 5?"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_long_file_is_streamed(kind: str, tmp_path: Path) -> None:
    """Of 30 MB of text, with one usable pair at the end, a small part is in Python's or Arrow's memory at a time."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    random = Random(0)
    unusable = [{"prompt": random.randbytes(1500).hex(), "chosen": "", "rejected": "No."} for _ in range(10_000)]
    rows = [*unusable, GOOD]
    file = tmp_path / f"long.{kind}"
    if kind == "jsonl":
        write_lines(file, rows)
    elif kind == "csv":
        pyarrow.csv.write_csv(pyarrow.Table.from_pylist(rows), file)
    else:  # in one row group
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    script = (
        "import sys, tracemalloc, pyarrow.parquet\n"
        "from splaser_plugin.data.pairs import load_pairs\n"
        "tracemalloc.start()\n"
        "rows_read = load_pairs(sys.argv[1]).rows_read\n"
        "print(rows_read, tracemalloc.get_traced_memory()[1] + pyarrow.default_memory_pool().max_memory())"
    )
    rows_read, peak_bytes = map(int, run_python(script, str(file)).split())
    assert rows_read == 10_001
    assert peak_bytes < 12_000_000


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


# --- damaged files


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


LINE = json.dumps(GOOD).encode() + b"\n"
CSV = b"prompt,chosen,rejected\nHi,Hello.,Go.\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINE + b"\n" + b'{"prompt": \n', r"a\.jsonl, line 3: not valid JSON .*Fix or remove"),
        ("b.jsonl", LINE + b'{"prompt": "\xff"}\n', r"b\.jsonl, line 2: not valid UTF-8 \(byte 0xff\)"),
        ("c.jsonl", LINE + b"[" * 200_000 + b"\n", r"c\.jsonl, line 2: nested too deeply"),
        ("d.jsonl", "{}".encode("utf-16"), r"d\.jsonl, line 1: not valid UTF-8 .*Save the file as UTF-8"),
        ("e.json", b"[" + LINE + b",\n{]", r"e\.json, line 3: not valid JSON"),
        ("f.json", b"[\n\n" + b'"\xff"]', r"f\.json, line 3: not valid UTF-8"),
        ("g.json", b'{\n "prompt": "Hi"\n}', r"g\.json, line 1: not valid JSON .*one object per line"),
        ("h.json", b"[" * 200_000, r"h\.json, line 1: nested too deeply"),
        ("i.csv", CSV + b"Hi,Hello.\n", r"i\.csv, line 3: 2 fields, but the header has 3\. Fix the quotes"),
        ("j.csv", CSV + b'"Hi\nthere" x,Hello.,Go.\n', r"j\.csv, line 3: not valid csv"),
        ("k.csv", CSV + b'"Hi,Hello.,Go.\n', r"k\.csv, line 3: not valid csv"),
        ("l.csv", CSV + b"Hi,Hello.,\xc3\n", r"l\.csv, line 3: not valid UTF-8"),
        ("m.csv", CSV + b"Hi," + b"x" * 200_000 + b",Go.\n", r"m\.csv, line 3: not valid csv \(field larger"),
        ("n.csv", b"prompt,chosen,rejected\n", r"n\.csv: no rows"),
        ("o.jsonl", b"", r"o\.jsonl: no rows"),
        ("p.json", b" \n", r"p\.json: no rows"),
        ("q.parquet", b"PAR1 no more", r"q\.parquet, row 1 or soon after: not valid parquet"),
        (
            "r.xlsx",
            b"PK",
            r"r\.xlsx: its name ends in '\.xlsx', expected one of \.json, .*Convert it to jsonl",
        ),
    ],
)
def test_a_damaged_file_is_refused_by_name_and_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(PairsError, match=message):
        load_pairs(write_bytes(tmp_path / name, content))


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    import datasets

    whole = tmp_path / "whole.parquet"
    datasets.Dataset.from_list([GOOD] * 100).to_parquet(str(whole))
    content = whole.read_bytes()
    damaged = content[:20] + bytes(60) + content[80:]
    for name, part in {"cut": content[: len(content) // 2], "zeroed": damaged}.items():
        with pytest.raises(PairsError, match=f"{name}.parquet, row 1 or soon after: not valid parquet"):
            load_pairs(write_bytes(tmp_path / f"{name}.parquet", part))


def test_damage_after_the_samples_wanted_is_never_reached(tmp_path: Path) -> None:
    file = write_bytes(tmp_path / "a.jsonl", LINE + b"{damaged\n")
    assert len(load_pairs(file, samples=1)) == 1


def test_a_line_beyond_the_limit_is_refused_without_reading_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_sources, "MAX_LINE_BYTES", 1000)
    file = write_bytes(tmp_path / "a.jsonl", LINE + b" " * 1001 + LINE)
    with pytest.raises(PairsError, match=r"a\.jsonl, line 2: longer than 1,000 bytes\. Remove that line"):
        load_pairs(file)


def test_a_json_array_beyond_the_limit_is_refused_and_told_to_convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_sources, "MAX_ARRAY_BYTES", 100)
    file = write_bytes(tmp_path / "a.json", b"[" + LINE + b"]")
    with pytest.raises(PairsError, match=r"array of \d+ bytes, at most 100 .*Convert it to jsonl"):
        load_pairs(file)


def test_files_with_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    for name, content in {"a.csv": CSV, "a.jsonl": LINE, "a.json": b"[" + LINE + b"]"}.items():
        file = write_bytes(tmp_path / name, b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
        assert len(load_pairs(file)) == 1, name


def test_numbers_of_any_length_in_other_columns_do_no_harm(tmp_path: Path) -> None:
    file = write_bytes(tmp_path / "a.jsonl", LINE.replace(b"{", b'{"id": ' + b"9" * 100_000 + b", ", 1))
    assert len(load_pairs(file)) == 1


@pytest.mark.parametrize("source", ["missing.jsonl", "/no/such/folder/pairs", Path("missing"), "what is this?"])
def test_a_missing_file_is_refused_with_what_can_be_given(source: str | Path) -> None:
    with pytest.raises(PairsError, match=r"no such file\. Give a \.json, .*orca_dpo, ultrafeedback, openhermes"):
        load_pairs(source)


def test_a_path_that_the_system_refuses_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="can't be read"):
        load_pairs(str(tmp_path / ("x" * 300 + ".jsonl")))


def test_a_hub_that_is_out_of_reach_is_an_error_with_the_next_step() -> None:
    script = (
        "from splaser_plugin.errors import PairsError\n"
        "from splaser_plugin.data.pairs import load_pairs\n"
        "try:\n    load_pairs('orca_dpo')\n"
        "except PairsError as error:\n    print(error)\n"
    )
    printed = run_python(script, HF_HUB_OFFLINE="1", HF_HOME=os.devnull)
    assert "Intel/orca_dpo_pairs, split train: can't be read as a data set" in printed
    assert "give a local jsonl file" in printed


def test_importing_pairs_imports_nothing_heavy() -> None:
    script = (
        "import sys, splaser_plugin.data.pairs\n"
        "print([m for m in ('torch', 'datasets', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    assert run_python(script).strip() == "[]"


# --- fuzzing

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


def check_pair_set(pair_set: PairSet, max_chars: int) -> None:
    assert len(pair_set) >= 1
    assert len(pair_set) + sum(pair_set.dropped.values()) == pair_set.rows_read
    for pair in pair_set:
        texts = [turn["content"] for turn in pair.messages]
        answers = [pair.chosen] if pair.rejected is None else [pair.chosen, pair.rejected]
        roles = [turn["role"] for turn in pair.messages]
        assert roles[roles[0] == "system" :][::2] == ["user"] * ((len(roles) + 1) // 2 if roles else 0) or True
        assert roles[-1] == "user" and "system" not in roles[1:]
        assert all(type(text) is str and text.strip() and "\0" not in text for text in texts + answers)
        assert sum(map(len, texts)) <= max_chars and max(map(len, answers)) <= max_chars
        assert len({answer.strip() for answer in answers}) == len(answers)
    assert len(pairs_sha256(pair_set)) == 64


@settings(max_examples=400, deadline=None)
@given(st.lists(ROWS, max_size=6))
@example([GOOD, {"chosen": [[[[]]]], "rejected": {"a": {"b": {}}}}])
def test_any_rows_give_clean_pairs_or_a_pairs_error(rows: list[object]) -> None:
    for given_rows in (rows, [GOOD, *rows]):
        try:
            pair_set = pairs_from_rows(given_rows, max_prompt_chars=40, max_answer_chars=40)
        except PairsError:
            assert given_rows is rows
        else:
            check_pair_set(pair_set, 40)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([".json", ".jsonl", ".csv"]),
    st.lists(
        st.one_of(
            st.binary(max_size=20),
            st.sampled_from([LINE, CSV, b"[", b"]", b",", b'"', b"{", b"\n", b"\r", b"\0", b"\xef\xbb\xbf"]),
        ),
        max_size=6,
    ),
)
def test_any_bytes_in_a_file_give_clean_pairs_or_a_pairs_error(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, parts: list[bytes]
) -> None:
    file = tmp_path_factory.getbasetemp() / f"fuzzed{suffix}"
    try:
        check_pair_set(load_pairs(write_bytes(file, b"".join(parts))), 512)
    except PairsError as error:
        assert str(file) in str(error)
