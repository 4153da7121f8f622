"""Finding a model's weights: folders, indexes, the hub's cache, and what is said when there are none."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splaser_plugin.checkpoints.folder import (
    INDEX_NAME,
    find_shards,
    parse_index,
    read_config,
    read_object,
    resolve_model,
)
from splaser_plugin.errors import CheckpointError
from tests.builders import hub_snapshot

NO_TENSORS = (2).to_bytes(8, "little") + b"{}"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

network_attempts: list[str] = []


def _note_network(event: str, _arguments: object) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        network_attempts.append(event)


sys.addaudithook(_note_network)


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, and no way to the hub itself."""
    cache = tmp_path / "hub-cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    network_attempts.clear()
    return cache


def make_folder(folder: Path, *names: str, weight_map: object = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(NO_TENSORS)
    if weight_map is not None:
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder


def cache_model(cache: Path, files: dict[str, bytes]) -> Path:
    """The snapshot folder of org/tiny in `cache`, laid out as the hub does: links into a folder of blobs."""
    snapshot = hub_snapshot(cache, "org/tiny")
    blobs = snapshot.parents[1] / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir()
    for number, (name, content) in enumerate(files.items()):
        (blobs / f"blob{number}").write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/blob{number}")
    return snapshot


def test_a_folder_is_itself_and_its_home_may_be_a_tilde(tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):  # Windows' is the second
        monkeypatch.setenv(variable, str(tmp_path))
    make_folder(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert resolve_model(str(tmp_path / "tiny")) == tmp_path / "tiny"
    assert resolve_model("~/tiny") == tmp_path / "tiny"
    assert resolve_model("tiny") == Path("tiny")


@pytest.mark.parametrize("model", ["./absent", "../absent", "/absent", "~/absent", "a/b/c", "~nobody-here/x"])
def test_what_looks_like_a_path_never_asks_the_hub(model):
    with pytest.raises(CheckpointError, match=r"no such folder. Give a model's folder|not a usable path"):
        resolve_model(model)
    assert network_attempts == []


def test_a_file_an_empty_name_and_an_endless_one_are_no_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(NO_TENSORS)
    with pytest.raises(CheckpointError, match=r"it is a file\. Give the folder that holds it"):
        resolve_model(str(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match="no such folder here, and as a hub id"):
        resolve_model("")
    with pytest.raises(CheckpointError, match=r"not a usable path or hub id|no such folder here"):
        resolve_model("x" * 5000)
    with pytest.raises(CheckpointError, match="no such folder here, and as a hub id"):
        resolve_model("nul\0nul")


def test_an_unknown_name_says_both_what_it_could_be_and_how_it_failed(monkeypatch):
    with pytest.raises(CheckpointError) as refusal:
        resolve_model("org/absent")
    assert "'org/absent': no such folder here, and as a hub id it is neither in the cache" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert network_attempts == []

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match="nor can it be downloaded"):
        resolve_model("not a hub id")
    assert network_attempts == []


def test_a_wholly_cached_model_is_used_without_the_network(hub_cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    snapshot = cache_model(hub_cache, {"model.safetensors": NO_TENSORS, "config.json": b"{}"})
    assert resolve_model("org/tiny") == snapshot
    assert network_attempts == []
    assert find_shards(snapshot) == {snapshot / "model.safetensors": None}


def test_a_half_cached_model_is_not_taken_for_a_whole_one(hub_cache):
    weight_map = json.dumps({"weight_map": {"a": FIRST, "b": SECOND}}).encode()
    cache_model(hub_cache, {FIRST: NO_TENSORS, INDEX_NAME: weight_map})
    with pytest.raises(CheckpointError):
        find_shards(resolve_model("org/tiny"))


def test_shards_are_those_of_the_index_in_the_order_of_their_names(tmp_path):
    folder = make_folder(tmp_path, FIRST, SECOND, weight_map={"b": SECOND, "a": FIRST, "c": FIRST})
    shards = find_shards(folder)
    assert list(shards.items()) == [(folder / FIRST, {"a", "c"}), (folder / SECOND, {"b"})]


def test_other_safetensors_files_beside_the_weights_are_left_alone(tmp_path):
    folder = make_folder(tmp_path, "model.safetensors", "consolidated.safetensors", "adapter_model.safetensors")
    assert list(find_shards(folder)) == [folder / "model.safetensors"]


def test_a_single_file_may_have_an_index_too(tmp_path):
    folder = make_folder(tmp_path, "model.safetensors", weight_map={"a": "model.safetensors"})
    assert find_shards(folder) == {folder / "model.safetensors": {"a"}}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no weights. Expected model.safetensors or model.safetensors.index.json, found nothing"),
        (["config.json", "notes.txt"], "no weights. .* found 'config.json', 'notes.txt'"),
        (["config.json", "pytorch_model.bin"], "only 'pytorch_model.bin'. Pickled .* pass allow_pickle"),
        (["tiny.gguf"], "only 'tiny.gguf'. GGUF is loaded through transformers"),
        (["adapter_model.safetensors"], r"only 'adapter_model.safetensors'. It is an adapter: merge it \(PEFT"),
        ([FIRST, SECOND], "'model-00001-of-00002.safetensors' is a shard, but model.safetensors.index.json is missing"),
        (["model.safetensors", FIRST], "'model-00001-of-00002.safetensors' is a shard, but"),
        (["\x1b[31m"], r"found '\\x1b\[31m'"),
    ],
)
def test_a_folder_without_weights_says_what_was_found_and_what_to_do(tmp_path, names, message):
    with pytest.raises(CheckpointError, match=message):
        find_shards(make_folder(tmp_path / "model", *names))


def test_missing_and_unknown_shards_are_refused(tmp_path):
    weight_map = {"a": FIRST, "b": SECOND}
    with pytest.raises(CheckpointError, match=rf"{SECOND}: missing or a broken link, as are 1 of 2 shards"):
        find_shards(make_folder(tmp_path / "missing", FIRST, weight_map=weight_map))
    broken = make_folder(tmp_path / "broken", FIRST, weight_map=weight_map)
    (broken / SECOND).symlink_to("../nowhere")
    with pytest.raises(CheckpointError, match=rf"{SECOND}: missing or a broken link"):
        find_shards(broken)
    stray = "model-00003-of-00003.safetensors"
    with pytest.raises(CheckpointError, match=rf"'{stray}' is there, but not in {INDEX_NAME}"):
        find_shards(make_folder(tmp_path / "stray", FIRST, SECOND, stray, weight_map=weight_map))
    with pytest.raises(CheckpointError, match=rf"'model.safetensors' is there, but not in {INDEX_NAME}"):
        find_shards(make_folder(tmp_path / "both", FIRST, SECOND, "model.safetensors", weight_map=weight_map))


@pytest.mark.parametrize(
    "shard_name",
    [
        "../model.safetensors",
        "..",
        "/etc/model.safetensors",
        "a/model.safetensors",
        "a\\model.safetensors",
        "C:model.safetensors",
        ".hidden.safetensors",
        "model.safetensors\n",
        "nul\0.safetensors",
        "model.bin",
        "x" * 300 + ".safetensors",
        "",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_can_not_lead_out_of_the_folder(shard_name):
    text = json.dumps({"weight_map": {"w": shard_name}}).encode()
    with pytest.raises(CheckpointError, match=r"^index: tensor 'w' is in .*, expected the plain name of a .safetens"):
        parse_index(text, Path("index"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "its JSON is .*, expected an object"),
        (b"{}", "weight_map is None, expected tensor names to shards"),
        (b'{"weight_map":{}}', "weight_map is {}, expected"),
        (b'{"weight_map":["a"]}', r"weight_map is \['a'\], expected"),
        (b'{"weight_map":{"w":"a.safetensors","w":"b.safetensors"}}', "'w' is there 2 times"),
        (b'{"weight_map":' + b"[" * 200_000, "nested too deeply"),
        (b"\xff{}", "not valid JSON"),
    ],
)
def test_a_damaged_index_is_refused(text, message):
    with pytest.raises(CheckpointError, match=message):
        parse_index(text, Path("index"))


@given(
    st.binary(max_size=60)
    | st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.just("a.safetensors"), max_size=3).map(
        lambda weight_map: json.dumps({"weight_map": weight_map}).encode()
    )
)
def test_any_bytes_as_an_index_give_plain_shard_names_or_a_refusal(text):
    try:
        names_by_shard = parse_index(text, Path("index"))
    except CheckpointError as error:
        assert str(error).isprintable()
    else:
        assert names_by_shard
        assert all(Path(name).name == name and name.endswith(".safetensors") for name in names_by_shard)


def test_a_config_is_optional_and_may_repeat_a_key_but_must_be_an_object(tmp_path):
    assert read_config(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2, "limit": Infinity}')
    assert read_config(tmp_path) == {"a": 2, "limit": float("inf")}
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json: its JSON is \[\], expected an object"):
        read_config(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="there are neither pipes in folders nor files without readers")
def test_pipes_unreadable_and_enormous_files_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe: no regular file"):
        read_object(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(100_000_001)
    with pytest.raises(CheckpointError, match="huge: more than 100,000,000 bytes"):
        read_object(tmp_path / "huge")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match=r"loop: can't be read"):
        read_object(tmp_path / "loop")
    with pytest.raises(CheckpointError, match=r"x: can't be read \(File name too long\)"):
        read_object(tmp_path / ("x" * 300))
    (tmp_path / "locked").write_bytes(b"{}")
    (tmp_path / "locked").chmod(0)
    if not os.access(tmp_path / "locked", os.R_OK):
        with pytest.raises(CheckpointError, match=r"locked: can't be read \(Permission denied\)"):
            read_object(tmp_path / "locked")
