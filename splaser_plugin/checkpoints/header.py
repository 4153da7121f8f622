"""What one safetensors file holds, known and checked from its header before any tensor is read.

The format: 8 bytes with the header's length, the header (a JSON object: tensor name to dtype, shape and
offsets), then the tensors' bytes one after another, without holes. The file is untrusted, so
nothing in the header is believed and nothing is allocated for what it only claims. The library's own `safe_open` takes
a header that has a name twice, and doesn't say which tensor has a dtype that it doesn't know.
Source: https://huggingface.co/docs/safetensors, section "Format".
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from splaser_plugin.errors import CheckpointError
from splaser_plugin.files.text import shown

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_DIMENSIONS = 64  # what torch's own kernels stop at
LENGTH_BYTES = 8
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # an escape in JSON can make one, UTF-8 can't hold it

EXPONENTS: torch.dtype = getattr(torch, "float8_e8m0fnu", torch.uint8)
"""Powers of two, which are scales and never weights; before torch 2.7 their bytes."""
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": EXPONENTS,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor, or one expert of a fused tensor, lies on disk.

    offset: first byte, counted from the start of the file `shard`; the order is row-major, little-endian.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: Path
    offset: int
    byte_count: int

    def expert(self, index: int) -> StoredTensor:
        """The matrix of expert `index` of a fused tensor (experts, rows, columns), named `name[index]`.

        Raises CheckpointError when the tensor hasn't three dimensions or the expert doesn't exist.
        """
        if len(self.shape) != 3 or not 0 <= index < self.shape[0]:
            raise CheckpointError(
                f"{self.shard}: tensor {shown(self.name)}: no expert {index} in its shape {self.shape}; "
                "expected (experts, rows, columns)."
            )
        rows = self.rows(index, index + 1)
        return replace(rows, name=f"{self.name}[{index}]", shape=self.shape[1:])

    def rows(self, start: int, stop: int) -> StoredTensor:
        """What lies from `start` up to `stop` along the first dimension."""
        row_bytes = self.byte_count // self.shape[0]
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            offset=self.offset + start * row_bytes,
            byte_count=(stop - start) * row_bytes,
        )

    def values(self, start: int, stop: int) -> StoredTensor:
        """What lies from `start` up to `stop` of the flattened tensor."""
        width = self.dtype.itemsize
        return replace(
            self, shape=(stop - start,), offset=self.offset + start * width, byte_count=(stop - start) * width
        )


def read_header(file: BinaryIO, file_bytes: int, shard: Path) -> list[StoredTensor]:
    """Every tensor of the safetensors file `shard`, in the order of its bytes.

    file: `shard`, opened at its start; file_bytes: its size.
    Raises CheckpointError, naming the file and the tensor, when the header breaks a rule of the format, has
    an unknown dtype, or doesn't account for every byte of the file exactly once.
    """
    header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
    data_start = LENGTH_BYTES + header_bytes
    if data_start > file_bytes or header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{shard}: a header of {header_bytes} bytes in a file of {file_bytes} bytes (limit "
            f"{MAX_HEADER_BYTES}). It is cut off or no safetensors file: download it again."
        )
    header = file.read(header_bytes)
    if not header.startswith(b"{"):
        raise CheckpointError(
            f"{shard}: its header starts with {shown(header[:8])}, expected '{{'. It is no safetensors file."
        )
    entries = parse_json_object(header, shard)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(_is_unicode(text) for pair in metadata.items() for text in pair):
        raise CheckpointError(f"{shard}: __metadata__ is {shown(metadata)}, expected an object of strings.")
    tensors = [_stored_tensor(name, entry, shard, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.byte_count))
    _check_every_byte_used_once(tensors, data_start, file_bytes, shard)
    return tensors


def parse_json_object(text: bytes, file: Path, *, unique_keys: bool = True) -> dict[str, Any]:
    """The JSON object in `text`, which was read from `file`.

    Raises CheckpointError when it is no UTF-8, no JSON or no object, or when a key is there twice.
    """

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique = dict(pairs)
        if unique_keys and len(unique) != len(pairs):
            key, count = Counter(key for key, _ in pairs).most_common(1)[0]
            raise CheckpointError(f"{file}: {shown(key)} is there {count} times. It is damaged or forged.")
        return unique

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=refuse_duplicates)
    except RecursionError as error:
        raise CheckpointError(f"{file}: its JSON is nested too deeply. It is damaged or forged.") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}). Download it again.") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{file}: its JSON is {shown(parsed)}, expected an object.")
    return parsed


def _stored_tensor(name: str, entry: object, shard: Path, data_start: int) -> StoredTensor:
    where = f"{shard}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is {shown(entry)}, expected dtype, shape and data_offsets.")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _is_unicode(name):
        raise CheckpointError(f"{where}: its name has half a surrogate pair and can't be written as UTF-8.")
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise CheckpointError(
            f"{where}: dtype {shown(dtype_name)}, expected one of {', '.join(DTYPES)}. It is newer than this program, "
            "or the file is damaged. Give the model in bfloat16 or float32, or download it again."
        )
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(
            f"{where}: shape {shown(shape)}, expected at most {MAX_DIMENSIONS} whole numbers below 2^63."
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {shown(offsets)}, expected [begin, end], begin <= end.")
    dtype = DTYPES[dtype_name]
    # An empty tensor's other dimensions count too: torch refuses what doesn't fit its 64-bit sizes.
    if math.prod(size or 1 for size in shape) * dtype.itemsize >= 2**63:
        raise CheckpointError(f"{where}: shape {shown(shape)} takes 2^63 bytes or more; none can be so large.")
    begin, end = offsets
    byte_count = math.prod(shape) * dtype.itemsize
    if end - begin != byte_count:
        raise CheckpointError(
            f"{where}: data_offsets {shown(offsets)} span {end - begin} bytes, but shape {shown(shape)} of "
            f"{dtype_name} takes {byte_count}."
        )
    return StoredTensor(name, dtype, tuple(shape), shard, data_start + begin, byte_count)


def _is_unicode(text: object) -> bool:
    return isinstance(text, str) and not LONE_SURROGATE.search(text)


def _are_sizes(numbers: object) -> bool:
    # type(), because JSON's true is an int to isinstance; an upper bound, because JSON's integers have none
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def _check_every_byte_used_once(tensors: list[StoredTensor], data_start: int, file_bytes: int, shard: Path) -> None:
    end = data_start
    for tensor in tensors:
        if tensor.offset != end:
            problem = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole before it"
            raise CheckpointError(
                f"{shard}: tensor {shown(tensor.name)} {problem}: it starts at byte {tensor.offset}, expected {end}."
            )
        end += tensor.byte_count
        if end > file_bytes:
            raise CheckpointError(
                f"{shard}: tensor {shown(tensor.name)} ends at byte {end} of a file of {file_bytes} bytes. "
                "The file is cut off: download it again."
            )
    if end != file_bytes:
        raise CheckpointError(f"{shard}: {file_bytes - end} bytes after the last tensor belong to none.")
