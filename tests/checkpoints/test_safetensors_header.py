"""One file's header: what the safetensors library writes is understood, what lies is refused."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splaser_plugin.checkpoints.header import (
    DTYPES,
    MAX_HEADER_BYTES,
    StoredTensor,
    parse_json_object,
    read_header,
)
from splaser_plugin.errors import CheckpointError
from tests.builders import WRITTEN

SHARD = Path("model.safetensors")


def as_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: object = (2,), begin: object = 0, end: object = 8, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read(file: bytes) -> list[StoredTensor]:
    return read_header(io.BytesIO(file), len(file), SHARD)


def agrees_with_library(file: bytes) -> bool:
    """Whether the file is accepted, and then also by the safetensors library, with the same tensors."""
    try:
        tensors = read(file)
    except CheckpointError as error:
        assert "\n" not in str(error)
        assert str(error).isprintable()
        assert len(str(error)) < 1000
        return False
    theirs = dict(safetensors.deserialize(file))
    assert theirs.keys() == {tensor.name for tensor in tensors}
    for tensor in tensors:
        assert tuple(theirs[tensor.name]["shape"]) == tensor.shape
        assert DTYPES[theirs[tensor.name]["dtype"]] == tensor.dtype
        assert theirs[tensor.name]["data"] == file[tensor.offset : tensor.offset + tensor.byte_count]
    return True


REAL_FILE = safetensors.torch.save(
    {
        "embed": torch.arange(12, dtype=torch.bfloat16).reshape(4, 3),
        "experts": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
        "mask": torch.tensor([True, False]),
        "scale": torch.tensor(0.5, dtype=torch.float64),
        "nothing": torch.empty(0, 7),
    },
    metadata={"format": "pt"},
)
REAL_HEADER_BYTES = int.from_bytes(REAL_FILE[:8], "little")


tensors_by_name = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(WRITTEN)), st.lists(st.integers(0, 4), max_size=4)),
    max_size=6,
)


@given(tensors_by_name)
def test_whatever_the_library_writes_is_read_alike(tensors):
    assert agrees_with_library(
        safetensors.torch.save(
            {name: torch.zeros(shape, dtype=WRITTEN[dtype]) for name, (dtype, shape) in tensors.items()}
        )
    )


def test_tensors_come_in_the_order_of_their_bytes_whatever_the_header_says_first():
    file = as_file({"late": entry(begin=8, end=16), "early": entry()}, bytes(16))
    assert [tensor.name for tensor in read(file)] == ["early", "late"]


def test_empty_tensors_between_others_are_no_overlap_and_spaces_after_the_json_no_damage():
    header = {"b": entry(begin=8, end=16), "void": entry([0, 3], 8, 8), "a": entry()}
    file = as_file(json.dumps(header).encode() + b"   ", bytes(16))
    assert agrees_with_library(file)
    assert [tensor.name for tensor in read(file)] == ["a", "void", "b"]


def test_an_expert_is_a_slice_of_the_fused_tensor():
    fused = next(tensor for tensor in read(REAL_FILE) if tensor.name == "experts")
    second = fused.expert(1)
    assert (second.name, second.shape, second.byte_count) == ("experts[1]", (3, 4), 48)
    assert REAL_FILE[second.offset :][:48] == torch.arange(12, 24, dtype=torch.float32).numpy().tobytes()
    for index in (-1, 2):
        with pytest.raises(CheckpointError, match=rf"'experts': no expert {index} in its shape \(2, 3, 4\)"):
            fused.expert(index)
    with pytest.raises(CheckpointError, match=r"'experts\[1\]': no expert 0 .* expected \(experts, rows, columns\)"):
        second.expert(0)


LIES = {
    "empty file": (b"", "header of 0 bytes in a file of 0 bytes"),
    "cut in the length": (b"\x02\0\0", "header of 2 bytes in a file of 3 bytes"),
    "length beyond the file": ((99).to_bytes(8, "little") + b"{}", "header of 99 bytes in a file of 10 bytes"),
    "length 2^64-1": (b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes"),
    "no object first": (as_file(b' {"a":1}'), "starts with .* expected '{'"),
    "not UTF-8": (as_file(b'{"\xff":1}'), r"not valid JSON \('utf-8' codec can't decode"),
    "not JSON": (as_file(b'{"a":'), "not valid JSON"),
    "deep nesting": (as_file(b'{"a":' + b"[" * 200_000), "nested too deeply"),
    "a number of 5000 digits": (as_file(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON|expected dtype"),
    "tensor twice": (
        as_file(b'{"w":%s,"w":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
        "'w' is there 2 times",
    ),
    "field twice": (
        as_file(b'{"w":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "'shape' is there 2 times",
    ),
    "metadata not strings": (as_file({"__metadata__": {"a": 1}}), "__metadata__ is .* expected an object of strings"),
    "lone surrogate in the metadata": (as_file({"__metadata__": {"\ud800": ""}}), r"__metadata__ is {'\\ud800': ''}"),
    "metadata a list": (as_file({"__metadata__": []}), r"__metadata__ is \[\]"),
    "entry not an object": (as_file({"w": [1]}), r"tensor 'w' is \[1\], expected dtype, shape and data_offsets"),
    "field missing": (as_file({"w": {"dtype": "F32", "shape": [2]}}), "tensor 'w' is .* expected dtype, shape and"),
    "unknown field": (as_file({"w": {**entry(), "x": 1}}, bytes(8)), "tensor 'w' is .* expected dtype, shape and"),
    "lone surrogate": (as_file({"\ud800": entry()}, bytes(8)), r"tensor '\\ud800': its name has half a surrogate pair"),
    "unknown dtype": (as_file({"w": entry(dtype="F31")}, bytes(8)), "'w': dtype 'F31', expected one of BOOL, U8"),
    "dtype of newer files": (
        as_file({"w": entry(dtype="F6_E2M3")}, bytes(8)),
        "dtype 'F6_E2M3', .*It is newer than this program, or the file is damaged. Give the model in bfloat16",
    ),
    "dtype not a string": (as_file({"w": entry(dtype=["F32"])}, bytes(8)), r"'w': dtype \['F32'\], expected one of"),
    "shape negative": (as_file({"w": entry([-2])}, bytes(8)), r"'w': shape \[-2\], expected"),
    "shape of booleans": (as_file({"w": entry([True, 2])}, bytes(8)), r"'w': shape \[True, 2\], expected"),
    "shape of floats": (as_file({"w": entry([2.0])}, bytes(8)), r"'w': shape \[2.0\], expected"),
    "shape not a list": (as_file({"w": entry(2)}, bytes(8)), "'w': shape 2, expected"),
    "65 dimensions": (as_file({"w": entry([1] * 65, 0, 4)}, bytes(4)), "'w': shape .* expected at most 64"),
    "size overflows": (as_file({"w": entry([2**31, 2**31])}, bytes(8)), r"'w': shape .* takes 2\^63 bytes or more"),
    "empty but overflows": (as_file({"w": entry([0, 2**62], 0, 0)}), r"'w': shape .* takes 2\^63 bytes or more"),
    "offsets reversed": (as_file({"w": entry(begin=8, end=0)}, bytes(8)), r"data_offsets \[8, 0\], expected \[begin"),
    "offsets negative": (as_file({"w": entry(begin=-8, end=0)}, bytes(8)), r"data_offsets \[-8, 0\], expected"),
    "offsets of 4300 digits": (  # one more digit than these and Python refuses to print the number
        as_file({"w": entry([0], 10**4300 - 1, 10**4300 - 1)}),
        r"'w': data_offsets \[9+\.\.\.9+, 9+\.\.\.9+\], expected",
    ),
    "a size beyond 64 bits": (as_file({"w": entry([0, 2**64], 0, 0)}), r"'w': shape \[0, 18446744073709551616\], exp"),
    "three offsets": (
        as_file({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, bytes(8)),
        r"data_offsets \[0, 8, 8\], expected",
    ),
    "offset a boolean": (as_file({"w": entry([1], False, 4)}, bytes(4)), r"data_offsets \[False, 4\], expected"),
    "size is not the shape's": (
        as_file({"w": entry([3])}, bytes(8)),
        r"'w': data_offsets \[0, 8\] span 8 bytes, but shape \[3\] of F32 takes 12",
    ),
    "huge claim": (as_file({"w": entry([2**40], 0, 2**42)}, bytes(8)), "'w' ends at byte .* of a file of .* cut off"),
    "overlap": (
        as_file({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)),
        "'b' overlaps the tensor before it: it starts at byte",
    ),
    "same bytes twice": (as_file({"a": entry(), "b": entry()}, bytes(8)), "'b' overlaps the tensor before it"),
    "hole between": (as_file({"a": entry(), "b": entry(begin=9, end=17)}, bytes(17)), "'b' leaves a hole before it"),
    "hole at the start": (as_file({"a": entry(begin=1, end=9)}, bytes(9)), "'a' leaves a hole before it"),
    "cut in the data": (as_file({"a": entry()}, bytes(7)), "'a' ends at byte .* The file is cut off: download it"),
    "bytes left over": (as_file({"a": entry()}, bytes(11)), "3 bytes after the last tensor belong to none"),
}


@pytest.mark.parametrize(("file", "message"), LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_refused_in_one_line_that_names_the_file(file, message):
    with pytest.raises(CheckpointError, match=message) as refusal:
        read(file)
    assert str(refusal.value).startswith("model.safetensors: ")
    assert not agrees_with_library(file)


def test_a_header_beyond_the_limit_is_refused_before_it_is_read():
    file = io.BytesIO((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match=r"limit 100000000"):
        read_header(file, 2 * MAX_HEADER_BYTES, SHARD)
    assert file.tell() == 8


def test_control_characters_and_long_names_reach_a_message_only_escaped_and_shortened():
    with pytest.raises(CheckpointError) as refusal:
        read(as_file({"\x1b[31m\r\n" + "w" * 100_000: entry(dtype="\x1b]0;owned\x07")}, bytes(8)))
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 700


def test_keys_may_repeat_only_where_asked():
    text = b'{"a":1,"a":2}'
    assert parse_json_object(text, SHARD, unique_keys=False) == {"a": 2}
    with pytest.raises(CheckpointError, match="'a' is there 2 times"):
        parse_json_object(text, SHARD)
    with pytest.raises(CheckpointError, match=r"its JSON is \[1\], expected an object"):
        parse_json_object(b"[1]", SHARD)


@st.composite
def damaged_files(draw) -> bytes:
    """The real file with up to four stretches replaced, removed or inserted, mostly in its header."""
    file = bytearray(REAL_FILE)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, REAL_HEADER_BYTES + 8) | st.integers(0, len(file)))
        removed = draw(st.integers(0, 6))
        file[start : start + removed] = draw(
            st.binary(max_size=6) | st.text('0123456789-.,:[]{}"\\eEtrufalsn ', max_size=6).map(str.encode)
        )
    return bytes(file)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
sizes = st.integers(-1, 9) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64])
near_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", ""]) | json_values,
        "shape": st.lists(sizes, max_size=4) | json_values,
        "data_offsets": st.lists(sizes, min_size=1, max_size=3) | json_values,
    }
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(damaged_files())
def test_a_damaged_file_is_refused_or_read_as_the_library_reads_it(file):
    tracemalloc.start()
    try:
        agrees_with_library(file)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.text(max_size=4), near_entries | json_values, max_size=4), st.integers(0, 40))
def test_a_made_up_header_is_refused_or_read_as_the_library_reads_it(header, data_bytes):
    agrees_with_library(as_file(header, bytes(data_bytes)))
