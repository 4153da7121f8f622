"""Where pairs come from: published data sets, long files, and files that are damaged or missing."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splaser_plugin.data import sources as pair_sources
from splaser_plugin.data.pairs import load_pairs
from splaser_plugin.data.sources import PUBLISHED
from splaser_plugin.errors import PairsError
from tests.builders import run_python, save_rows
from tests.data.rows import CSV, GOOD, LINE, check_pair_set


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
    save_rows(folder / "train_sft-00000-of-00001.jsonl", [{**GOOD, "chosen": "Not this split."}])
    save_rows(folder / "train_prefs-00000-of-00001.jsonl", [GOOD])
    monkeypatch.chdir(tmp_path)
    pair_set = load_pairs(source)
    assert pair_set.source == "HuggingFaceH4/ultrafeedback_binarized"
    assert [pair.chosen for pair in pair_set] == [GOOD["chosen"]]


@pytest.mark.slow
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
        save_rows(file, rows)
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


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


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


def test_a_json_array_beyond_the_limit_is_refused_with_the_advice_to_convert_it(
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


@pytest.mark.slow
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
        check_pair_set(load_pairs(write_bytes(file, b"".join(parts))))
    except PairsError as error:
        assert str(file) in str(error)
