"""Coverage-guided fuzzing of what is read of an untrusted checkpoint before its tensors: headers and indexes.

    pip install atheris
    python tests/fuzz/checkpoint_headers.py -max_total_time=600 -max_len=4096 -rss_limit_mb=1024 CORPUS_FOLDER

CORPUS_FOLDER is any folder; real files are put there first. Each input ends in a CheckpointError of one short,
printable line, or in tensors that the safetensors library finds in the same bytes too; and what that library reads
is refused only for the reasons in STRICTER. Anything else, and memory beyond the limit, stops the run with the
input saved as `crash-...` or `oom-...`: make it a regression test.
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import atheris
import safetensors
import safetensors.torch
import torch

with atheris.instrument_imports(include=["splaser_plugin"]):
    from splaser_plugin.checkpoints.folder import parse_index
    from splaser_plugin.checkpoints.header import DTYPES, read_header
    from splaser_plugin.errors import CheckpointError

WHERE = Path("file")
RAW, TEXT, MADE_UP, INDEX = range(4)
# What the safetensors library overlooks or supports and we refuse, by words of the refusal.
STRICTER = (
    "expected '{'. It is no safetensors file",
    "times. It is damaged",
    "expected dtype, shape and data_offsets",
    "expected one of BOOL",
    "expected at most 64",
    "takes 2^63 bytes or more",
)
SIZES = [-1, 0, 1, 2, 3, 8, 2**31, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64, 10**4300 - 1, True, 1.0, None, "2"]


def test_one_input(content: bytes) -> None:
    kind, content = (content[0] % 4, content[1:]) if content else (RAW, content)
    if kind == INDEX:
        refused_or(lambda: check_index(parse_index(content, WHERE)))
        return
    make_file: dict[int, Callable[[bytes], bytes]] = {TEXT: with_length_and_data, MADE_UP: made_up_file}
    file = make_file.get(kind, bytes)(content)
    refusal = refused_or(lambda: check_header(file))
    if refusal is not None and not any(words in refusal for words in STRICTER):
        try:
            safetensors.deserialize(file)
        except safetensors.SafetensorError:
            return
        raise RuntimeError(f"the safetensors library reads it, but: {refusal}")


def refused_or(check: Callable[[], None]) -> str | None:
    """The message of the refusal that `check` ends in, None if it ends well."""
    try:
        check()
    except CheckpointError as error:
        message = str(error)
        if not message.isprintable() or len(message) > 1000 or not message.startswith("file: "):
            raise RuntimeError(f"a refusal that isn't one short line: {message!r}") from error
        return message
    return None


def check_header(file: bytes) -> None:
    tensors = read_header(io.BytesIO(file), len(file), WHERE)
    theirs = dict(safetensors.deserialize(file))
    if theirs.keys() != {tensor.name for tensor in tensors}:
        raise RuntimeError("other tensors than the safetensors library")
    for tensor in tensors:
        their = theirs[tensor.name]
        data = file[tensor.offset : tensor.offset + tensor.byte_count]
        found = (DTYPES[their["dtype"]], tuple(their["shape"]), bytes(their["data"]))
        if found != (tensor.dtype, tensor.shape, data):
            raise RuntimeError(f"{tensor} is another tensor than the safetensors library's")


def check_index(names_by_shard: dict[str, set[str]]) -> None:
    for name, tensors in names_by_shard.items():
        if Path(name).name != name or not name.endswith(".safetensors") or not tensors:
            raise RuntimeError(f"shard {name!r} with {len(tensors)} tensors")


def with_length_and_data(text: bytes) -> bytes:
    """The file whose header is `text`, with as many bytes of data as its largest offset asks for."""
    ends = [int(end) for end in re.findall(rb'"data_offsets":\[\d+,(\d{1,4})\]', text)]
    return len(text).to_bytes(8, "little") + text + bytes(max(ends, default=0))


def made_up_file(content: bytes) -> bytes:
    """A file whose header is well-formed JSON and nearly right: most tensors follow one another as they should."""
    provider = atheris.FuzzedDataProvider(content)
    header: dict[str, object] = {}
    end = 0
    for _ in range(provider.ConsumeIntInRange(0, 5)):
        dtype = provider.PickValueInList(list(DTYPES))
        shape: list[object] = [provider.ConsumeIntInRange(0, 3) for _ in range(provider.ConsumeIntInRange(0, 3))]
        byte_count = math.prod(shape) * DTYPES[dtype].itemsize  # type: ignore[arg-type]
        entry: dict[str, object] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + byte_count]}
        end += byte_count
        lie = provider.ConsumeIntInRange(0, 15)
        if lie == 0:
            shape.append(provider.PickValueInList(SIZES))
        elif lie == 1:
            entry["data_offsets"] = [provider.PickValueInList(SIZES), provider.ConsumeIntInRange(-4, 40)]
        elif lie == 2:
            entry[provider.PickValueInList(list(entry))] = provider.PickValueInList(SIZES)
        elif lie == 3:
            end += provider.ConsumeIntInRange(-4, 4)
        header[provider.ConsumeUnicode(4)] = entry
    if provider.ConsumeBool():
        header["__metadata__"] = {provider.ConsumeUnicode(3): provider.ConsumeUnicode(3)}
    text = json.dumps(header, ensure_ascii=provider.ConsumeBool()).encode("utf-8", "surrogatepass")
    if provider.ConsumeIntInRange(0, 7) == 0:
        at = provider.ConsumeIntInRange(0, len(text))
        text = text[:at] + provider.ConsumeBytes(4) + text[at + provider.ConsumeIntInRange(0, 4) :]
    length = len(text) + provider.PickValueInList([0, 0, 0, 0, 0, 1, -1, 2**40])
    data_bytes = max(0, end + provider.PickValueInList([0, 0, 0, 0, 0, 1, -1]))
    return length.to_bytes(8, "little", signed=length < 0) + text + bytes(data_bytes)


def write_seeds(corpus: Path) -> None:
    corpus.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"layers.{number}.{name}": torch.ones(2, 3, dtype=dtype) for number, (name, dtype) in enumerate(DTYPES.items())
    }
    for number in (0, 1, 3, len(tensors)):
        file = safetensors.torch.save(dict(list(tensors.items())[:number]), metadata={"format": "pt"})
        (corpus / f"seed-raw-{number}").write_bytes(bytes([RAW]) + file)
        text = file[8 : 8 + int.from_bytes(file[:8], "little")]
        (corpus / f"seed-text-{number}").write_bytes(bytes([TEXT]) + text)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (corpus / "seed-index").write_bytes(bytes([INDEX]) + json.dumps(index).encode())
    (corpus / "seed-made-up").write_bytes(bytes([MADE_UP]) + bytes(range(1, 256)))


if __name__ == "__main__":
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    if folders:
        write_seeds(Path(folders[0]))
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
