"""Where a model's weights are: a folder or a hub id, and in it the files that hold the tensors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from splaser_plugin.checkpoints.header import parse_json_object
from splaser_plugin.errors import CheckpointError, SplaserError
from splaser_plugin.files.reading import read_bytes
from splaser_plugin.files.sources import looks_like_path, path_of
from splaser_plugin.files.text import shown

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARD_GLOB = "model-*-of-*.safetensors"
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PLAIN_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
# The tokenizer comes along, so that transformers can load the folder, and the card with its licence. Subfolders hold
# other formats.
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*"]
HUB_IGNORED = ["*/*", "consolidated*.safetensors"]

# What a folder without safetensors weights may hold instead, and what helps then.
OTHER_WEIGHTS = (
    ((".gguf",), "GGUF is loaded through transformers: from_pretrained(folder, gguf_file=...)."),
    (("adapter_model.safetensors",), "It is an adapter: merge it (PEFT's merge_and_unload) and save that."),
    (
        (".bin", ".pt", ".pth", ".ckpt"),
        "Pickled weights can run code when they are read, so only safetensors are. If you trust them, pass "
        "--allow-pickle.",
    ),
)


@dataclass(frozen=True)
class ModelFolder:
    """What is in a model's folder, listed once by `inspect`; no file but config.json and the index is opened."""

    path: Path
    names: tuple[str, ...]
    """Of all that is in it, sorted: files, folders and broken links."""
    sizes: Mapping[str, int]
    """Of the files, in bytes; a link has its target's, and a broken one isn't there."""

    def matching(self, pattern: str) -> list[str]:
        """Those of the names that match a pattern of the shell's."""
        return [name for name in self.names if fnmatchcase(name, pattern)]

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json, {} without one. Raises CheckpointError when it is damaged."""
        return read_config(self.path)

    @cached_property
    def names_by_shard(self) -> Mapping[str, set[str]]:
        """The index: shard to its tensors' names; {} without one. Raises CheckpointError when it is damaged."""
        index = self.path / INDEX_NAME
        return parse_index(read_bytes(index, CheckpointError), index) if INDEX_NAME in self.names else {}

    @property
    def has_only_pickles(self) -> bool:
        """Whether the weights are pickled by torch and not there as safetensors."""
        has = {name for name in (SINGLE_NAME, INDEX_NAME, *PICKLED_WEIGHTS) if name in self.sizes}
        return bool(has) and has <= set(PICKLED_WEIGHTS)

    @property
    def weight_bytes(self) -> int:
        """Size of the weights that transformers loads; the folder may hold others. 0 where there are none.

        Raises CheckpointError when the index is damaged.
        """
        single = [SINGLE_NAME] if SINGLE_NAME in self.sizes else []
        names = single or self.names_by_shard or self.matching("pytorch_model*.bin")
        return sum(self.sizes.get(name, 0) for name in names)


def inspect(folder: str | Path | ModelFolder) -> ModelFolder:
    """List a model's folder; what is listed already stays as it is.

    Raises CheckpointError when there is no such folder, or it can't be read.
    """
    if isinstance(folder, ModelFolder):
        return folder
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder. Give a folder with config.json and safetensors weights.")
    try:
        entries = sorted(path.iterdir())
        sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror or error}).") from error
    return ModelFolder(path, tuple(entry.name for entry in entries), sizes)


def resolve_model(model: str, *, allow_pickle: bool = False) -> Path:
    """The local folder of `model`: itself if it is one, else the hub cache's, downloaded there if need be.

    allow_pickle: download pickled weights where there are no safetensors.
    The network is used only for a hub id whose weights aren't all in the cache.
    Raises CheckpointError when there is neither such a folder nor such a model on the hub.
    """
    try:
        folder = path_of(model)
        if model and folder.is_dir():
            return folder
        is_file = folder.is_file()
    except OSError as error:  # too long a name
        raise CheckpointError(f"{shown(model)}: not a usable path or hub id ({error}).") from error
    if is_file:
        raise CheckpointError(f"{shown(model)}: it is a file. Give the folder that holds it.")
    if looks_like_path(model):
        raise CheckpointError(f"{shown(model)}: no such folder. Give a model's folder or a hub id.")
    return _from_hub(model, allow_pickle)


def hub_errors() -> tuple[type[Exception], ...]:
    """The hub's own error and its bases: those of its HTTP library, which isn't always the same one, and OSError."""
    from huggingface_hub.errors import HfHubHTTPError

    return (HfHubHTTPError, *HfHubHTTPError.__bases__, OSError)


@contextmanager
def reaching_hub(name: str, kind: type[SplaserError], advice: str) -> Iterator[None]:
    """Around a download: what goes wrong with it is raised as an error of one line. name: what isn't there."""
    unusable: tuple[type[Exception], ...] = (ValueError, *hub_errors())
    try:
        yield
    except unusable as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise kind(
            f"{name}: no such folder here, and as a hub id it is neither in the cache nor can it be downloaded "
            f"({reason[:200]}). {advice}"
        ) from error


def find_shards(model: str | Path | ModelFolder) -> dict[Path, set[str] | None]:
    """The files in a folder that hold the weights, sorted by name, each with its tensors' names in the index.

    The names are None for `model.safetensors` without an index.
    Raises CheckpointError when there are no weights, when the shards there are not those the index names, or
    when one is a link that leads out of the folder; into the hub cache's `blobs` it may.
    """
    folder = inspect(model)
    present = {name for pattern in (SINGLE_NAME, SHARD_GLOB) for name in folder.matching(pattern)}
    if INDEX_NAME not in folder.names:
        if present != {SINGLE_NAME}:
            raise CheckpointError(_why_not_readable(folder, present))
        _check_links(folder.path, present)
        return {folder.path / SINGLE_NAME: None}
    names_by_shard = folder.names_by_shard
    missing = sorted(name for name in names_by_shard if name not in folder.sizes)
    if missing:
        raise CheckpointError(
            f"{folder.path / missing[0]}: missing or a broken link, as are {len(missing)} of "
            f"{len(names_by_shard)} shards in {INDEX_NAME}. Download the model again."
        )
    unknown = sorted(present - names_by_shard.keys())
    if unknown:
        raise CheckpointError(
            f"{folder.path}: {shown(unknown[0])} is there, but not in {INDEX_NAME}. Remove what doesn't belong."
        )
    _check_links(folder.path, names_by_shard)
    return {folder.path / name: names_by_shard[name] for name in sorted(names_by_shard)}


def parse_index(text: bytes, index: Path) -> dict[str, set[str]]:
    """Shard name to the names of its tensors, from the bytes of the index file `index`.

    Raises CheckpointError when it isn't such an index, or when a shard's name could lead out of the folder.
    """
    weight_map = parse_json_object(text, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is {shown(weight_map)}, expected tensor names to shards.")
    names_by_shard: defaultdict[str, set[str]] = defaultdict(set)
    for name, shard_name in weight_map.items():
        if not isinstance(shard_name, str) or not PLAIN_SHARD_NAME.fullmatch(shard_name):
            raise CheckpointError(
                f"{index}: tensor {shown(name)} is in {shown(shard_name)}, "
                "expected the plain name of a .safetensors file beside the index."
            )
        names_by_shard[shard_name].add(name)
    return dict(names_by_shard)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of the model in `folder`, {} without one. Raises CheckpointError when it is damaged."""
    config = folder / "config.json"
    return read_object(config) if config.exists() else {}


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises CheckpointError when it can't be read, is enormous, or is none."""
    # transformers lets a key's last value win here, and such configs work
    return parse_json_object(read_bytes(file, CheckpointError), file, unique_keys=False)


def _check_links(folder: Path, names: Iterable[str]) -> None:
    inside = folder.resolve()
    for name in sorted(names):
        target = (folder / name).resolve()
        if not target.is_relative_to(inside) and target.parent.name != "blobs":
            raise CheckpointError(
                f"{folder / name}: is a link to {shown(str(target))}, out of the folder. Give the folder that holds "
                "the files themselves."
            )


def _why_not_readable(folder: ModelFolder, present: set[str]) -> str:
    if present:
        return f"{folder.path}: {shown(min(present))} is a shard, but {INDEX_NAME} is missing. Download that too."
    for suffixes, advice in OTHER_WEIGHTS:
        found = [name for name in folder.names if name.endswith(suffixes)]
        if found:
            return f"{folder.path}: no safetensors weights, only {shown(found[0])}. {advice}"
    if "snapshots" in folder.names:
        return f"{folder.path}: this is a repository of the hub's cache. Give the folder snapshots/HASH in it."
    listed = ", ".join(shown(name) for name in folder.names[:5]) or "nothing"
    return f"{folder.path}: no weights. Expected {SINGLE_NAME} or {INDEX_NAME}, found {listed}."


def _from_hub(model: str, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with reaching_hub(shown(model), CheckpointError, "Check the spelling, the connection and your access."):
        try:
            cached = Path(snapshot_download(model, local_files_only=True))
            find_shards(cached)
            return cached
        except (LocalEntryNotFoundError, CheckpointError):  # not there, or only a part of it
            folder = Path(snapshot_download(model, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
        if allow_pickle and not any(folder.glob("*.safetensors")):
            snapshot_download(model, allow_patterns=["pytorch_model*.bin"])
        return folder
