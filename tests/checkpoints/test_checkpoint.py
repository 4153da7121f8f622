"""Reading checkpoints: bit-exact, in file order, one tensor ahead, with little memory, and never past a lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splaser_plugin.checkpoints import checkpoint as checkpoint_module
from splaser_plugin.checkpoints.checkpoint import Checkpoint, open_checkpoint, read_groups
from splaser_plugin.checkpoints.folder import INDEX_NAME
from splaser_plugin.errors import CheckpointError
from tests.builders import WRITTEN, save_sharded, save_single

opened_files: list[str] = []


def _note_opened(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and str(arguments[0]).endswith(".safetensors"):
        opened_files.append(Path(str(arguments[0])).name)


sys.addaudithook(_note_opened)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bit pattern, NaN payloads among them."""
    count = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    largest = 2 if dtype == torch.bool else 256
    values = torch.randint(0, largest, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return values.view(dtype).reshape(shape)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_all(checkpoint: Checkpoint) -> Iterator[list[torch.Tensor]]:
    return read_groups(checkpoint, [[stored] for stored in checkpoint.tensors.values()])


def read_by_name(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return dict(zip(checkpoint.tensors, (tensor for (tensor,) in read_all(checkpoint)), strict=True))


LAYERS = {f"layers.{number}.weight": random_tensor((8, 5), torch.bfloat16, number) for number in range(6)}
SHARDS = [dict(list(LAYERS.items())[:4]), dict(list(LAYERS.items())[4:])]


@pytest.mark.parametrize("dtype", WRITTEN.values(), ids=WRITTEN.keys())
def test_tensors_of_every_dtype_are_those_of_the_safetensors_library_bit_by_bit(tmp_path, dtype):
    shapes = {"matrix": (7, 3), "vector": (5,), "scalar": (), "empty": (0, 4), "fused": (2, 3, 4)}
    save_single(tmp_path, {name: random_tensor(shape, dtype) for name, shape in shapes.items()})
    read = read_by_name(open_checkpoint(tmp_path))
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as theirs:
        assert read.keys() == set(theirs.keys())
        for name, tensor in read.items():
            expected = theirs.get_tensor(name)
            assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
            assert as_bytes(tensor) == as_bytes(expected)


def test_groups_come_in_the_order_given_and_experts_are_slices(tmp_path):
    fused = random_tensor((3, 4, 5), torch.float32)
    save_sharded(tmp_path, [{"experts": fused, "norm": torch.ones(5)}, {"last": torch.zeros(2, 2)}])
    checkpoint = open_checkpoint(tmp_path)
    experts, norm, last = (checkpoint.tensors[name] for name in ("experts", "norm", "last"))
    (second, ones), (zeros,), (first,) = read_groups(
        checkpoint, [[experts.expert(2), norm], [last], [experts.expert(0)]]
    )
    assert as_bytes(second) == as_bytes(fused[2])
    assert as_bytes(first) == as_bytes(fused[0])
    assert first.shape == (4, 5)
    assert torch.equal(ones, torch.ones(5))
    assert torch.equal(zeros, torch.zeros(2, 2))
    assert list(read_groups(checkpoint, [])) == []


def test_what_is_read_is_the_callers_own_memory(tmp_path):
    save_single(tmp_path, {"w": torch.zeros(4)})
    checkpoint = open_checkpoint(tmp_path)
    (first,), *_ = read_all(checkpoint)
    first.fill_(1)
    (again,), *_ = read_all(checkpoint)
    assert not again.any()


def test_each_shard_is_opened_once_for_its_header_and_once_to_be_read(tmp_path):
    save_sharded(tmp_path, SHARDS)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    opened_files.clear()
    checkpoint = open_checkpoint(tmp_path)
    assert opened_files == names
    opened_files.clear()
    read = read_by_name(checkpoint)
    assert opened_files == names
    assert {name: as_bytes(tensor) for name, tensor in read.items()} == {
        name: as_bytes(tensor) for name, tensor in LAYERS.items()
    }


def test_symlinked_shards_are_read_as_in_the_hubs_cache(tmp_path):
    save_sharded(tmp_path / "blobs", SHARDS)
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    checkpoint = open_checkpoint(str(snapshot))
    assert len(list(read_all(checkpoint))) == len(LAYERS)
    assert checkpoint.identity() == open_checkpoint(tmp_path / "blobs").identity()


def test_at_most_one_tensor_is_read_ahead_and_none_is_kept(tmp_path, monkeypatch):
    save_sharded(tmp_path, SHARDS)
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    started: list[str] = []
    read_one = checkpoint_module._read_tensor

    def spy(file, stored, file_bytes):
        started.append(stored.name)
        tensor = read_one(file, stored, file_bytes)
        alive.add(tensor)
        return tensor

    monkeypatch.setattr(checkpoint_module, "_read_tensor", spy)
    read = read_all(open_checkpoint(tmp_path))
    assert started == []
    for number in range(1, len(LAYERS) + 1):
        group = next(read)
        assert len(started) <= number + 1
        assert len(alive) <= 2
        del group
    assert list(read) == []
    assert len(alive) == 0
    assert started == list(LAYERS)


def test_a_reader_left_early_closes_its_file_and_ends_its_thread(tmp_path):
    save_sharded(tmp_path, SHARDS)
    read = read_all(open_checkpoint(tmp_path))
    next(read)
    assert any(thread.name.startswith("splaser-read") for thread in threading.enumerate())
    read.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("splaser-read") for thread in threading.enumerate())


def test_folders_that_are_missing_or_hold_no_tensors_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent: no such folder. Give a folder with config.json"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="its safetensors files hold no tensors"):
        open_checkpoint(tmp_path)


def test_the_config_comes_along(tmp_path):
    save_single(tmp_path, {"w": torch.zeros(4)})
    assert open_checkpoint(tmp_path).config == {}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert open_checkpoint(tmp_path).config == {"model_type": "llama"}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not valid JSON"):
        open_checkpoint(tmp_path)


def test_a_shard_and_an_index_that_disagree_are_refused(tmp_path):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    folder = save_sharded(tmp_path, [{"a": torch.zeros(2)}, {"b": torch.zeros(2)}])

    def write_index(weight_map: dict[str, str]) -> None:
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))

    write_index({"a": first, "b": second, "c": second})
    with pytest.raises(CheckpointError, match=rf"{second}: tensor 'c' is not in it, against {INDEX_NAME}"):
        open_checkpoint(folder)
    safetensors.torch.save_file({"b": torch.zeros(2), "c": torch.zeros(2)}, folder / second)
    write_index({"a": first, "b": second})
    with pytest.raises(CheckpointError, match=rf"{second}: tensor 'c' is in it, against {INDEX_NAME}"):
        open_checkpoint(folder)
    safetensors.torch.save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, folder / second)
    with pytest.raises(CheckpointError, match=rf"{second}: tensor 'a' is in {first} too"):
        open_checkpoint(folder)


def test_a_truncated_shard_is_refused_before_any_tensor_is_read(tmp_path):
    save_sharded(tmp_path, SHARDS)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors: tensor 'layers.5.weight' ends at"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_that_changed_its_size_since_its_header_was_read_is_refused(tmp_path, change):
    checkpoint = open_checkpoint(save_single(tmp_path, LAYERS))
    shard = tmp_path / "model.safetensors"
    os.truncate(shard, shard.stat().st_size + change)
    with pytest.raises(CheckpointError, match=r"has \d+ bytes, expected the \d+ it had when its header was read"):
        list(read_all(checkpoint))
    with pytest.raises(CheckpointError, match="it had when its header was read"):
        checkpoint.identity()


@pytest.mark.parametrize("kept_bytes", [0.6, 1.5])
def test_a_file_that_changes_its_size_while_it_is_read_is_refused(tmp_path, kept_bytes):
    large = {f"w{number}": torch.zeros(1 << 16) for number in range(6)}
    checkpoint = open_checkpoint(save_single(tmp_path, large))
    shard = tmp_path / "model.safetensors"
    read = read_all(checkpoint)
    next(read)
    os.truncate(shard, int(shard.stat().st_size * kept_bytes))
    with pytest.raises(CheckpointError, match=r"changed while tensor 'w\d' was read: .* bytes came, and the file has"):
        list(read)


def test_a_shard_that_vanished_or_became_a_folder_is_refused(tmp_path):
    checkpoint = open_checkpoint(save_single(tmp_path, LAYERS))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: can't be read \(No such file"):
        list(read_all(checkpoint))
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model.safetensors: no regular file"):
        open_checkpoint(tmp_path)


def test_identity_is_of_the_weights_not_of_their_files(tmp_path):
    single = open_checkpoint(save_single(tmp_path / "single", LAYERS)).identity()
    sharded = open_checkpoint(save_sharded(tmp_path / "sharded", SHARDS)).identity()
    assert single == sharded
    assert len(single) == 64


@pytest.mark.parametrize(
    "changed",
    [
        {"layers.3.weight": random_tensor((8, 5), torch.bfloat16, 99)},
        {"layers.3.weight": LAYERS["layers.3.weight"].reshape(5, 8)},
        {"layers.3.weight": LAYERS["layers.3.weight"].view(torch.float16)},
        {"other": torch.zeros(1)},
    ],
    ids=["values", "shape", "dtype", "names"],
)
def test_identity_differs_with_values_shape_dtype_and_names(tmp_path, changed):
    before = open_checkpoint(save_single(tmp_path / "before", LAYERS)).identity()
    after = open_checkpoint(save_single(tmp_path / "after", {**LAYERS, **changed})).identity()
    assert before != after


def test_identity_sees_a_small_fine_tuning_of_a_large_matrix(tmp_path):
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    update = torch.randn(512, 1, generator=torch.Generator().manual_seed(1)) / 100
    tuned = (weight.float() + update @ update.T).bfloat16()
    before = open_checkpoint(save_single(tmp_path / "before", {"w": weight})).identity()
    assert before != open_checkpoint(save_single(tmp_path / "tuned", {"w": tuned})).identity()
    assert before == open_checkpoint(tmp_path / "before").identity()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_or_read_whole(tmp_path, data):
    """Bytes of any of its files replaced, removed or added: a one-line refusal, or tensors of the sizes on disk."""
    folder = save_sharded(tmp_path / "model", SHARDS)
    (folder / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(file.read_bytes())
    start = data.draw(st.integers(0, min(len(content), 500)))
    content[start : start + data.draw(st.integers(0, 4))] = data.draw(
        st.binary(max_size=4) | st.text("0123456789-.,:[]{}\"'/", max_size=4).map(str.encode)
    )
    file.write_bytes(content)
    try:
        checkpoint = open_checkpoint(folder)
        checkpoint.identity()
        for name, tensor in read_by_name(checkpoint).items():
            assert tensor.shape == checkpoint.tensors[name].shape
            assert tensor.numel() * tensor.element_size() == checkpoint.tensors[name].byte_count
    except CheckpointError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 1000


@pytest.mark.slow
def test_a_header_with_ten_thousand_experts_is_read_and_each_expert_reachable(tmp_path):
    count = 10_000
    fused = torch.arange(count, dtype=torch.int16).reshape(count, 1, 1).expand(count, 1, 2).contiguous()
    separate = {f"layers.0.experts.{number}.w": torch.zeros(1, 2) for number in range(count)}
    checkpoint = open_checkpoint(save_single(tmp_path, {"fused": fused, **separate}))
    experts = [[checkpoint.tensors["fused"].expert(number)] for number in range(count)]
    assert all(int(tensor[0, 1]) == number for number, (tensor,) in enumerate(read_groups(checkpoint, experts)))
    assert len(read_by_name(checkpoint)) == count + 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_reading_holds_two_tensors_however_large_the_checkpoint(tmp_path):
    tensor_bytes = 16 << 20
    shards = [{f"w{shard}.{number}": torch.zeros(tensor_bytes // 4) for number in range(2)} for shard in range(8)]
    save_sharded(tmp_path, shards)
    program = """
        import sys
        from pathlib import Path
        from splaser_plugin.checkpoints.checkpoint import open_checkpoint, read_groups

        def peak_bytes():
            line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
            return int(line.split()[1]) * 1024

        checkpoint = open_checkpoint(sys.argv[1])
        next(read_groups(checkpoint, [[checkpoint.tensors["w0.0"]]]))[0][:1].add(1)
        before = peak_bytes()
        total_bytes = 0
        for tensors in read_groups(checkpoint, [[stored] for stored in checkpoint.tensors.values()]):
            total_bytes += tensors[0].nbytes
            del tensors
        print(total_bytes, peak_bytes() - before)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), tmp_path], capture_output=True, text=True, check=True
    )
    total_bytes, extra_bytes = map(int, run.stdout.split())
    assert total_bytes == 16 * tensor_bytes
    assert extra_bytes <= 1.5 * tensor_bytes  # the first of the two was counted before
