"""A model's safetensors weights: everything is checked from the headers, then read one tensor at a time."""

from __future__ import annotations

import math
import mmap
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from splaser_plugin.checkpoints.folder import INDEX_NAME, ModelFolder, find_shards, inspect, resolve_model
from splaser_plugin.checkpoints.header import StoredTensor, read_header
from splaser_plugin.checkpoints.identity import identity_of, sampled_places
from splaser_plugin.errors import CheckpointError
from splaser_plugin.files.locked import WINDOWS
from splaser_plugin.files.reading import open_file
from splaser_plugin.files.text import shown

__all__ = ["Checkpoint", "open_checkpoint", "read_groups", "resolve_model"]

OWN_PAGES_BYTES = 1 << 17
COMPARED_BYTES = 1 << 24


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors weights whose headers agree with the files' sizes and with the index.

    config: config.json ({} without one). tensors: by name, in file order (shard by shard, by offset).
    shard_bytes: each shard's size when its header was read.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    shard_bytes: Mapping[Path, int]

    def identity(self) -> str:
        """Which weights these are, by their names on disk; see `identity.identity_of`.

        The same however the tensors are spread over shards. Raises CheckpointError as `read_groups` does.
        """
        values = self.sampled(self.tensors)
        return identity_of((name, stored.shape, values[name]) for name, stored in self.tensors.items())

    def sampled(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The values of tensors that stand for them in an identity; nothing else of the files is read."""
        found: dict[str, torch.Tensor] = {}
        wanted = frozenset(names)
        stored_tensors = [stored for name, stored in self.tensors.items() if name in wanted]
        for shard, in_shard in groupby(stored_tensors, key=attrgetter("shard")):
            with _open_unchanged(shard, self.shard_bytes[shard]) as file:
                for stored in in_shard:
                    places = sampled_places(math.prod(stored.shape))
                    first = int(places[0]) if len(places) else 0
                    part = stored.values(first, first + len(places))
                    found[stored.name] = _read_tensor(file, part, self.shard_bytes[shard])
        return found

    def are_equal(self, names: Sequence[str]) -> bool:
        """Whether these tensors have the same dtype, shape and bytes. Raises CheckpointError as `read_groups` does."""
        stored = [self.tensors[name] for name in names]
        if len({(tensor.dtype, tensor.shape) for tensor in stored}) > 1:
            return False
        step = max(1, COMPARED_BYTES * stored[0].shape[0] // max(1, stored[0].byte_count))
        pieces = range(0, stored[0].shape[0], step)
        groups = [[tensor.rows(start, min(start + step, tensor.shape[0])) for tensor in stored] for start in pieces]
        return all(
            torch.equal(first.view(torch.uint8), other.view(torch.uint8))
            for first, *others in read_groups(self, groups)
            for other in others
        )


def open_checkpoint(model: str | Path | ModelFolder) -> Checkpoint:
    """Find and check the safetensors weights in a folder, reading only headers, the index and the config.

    They are `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    Raises CheckpointError, naming the file and the tensor, when anything is missing, damaged or at odds.
    """
    folder = inspect(model)
    tensors: dict[str, StoredTensor] = {}
    shard_bytes: dict[Path, int] = {}
    for shard, indexed_names in find_shards(folder).items():
        with open_file(shard, CheckpointError) as file:
            shard_bytes[shard] = os.fstat(file.fileno()).st_size
            stored_tensors = {stored.name: stored for stored in read_header(file, shard_bytes[shard], shard)}
        if twice := sorted(stored_tensors.keys() & tensors.keys()):
            raise CheckpointError(
                f"{shard}: tensor {shown(twice[0])} is in {tensors[twice[0]].shard.name} too. "
                "Keep the shards of one model only."
            )
        if indexed_names is not None:
            _check_against_index(shard, stored_tensors.keys(), indexed_names)
        tensors.update(stored_tensors)
    if not tensors:
        raise CheckpointError(f"{folder.path}: its safetensors files hold no tensors.")
    return Checkpoint(folder.path, folder.config, tensors, shard_bytes)


def read_groups(checkpoint: Checkpoint, groups: Sequence[Sequence[StoredTensor]]) -> Iterator[list[torch.Tensor]]:
    """Read groups of tensors (or parts of them) in the order given, in their stored dtype, on the CPU.

    Each tensor is in memory of its own, and no file is memory-mapped: mapped pages count as resident memory. Each
    shard is opened once. A thread reads the next group while the caller works on this one, so at most two are in
    memory. Raises CheckpointError when a shard can't be read or has changed its size.
    """
    return _one_ahead(_read_in_order(groups, checkpoint.shard_bytes), len(groups))


def _one_ahead(reads: Generator[list[torch.Tensor]], count: int) -> Generator[list[torch.Tensor]]:
    # No variable here holds a tensor across the yield: the caller's own `del` is to free it.
    ahead: deque[Future[list[torch.Tensor]]] = deque()
    with closing(reads), ThreadPoolExecutor(1, thread_name_prefix="splaser-read") as reader:
        for started in range(count + 1):
            if started < count:
                ahead.append(reader.submit(next, reads))
            if started > 0:
                yield ahead.popleft().result()


def _read_in_order(
    groups: Sequence[Sequence[StoredTensor]], shard_bytes: Mapping[Path, int]
) -> Generator[list[torch.Tensor]]:
    with ExitStack() as opened:
        files: dict[Path, BufferedReader] = {}
        for group in groups:
            for shard in {stored.shard for stored in group} - files.keys():
                files[shard] = opened.enter_context(_open_unchanged(shard, shard_bytes[shard]))
            yield [_read_tensor(files[stored.shard], stored, shard_bytes[stored.shard]) for stored in group]


def _read_tensor(file: BufferedReader, stored: StoredTensor, file_bytes: int) -> torch.Tensor:
    buffer = _fresh_buffer(stored.byte_count)
    file.seek(stored.offset)
    _fill(buffer.numpy().data, file, stored, file_bytes)
    return buffer.view(stored.dtype).reshape(stored.shape)


def _fresh_buffer(byte_count: int) -> torch.Tensor:
    # Pages of its own go back to the system with the tensor. malloc keeps those of several freed tensors below
    # 32 MB: 16 tensors of 31 MB, read one after another, left 248 MB resident instead of 62. Windows gives such sizes
    # pages of their own by itself, and promises no private pages without a file.
    if byte_count < OWN_PAGES_BYTES or WINDOWS:
        return torch.empty(byte_count, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, byte_count, access=mmap.ACCESS_COPY), dtype=torch.uint8)


def _fill(buffer: memoryview, file: BufferedReader, stored: StoredTensor, file_bytes: int) -> None:
    got = file.readinto(buffer)
    now_bytes = os.fstat(file.fileno()).st_size
    if got != len(buffer) or now_bytes != file_bytes:
        raise CheckpointError(
            f"{stored.shard}: changed while tensor {shown(stored.name)} was read: {got} of {len(buffer)} bytes "
            f"came, and the file has {now_bytes}, expected {file_bytes}. Let nothing write to it."
        )


@contextmanager
def _open_unchanged(shard: Path, file_bytes: int) -> Iterator[BufferedReader]:
    with open_file(shard, CheckpointError) as file:
        now_bytes = os.fstat(file.fileno()).st_size
        if now_bytes != file_bytes:
            raise CheckpointError(
                f"{shard}: has {now_bytes} bytes, expected the {file_bytes} it had when its header was read. "
                "Let nothing write to it and start again."
            )
        yield file


def _check_against_index(shard: Path, names: Set[str], indexed_names: Set[str]) -> None:
    absent, unexpected = indexed_names - names, names - indexed_names
    if absent:
        raise CheckpointError(
            f"{shard}: tensor {shown(min(absent))} is not in it, against {INDEX_NAME}. Download both again."
        )
    if unexpected:
        raise CheckpointError(
            f"{shard}: tensor {shown(min(unexpected))} is in it, against {INDEX_NAME}. Download both again."
        )
