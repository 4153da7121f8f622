"""Models, adapters and embedders from strangers, through the command line: refused in one line, or harmless."""

from __future__ import annotations

import json
import pickle
import re
import resource
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model

from splaser_plugin.checkpoints.trust import check_adapter_folder
from splaser_plugin.cli.demo import MODEL_WHEEL, _wheel
from splaser_plugin.errors import CheckpointError
from splaser_plugin.weights.loading import load_model
from tests.builders import FLAGS, tiny_llama

UP = "model.layers.0.mlp.up_proj.weight"
SHARD = "model-00001-of-00002.safetensors"
OTHER_SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


class Bomb:
    """Unpickled by anything but a reader of weights only, it leaves a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.fixture
def model(tiny_folder, tmp_path):
    """A copy of the tiny model that may be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def rewrite_header(file, change):
    """Write a safetensors file again with a changed header; `change` gets it as a dict, or returns its text."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    text = change(header) or json.dumps(header)
    file.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + content[end:])


def header_with(**fields):
    def damage(folder):
        rewrite_header(folder / "model.safetensors", lambda header: header[UP].update(fields))

    return damage


def overlap(folder):
    def change(header):
        first = min((entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"), key=tuple)
        size = header[UP]["data_offsets"][1] - header[UP]["data_offsets"][0]
        header[UP]["data_offsets"] = [first[0] + 4, first[0] + 4 + size]

    rewrite_header(folder / "model.safetensors", change)


def twice(folder):
    rewrite_header(
        folder / "model.safetensors",
        lambda header: json.dumps(header)[:-1] + f', "{UP}": {json.dumps(header[UP])}}}',
    )


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def shard(folder, weight_map=dict):
    """Turn the model into two shards with an index, whose weight map `weight_map` may change."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {SHARD: names[::2], OTHER_SHARD: names[1::2]}
    for name, half in halves.items():
        safetensors.torch.save_file({each: tensors[each] for each in half}, folder / name, metadata={"format": "pt"})
    where = {each: name for name, half in halves.items() for each in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map(where)}))


def index_names(name):
    return lambda folder: shard(folder, lambda where: {**where, UP: name})


def no_shard(folder):
    shard(folder)
    (folder / SHARD).unlink()


def stray_shard(folder):
    shard(folder)
    shutil.copy(folder / SHARD, folder / "model-00003-of-00003.safetensors")


def link_out(folder):
    shutil.move(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to("../elsewhere.safetensors")


def pickled(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def bomb(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({UP: Bomb(folder.parent / "exploded")}))


def config_with(**values):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return damage


def config_text(text):
    return lambda folder: (folder / "config.json").write_text(text)


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


def refused(outcome, message, output):
    code, printed, told = outcome
    last = told.strip().splitlines()[-1]
    assert code == 1, told
    assert printed == ""
    assert "Traceback" not in told
    assert [line for line in told.splitlines() if "Error" in line] == [last]
    assert last.isprintable()
    assert re.search(message, last), last
    assert not output.exists()


def spectra(scan):
    return {each["name"]: each["spectrum"] for each in scan["matrices"]}


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("command", ["scan", "laser"])
@pytest.mark.parametrize(("damage", "message"), FOR_ALL.values(), ids=FOR_ALL.keys())
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


def test_pickled_weights_are_read_where_they_are_allowed(splaser, model, pairs_file, tmp_path):
    code, _, told = splaser("scan", model, "-o", tmp_path / "plain.json")
    assert code == 0, told
    pickled(model)
    code, _, told = splaser("scan", model, "-o", tmp_path / "scan.json", "--allow-pickle")
    assert code == 0, told
    plain, scan = (json.loads((tmp_path / name).read_text()) for name in ("plain.json", "scan.json"))
    assert spectra(scan) == spectra(plain)
    out = tmp_path / "out"
    code, _, told = splaser("laser", model, "--pairs", pairs_file, "-o", out, "--allow-pickle", *FLAGS)
    assert code == 0, told
    apply = ["apply", out / "recipe.json", model, "-o", tmp_path / "again", "--device", "cpu"]
    refused(splaser(*apply), r"pytorch_model\.bin: pickled weights", tmp_path / "again")
    code, _, told = splaser(*apply, "--allow-pickle")
    assert code == 0, told


def test_a_pickle_that_is_code_explodes_nowhere_even_where_pickles_are_allowed(splaser, model, pairs_file, tmp_path):
    bomb(model)
    for command in (["scan"], ["laser", "--pairs", pairs_file, *FLAGS]):
        output = tmp_path / "output"
        outcome = splaser(command[0], model, *command[1:], "-o", output, "--allow-pickle")
        refused(outcome, "can't be loaded as a causal language model", output)
    assert not (tmp_path / "exploded").exists()


@pytest.fixture
def adapter(tmp_path):
    """A PEFT adapter of the tiny model, as PEFT saves it."""
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def adapter_bomb(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({LORA: Bomb(folder.parent / "exploded")}))


def adapter_tensors(change):
    def damage(folder):
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        safetensors.torch.save_file(change(tensors), folder / "adapter_model.safetensors")

    return damage


def adapter_config(**values):
    def damage(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return damage


ADAPTERS = {
    "pickled code": (adapter_bomb, r"adapter_model\.bin: pickled weights can run code.*--allow-pickle"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "there is no adapter_model.safeten"),
    "reversed offsets": (
        lambda folder: rewrite_header(
            folder / "adapter_model.safetensors", lambda header: header[LORA].update(data_offsets=[8, 0])
        ),
        rf"adapter_model\.safetensors: tensor '{LORA}': data_offsets",
    ),
    "truncated": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(
            (folder / "adapter_model.safetensors").read_bytes()[:-8]
        ),
        r"adapter_model\.safetensors: tensor '.*' ends at byte",
    ),
    "missing tensor": (
        adapter_tensors(lambda tensors: {name: each for name, each in tensors.items() if name != LORA}),
        rf"adapter_model\.safetensors: tensor '{LORA}' is missing",
    ),
    "tensor of another model": (
        adapter_tensors(lambda tensors: {**tensors, LORA.replace("layers.0", "layers.9"): torch.ones(4, 32)}),
        r"layers\.9\.self_attn\.q_proj\.lora_A\.weight' has no place in this model",
    ),
    "other shape": (
        adapter_tensors(lambda tensors: {**tensors, LORA: torch.ones(4, 31)}),
        "can't be merged into this model",
    ),
    "import of a module": (adapter_config(megatron_config={}, megatron_core="theirs"), "megatron_config can't be used"),
    "unknown kind": (adapter_config(peft_type="NONSENSE"), "can't be merged into this model"),
    "config nested deeply": (
        lambda folder: (folder / "adapter_config.json").write_text("[" * 200_000),
        r"adapter_config\.json: its JSON is nested too deeply",
    ),
}


@pytest.mark.parametrize(("damage", "message"), ADAPTERS.values(), ids=ADAPTERS.keys())
def test_a_damaged_adapter_is_refused_in_one_line(splaser, tiny_folder, adapter, pairs_file, tmp_path, damage, message):
    damage(adapter)
    arguments = ["laser", tiny_folder, "--pairs", pairs_file, "-o", tmp_path / "out", "--adapter", adapter]
    refused(splaser(*arguments, *FLAGS), message, tmp_path / "out")
    assert not (tmp_path / "exploded").exists()


def test_a_pickled_adapter_is_merged_where_pickles_are_allowed(tiny_folder, adapter):
    merged, _ = load_model(tiny_folder, device="cpu", adapter=adapter)
    file = adapter / "adapter_model.safetensors"
    torch.save(safetensors.torch.load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    again, _ = load_model(tiny_folder, device="cpu", adapter=adapter, allow_pickle=True)
    assert all(map(torch.equal, merged.state_dict().values(), again.state_dict().values()))
    with pytest.raises(CheckpointError, match="pickled"):
        check_adapter_folder(adapter)


def embedder_bomb(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Bomb(folder.parent / "exploded")}))


def embedder_code(folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "theirs.Module"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "theirs.py").write_text(f"open({str(folder.parent / 'exploded')!r}, 'w')\nclass Module: pass\n")


EMBEDDERS = {
    "pickled code": (embedder_bomb, r"pytorch_model\.bin: pickled weights can run code"),
    "code of its own": (embedder_code, "embedder '.*' can't be loaded"),
    "truncated": (truncate, r"model\.safetensors: tensor '.*' ends at byte"),
    "config nested deeply": (config_text("[" * 200_000), "embedder '.*' can't be loaded"),
}


@pytest.mark.real
@pytest.mark.parametrize(("damage", "message"), EMBEDDERS.values(), ids=EMBEDDERS.keys())
def test_a_damaged_embedder_is_refused_in_one_line(
    splaser, tiny_folder, minilm, pairs_file, tmp_path, monkeypatch, damage, message
):
    embedder = Path(shutil.copytree(minilm, tmp_path / "embedder"))
    damage(embedder)
    monkeypatch.syspath_prepend(str(embedder))
    arguments = ["laser", tiny_folder, "--pairs", pairs_file, "-o", tmp_path / "out", *FLAGS, "--embedder", embedder]
    refused(splaser(*arguments), message, tmp_path / "out")
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
