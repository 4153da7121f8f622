"""Ways to damage a model folder, and what a refusal has to look like."""

from __future__ import annotations

import json
import pickle
import re
import shutil

import safetensors.torch
import torch

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
        safetensors.torch.save_file(
            {tensor: tensors[tensor] for tensor in half}, folder / name, metadata={"format": "pt"}
        )
    where = {tensor: name for name, half in halves.items() for tensor in half}
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


def refused(outcome, message, output):
    code, printed, stderr = outcome
    last = stderr.strip().splitlines()[-1]
    assert code == 1, stderr
    assert printed == ""
    assert "Traceback" not in stderr
    assert [line for line in stderr.splitlines() if "Error" in line] == [last]
    assert last.isprintable()
    assert re.search(message, last), last
    assert not output.exists()
