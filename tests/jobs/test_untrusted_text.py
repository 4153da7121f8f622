"""Untrusted names, texts and files: nothing of them reaches the terminal raw, and none ends in a traceback."""

from __future__ import annotations

import copy
import json
import re
import subprocess

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splaser_plugin.artifacts.recipe import Recipe
from splaser_plugin.errors import PairsError, RecipeError, SplaserError
from splaser_plugin.files.json import read_json
from splaser_plugin.files.text import printable
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.scanning.selection import choose
from splaser_plugin.scanning.spectrum_format import load_scan
from tests.builders import FLAGS, SPLASER

HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202etxt.exe\u2066\x9b31m\x00\x7f\r"
# what a terminal may get: printable characters, line ends, and the colours that rich itself writes
CLEAN = re.compile(r"(?:[^\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202f\u2066-\u2069]|\n)*")


def is_clean(text):
    return CLEAN.fullmatch(text) is not None


@given(st.text())
def test_printable_text_has_one_printable_line_and_printable_text_is_left_alone(text):
    assert printable(text).isprintable()
    assert printable(text) == text or not text.isprintable()


def test_printable_text_is_spelled_out_and_shortened():
    assert printable("a\x1b[31m\u202e\n\ud800 é 日本") == "a\\x1b[31m\\u202e\\n\\ud800 é 日本"
    assert printable("x" * 10**7) == "x" * 2000 + " ... " + "x" * 2000


def save_named(folder, name):
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.0.{name}.weight": torch.randn(24, 48, generator=generator)}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return folder


def run(*arguments, cwd):
    """The command in a process of its own; its streams as bytes, so that nothing is made presentable on the way."""
    command = [*SPLASER, *map(str, arguments)]
    ended = subprocess.run(command, cwd=cwd, capture_output=True, check=False)
    return ended.returncode, ended.stdout.decode(), ended.stderr.decode()


@pytest.mark.slow
def test_a_matrix_with_a_hostile_name_is_scanned_and_chosen_without_sending_it_to_the_terminal(tmp_path):
    hostile = "mlp.up\x1b[2J\u202e\x9b[red]_proj"
    model = save_named(tmp_path / "model", hostile)
    code, printed, stderr = run("scan", model, "-o", "scan.json", "--top-json", "top.json", "--json", cwd=tmp_path)
    assert code == 0, stderr
    assert "mlp.up\\x1b[2J\\u202e\\x9b[red]_proj" in stderr
    assert is_clean(stderr)
    assert is_clean(printed)
    assert hostile in json.loads(printed)["matrices"][0]["name"]
    for command in (["axolotl", "-o", "c.yml"], ["peft", "-o", "adapter_config.json"], ["spectrum", "-o", "s.json"]):
        code, printed, stderr = run("emit", command[0], "scan.json", *command[1:], cwd=tmp_path)
        assert is_clean(stderr), stderr
        assert "Traceback" not in stderr
        assert code in (0, 1)


@pytest.mark.slow
def test_a_model_whose_folder_has_a_hostile_name_is_scanned_without_sending_it_to_the_terminal(tmp_path):
    name = "m\x1b]0;owned\x07\u202e"
    save_named(tmp_path / name, "mlp.up_proj")
    code, _, stderr = run("scan", f"./{name}", "-o", f"{name}.json", cwd=tmp_path)
    assert code == 0, stderr
    assert is_clean(stderr)
    assert f"{printable(name)}.json" in stderr
    for arguments in (["scan", f"./{name}x"], ["laser", f"./{name}x", "--pairs", f"./{name}.jsonl", "-o", "out"]):
        code, _, stderr = run(*arguments, cwd=tmp_path)
        assert code == 1
        assert is_clean(stderr), stderr
        assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json"])
@pytest.mark.slow
def test_hostile_pairs_are_scored_or_dropped_without_reaching_the_terminal(splaser, tiny_folder, tmp_path, kind):
    texts = [HOSTILE.replace("\x00", ""), "=cmd|'/c calc'!A0", "\x1b[31mred\x1b[0m", "[bold]markup[/bold]"]
    rows = [{"prompt": text, "chosen": text + " yes", "rejected": text + " no"} for text in texts]
    file = tmp_path / f"p\x1b[31m.{kind}"
    if kind == "csv":
        quoted = [",".join('"' + value.replace('"', '""') + '"' for value in row.values()) for row in rows]
        file.write_text("prompt,chosen,rejected\n" + "\n".join(quoted) + "\n", newline="")
    elif kind == "json":
        file.write_text(json.dumps([*rows, HOSTILE, None, {"prompt": 1, "chosen": HOSTILE, "rejected": HOSTILE}]))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, printed, stderr = splaser("laser", tiny_folder, "--pairs", file, "-o", tmp_path / "out", "--json", *FLAGS)
    assert code == 0, stderr
    assert is_clean(stderr)
    assert is_clean(printed)
    assert "4 pairs from" in stderr
    if kind == "json":
        assert "dropped: not an object 2, wrong type 1" in stderr
    assert HOSTILE[:4] in json.loads((tmp_path / "out" / "results.json").read_text())["texts"]["search"][0]["prompt"]


def test_a_prompt_in_a_message_is_escaped(tokenizer):
    prompt = "\x1b[2J\u202e" + "word " * 600
    with pytest.raises(PairsError, match="a prompt of") as refusal:
        Prompter(tokenizer, context=512).tokens([{"role": "user", "content": prompt}])
    assert is_clean(str(refusal.value))
    assert r"\x1b[2J\u202eword" in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "\xff"}\n', "line 1: not valid UTF-8"),
        (b'{"prompt": "a"}\n\x00\n', "row 1: columns 'prompt' make none of the known formats"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"\x1b[31m": 1}\n', r"line 1: not valid JSON"),
        (b'{"\\u001b[31m": 1}\n', r"'\x1b[31m' make none of the known formats"),
        (json.dumps({"prompt": "\x1b" * 10**7, "chosen": "a", "rejected": "b"}).encode(), "over-long prompt 1"),
        (json.dumps({"\x1b" * 10**7: "a"}).encode(), "make none of the known formats"),
        (b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}\n', "invalid characters 1"),
        (b'{"prompt": "a\\u0000", "chosen": "a", "rejected": "b"}\n', "invalid characters 1"),
    ],
    ids=["utf8", "nul line", "nested", "raw escape", "column", "10 MB text", "10 MB column", "surrogate", "nul"],
)
@pytest.mark.slow
def test_damaged_pairs_are_one_clean_line_through_the_command_line(splaser, tiny_folder, tmp_path, content, message):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(content)
    code, printed, stderr = splaser("laser", tiny_folder, "--pairs", file, "-o", tmp_path / "out", *FLAGS)
    assert code == 1
    assert printed == ""
    assert message in stderr
    assert is_clean(stderr)
    assert len(stderr.splitlines()) == 1
    assert len(stderr) < 5000
    assert "Traceback" not in stderr


def test_a_file_beyond_the_limit_is_refused_without_reading_it_whole(tmp_path):
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(RecipeError, match=r"huge\.json: more than 100,000,000 bytes"):
        read_json(tmp_path / "huge.json", RecipeError)


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"\xff", "not JSON"), (b"[" * 200_000, "nested too deeply"), (b"9" * 5000, "not JSON"), (b"", "not JSON")],
    ids=["utf8", "nested", "number", "empty"],
)
@pytest.mark.slow
def test_damaged_recipes_and_scans_are_one_clean_line(splaser, tiny_folder, tmp_path, text, message):
    (tmp_path / "foreign.json").write_bytes(text)
    for arguments in (["apply", "FILE", tiny_folder, "-o", tmp_path / "out"], ["emit", "peft", "FILE", "-o", "a.json"]):
        code, _, stderr = splaser(
            *[tmp_path / "foreign.json" if argument == "FILE" else argument for argument in arguments]
        )
        assert code == 1
        assert message in stderr
        assert is_clean(stderr)
        assert len(stderr.splitlines()) == 1


WRONG = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)  # fmt: skip


def places(value, path=()):
    """The path of every value inside, lists' by their first two items."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, content in inside:
        yield (*path, key)
        yield from places(content, (*path, key))


def damaged(draw, stored):
    """`stored` with one value replaced by one of another kind, or taken out."""
    stored = copy.deepcopy(stored)
    *way, last = draw(st.sampled_from(sorted(places(stored), key=repr)))
    inner = stored
    for key in way:
        inner = inner[key]
    if draw(st.booleans()) and isinstance(inner, dict):
        del inner[last]
    else:
        inner[last] = draw(WRONG)
    return stored


@pytest.fixture(scope="module")
def whole_scan(tmp_path_factory):
    from splaser_plugin.scanning.scan import scan as run_scan
    from tests.builders import tiny_llama

    return run_scan(tiny_llama()).to_dict()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_scan_with_any_value_wrong_is_refused_or_chosen_from(whole_scan, tmp_path, data):
    file = tmp_path / "scan.json"
    file.write_text(json.dumps(damaged(data.draw, whole_scan)))
    try:
        selection = choose(load_scan(file), top=2, by=data.draw(st.sampled_from(["snr", "snr_ratio", "rank"])))
        assert all(isinstance(matrix.name, str) for matrix in selection.matrices)
    except SplaserError as error:
        assert printable(str(error))


@pytest.fixture(scope="module")
def whole_recipe():
    step = {"name": "model.layers.0.mlp.up_proj", "rank": 3, "edge": "mp", "threshold": 1.5, "shape": [64, 32]}
    return {
        "schema": "splaser.recipe/1",
        "model": "m",
        "weights": "0" * 64,
        "dtype": "float32",
        "steps": [step, {**step, "name": "model.layers.1.mlp.up_proj"}],
        "scores": {"baseline": 0.1, "final": 0.2},
        "settings": {"include": [], "exclude": [], "adapter": "", "save": "dense"},
        "versions": {"python": "3.11"},
    }


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_recipe_with_any_value_wrong_is_refused_or_applied(whole_recipe, tiny_model, tmp_path, data):
    from splaser_plugin.jobs.apply import apply
    from splaser_plugin.weights.in_memory import Weights

    file = tmp_path / "recipe.json"
    stored = {**whole_recipe, "weights": Weights(tiny_model).identity()}
    file.write_text(json.dumps(damaged(data.draw, stored)))
    try:
        recipe = Recipe.load(file)
        apply(recipe, tiny_model)
    except SplaserError as error:
        assert printable(str(error))
