"""Untrusted models, through the command line: refused in one line, or harmless."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from splaser_plugin.cli.demo import MODEL_WHEEL, _wheel
from tests.builders import FLAGS
from tests.jobs.damage import (
    OTHER_SHARD,
    SHARD,
    UP,
    bomb,
    config_text,
    config_with,
    header_with,
    index_names,
    link_out,
    no_shard,
    overlap,
    pickled,
    refused,
    shard,
    stray_shard,
    truncate,
    twice,
)


@pytest.fixture
def model(tiny_folder, tmp_path):
    """A copy of the tiny model that may be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


FOR_ALL = {
    "overlapping offsets": (overlap, r"model\.safetensors: tensor '.*' (overlaps|leaves a hole)"),
    "offsets out of range": (
        header_with(data_offsets=[10**15, 10**15 + 8192]),
        r"safetensors: tensor '.*' leaves a hole before",
    ),
    "reversed offsets": (header_with(data_offsets=[8, 0]), rf"safetensors: tensor '{UP}': data_offsets \[8, 0\]"),
    "negative shape": (header_with(shape=[-64, -32]), rf"safetensors: tensor '{UP}': shape \[-64, -32\]"),
    "huge shape": (header_with(shape=[2**40, 2**40]), rf"safetensors: tensor '{UP}': shape \[1099511627776, "),
    "large shape": (header_with(shape=[2**20, 2**20]), rf"safetensors: tensor '{UP}': data_offsets .* takes 4398046"),
    "unknown dtype": (header_with(dtype="F33"), rf"safetensors: tensor '{UP}': dtype 'F33', expected one of BOOL"),
    "wrong dtype": (header_with(dtype="F64"), rf"safetensors: tensor '{UP}': data_offsets .* of F64 takes 16384"),
    "key twice": (twice, rf"safetensors: '{UP}' is there 2 times"),
    "truncated file": (truncate, r"model\.safetensors: tensor '.*' ends at byte \d+ of a file of \d+ bytes"),
    "absolute name in the index": (index_names("/etc/w.safetensors"), rf"index\.json: tensor '{UP}' is in '/etc/w"),
    "index out of the folder": (index_names("../w.safetensors"), rf"index\.json: tensor '{UP}' is in '\.\./w\.safet"),
    "index to a pickle": (index_names("pytorch_model.bin"), rf"index\.json: tensor '{UP}' is in 'pytorch_model\.bin'"),
    "tensor in another shard": (
        lambda folder: shard(folder, lambda where: {**where, UP: SHARD, "lm_head.weight": OTHER_SHARD}),
        "weight' is (not )?in it, against model",
    ),
    "missing shard": (no_shard, rf"{SHARD}: missing or a broken link"),
    "stray shard": (stray_shard, r"'model-00003-of-00003\.safetensors' is there, but not in model"),
    "link out of the folder": (
        link_out,
        r"model\.safetensors: is a link to '.*elsewhere\.safetensors', out of",
    ),
    "pickled weights": (pickled, r"pytorch_model\.bin'?[.:] [Pp]ickled weights can run code.*--allow-pickle"),
    "pickled code": (bomb, r"pytorch_model\.bin'?[.:] [Pp]ickled weights can run code.*--allow-pickle"),
    "config nested deeply": (config_text('{"a":' + "[" * 200_000), r"config\.json: its JSON is nested too deeply"),
    "config no object": (config_text("[]"), r"config\.json: its JSON is \[\], expected an object"),
    "config no text": (lambda folder: (folder / "config.json").write_bytes(b"\xff{}"), r"config\.json: not valid JSON"),
}
FOR_LASER = {
    "code of its own": (
        config_with(model_type="theirs", auto_map={"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.M"}),
        "contains custom code",
    ),
    "other file for the weights": (
        config_with(transformers_weights="other.safetensors"),
        r"config\.json: transf",
    ),
    "a billion layers": (config_with(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, but there are only"),
    "more layers than weights": (config_with(num_hidden_layers=3), r"no weights for 'model\.layers\.2\."),
    "huge hidden size": (config_with(hidden_size=2**40), "can't be loaded as a causal language model"),
    "negative heads": (config_with(num_attention_heads=-4), "can't be loaded as a causal language model"),
    "no heads": (config_with(num_attention_heads=0), "can't be loaded as a causal language model"),
    "text for a number": (config_with(hidden_size="\x1b[31mmany"), "can't be loaded as a causal language model"),
    "unknown kind": (config_with(model_type="nonsense"), "can't be loaded as a causal language model"),
    "adapter beside the model": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        r"adapter_config\.json: an adapter beside the model",
    ),
    "generation config nested deeply": (
        lambda folder: (folder / "generation_config.json").write_text("[" * 200_000),
        r"generation_config\.json: its JSON is nested too deeply",
    ),
}


def spectra(scan):
    return {matrix["name"]: matrix["spectrum"] for matrix in scan["matrices"]}


def peak_bytes():
    resource = pytest.importorskip("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("command", ["scan", "laser"])
@pytest.mark.parametrize(("damage", "message"), FOR_ALL.values(), ids=FOR_ALL.keys())
@pytest.mark.slow
def test_damaged_weights_are_refused_in_one_line_by_file_and_tensor(
    splaser, model, pairs_file, tmp_path, command, damage, message
):
    damage(model)
    before = peak_bytes()
    if command == "scan":
        output = tmp_path / "scan.json"
        outcome = splaser("scan", model, "-o", output)
    else:
        output = tmp_path / "out"
        outcome = splaser("laser", model, "--pairs", pairs_file, "-o", output, *FLAGS)
    refused(outcome, message, output)
    assert peak_bytes() - before < 300 * 2**20
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(("damage", "message"), FOR_LASER.values(), ids=FOR_LASER.keys())
@pytest.mark.slow
def test_what_only_a_loaded_model_is_damaged_by_is_refused_in_one_line(
    splaser, model, pairs_file, tmp_path, damage, message
):
    damage(model)
    before = peak_bytes()
    outcome = splaser("laser", model, "--pairs", pairs_file, "-o", tmp_path / "out", *FLAGS)
    refused(outcome, message, tmp_path / "out")
    assert peak_bytes() - before < 300 * 2**20


def test_code_of_a_model_is_never_run(splaser, model, pairs_file, tmp_path):
    mark = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nfrom transformers import LlamaConfig as Config\n"
    (model / "theirs.py").write_text(code)
    config_with(model_type="theirs", auto_map={"AutoConfig": "theirs.Config"})(model)
    outcome = splaser("laser", model, "--pairs", pairs_file, "-o", tmp_path / "out", *FLAGS)
    refused(outcome, "contains custom code", tmp_path / "out")
    assert not mark.exists()


@pytest.mark.slow
def test_pickled_weights_are_read_where_they_are_allowed(splaser, model, pairs_file, tmp_path):
    code, _, stderr = splaser("scan", model, "-o", tmp_path / "plain.json")
    assert code == 0, stderr
    pickled(model)
    code, _, stderr = splaser("scan", model, "-o", tmp_path / "scan.json", "--allow-pickle")
    assert code == 0, stderr
    plain, scan = (json.loads((tmp_path / name).read_text()) for name in ("plain.json", "scan.json"))
    assert spectra(scan) == spectra(plain)
    out = tmp_path / "out"
    code, _, stderr = splaser("laser", model, "--pairs", pairs_file, "-o", out, "--allow-pickle", *FLAGS)
    assert code == 0, stderr
    apply = ["apply", out / "recipe.json", model, "-o", tmp_path / "again", "--device", "cpu"]
    refused(splaser(*apply), r"pytorch_model\.bin: pickled weights", tmp_path / "again")
    code, _, stderr = splaser(*apply, "--allow-pickle")
    assert code == 0, stderr


@pytest.mark.slow
def test_a_pickle_that_is_code_explodes_nowhere_even_where_pickles_are_allowed(splaser, model, pairs_file, tmp_path):
    bomb(model)
    for command in (["scan"], ["laser", "--pairs", pairs_file, *FLAGS]):
        output = tmp_path / "output"
        outcome = splaser(command[0], model, *command[1:], "-o", output, "--allow-pickle")
        refused(outcome, "can't be loaded as a causal language model", output)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.real
@pytest.mark.parametrize("kept_bytes", [0, 3, 100, 2_000_000], ids=str)
@pytest.mark.parametrize("command", ["scan", "laser"])
def test_a_truncated_gguf_file_is_refused_in_one_line(splaser, pairs_file, tmp_path, command, kept_bytes):
    whole = next(_wheel(*MODEL_WHEEL).glob("*.gguf"))
    with whole.open("rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(kept_bytes))
    arguments = ["--pairs", pairs_file, *FLAGS] if command == "laser" else []
    outcome = splaser(command, tmp_path / "cut.gguf", "-o", tmp_path / "output", *arguments)
    refused(outcome, r"cut\.gguf: can't be loaded as a causal language model", tmp_path / "output")


@pytest.mark.parametrize("part", ["00001", "00002"])
def test_a_part_of_a_split_gguf_file_is_refused_with_how_to_merge_it(splaser, tmp_path, part):
    file = tmp_path / f"model-{part}-of-00002.gguf"
    file.write_bytes(b"GGUF")
    outcome = splaser("scan", file, "-o", tmp_path / "output")
    refused(outcome, rf"model-{part}-of-00002\.gguf: a part of a split file.*--merge FIRST_PART", tmp_path / "output")
