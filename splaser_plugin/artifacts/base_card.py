"""What a lasered model's card takes over from its base: its place on the hub, licence, data sets and languages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from splaser_plugin.checkpoints.folder import hub_errors, read_config
from splaser_plugin.checkpoints.skeleton import answering_class
from splaser_plugin.errors import CheckpointError
from splaser_plugin.files.reading import read_bytes
from splaser_plugin.files.sources import is_hub_id, path_of

MAX_BYTES = 5_000_000
CAUSAL = "AutoModelForCausalLM"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,99}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{1,8})*")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


@dataclass(frozen=True, kw_only=True)
class BaseCard:
    """What is known of a base model. All of it can go on a public card."""

    hub_id: str | None = None
    """OWNER/NAME; None where nothing says it."""
    license: str | None = None
    license_name: str | None = None
    """Of a licence that the hub has no id for."""
    license_link: str | None = None
    datasets: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    auto_class: str = CAUSAL
    """Of transformers, that loads it."""

    @property
    def pipeline_tag(self) -> str:
        return "text-generation" if self.auto_class == CAUSAL else "image-text-to-text"


def base_card(name: str, config: Any, folder: str | Path | None = None) -> BaseCard:
    """What a base model's own card and config.json say.

    Args:
        name: As the recipe calls it: a folder, a .gguf file, a hub id, or another name of a model in memory.
        config: The loaded model's configuration.
        folder: Where its files are, if not under that name.

    The network is used only for a hub id whose card isn't in the cache; what can't be had or read is left out.
    """
    place = path_of(folder if folder is not None else name)
    place = place.parent if place.is_file() else place
    hub_id = name if is_on_hub(name) else _id_in(place)
    said = _said(place / "README.md" if place.is_dir() else _card_on_hub(hub_id))
    if hub_id is None and is_on_hub(_first(said.get("base_model"))):
        hub_id = _first(said["base_model"])
    return BaseCard(
        hub_id=hub_id,
        **_license(said, hub_id, place),
        datasets=tuple(name for name in _strings(said.get("datasets")) if is_repo_id(name)),
        languages=tuple(language for language in _strings(said.get("language")) if _LANGUAGE.fullmatch(language)),
        auto_class=answering_class(config).__name__,
    )


def is_on_hub(name: str) -> bool:
    """Whether it is OWNER/NAME, as the hub takes it, and nothing here."""
    return "/" in name and is_hub_id(name) and is_repo_id(name)


def is_repo_id(name: str) -> bool:
    """Whether the hub allows the name: it refuses a card that has anything else as a base model or a data set."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _id_in(folder: Path) -> str | None:
    """The hub id that a folder's place in the hub's cache or its config.json tells."""
    cached = _CACHED.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    if cached:
        return f"{cached[1]}/{cached[2]}"
    name = None
    if folder.is_dir():
        with suppress(CheckpointError):
            name = read_config(folder).get("_name_or_path")
    return name if isinstance(name, str) and is_on_hub(name) else None


def _card_on_hub(hub_id: str | None) -> Path | None:
    if hub_id is None:
        return None
    unreachable: tuple[type[Exception], ...] = (ValueError, *hub_errors())
    try:
        return Path(hf_hub_download(hub_id, "README.md"))
    except unreachable:
        return None


def _said(card: Path | None) -> Mapping[str, Any]:
    """A card's metadata, {} where there is none that can be read."""
    if card is None or not card.is_file():
        return {}
    try:
        text = read_bytes(card, CheckpointError, MAX_BYTES).decode("utf-8")
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # YAML of whatever kind: huggingface_hub and PyYAML raise what they meet in it
        return {}


def _license(said: Mapping[str, Any], hub_id: str | None, folder: Path) -> dict[str, str | None]:
    name = _first(said.get("license"))
    if not _LICENSE.fullmatch(name):
        return {}
    link = _first(said.get("license_link"))
    if not re.fullmatch(r"https?://[^\s<>\"']+", link):  # a file beside the card
        is_file = bool(re.fullmatch(r"[\w.-]+", link))
        there = is_file and hub_id and not (folder / link).is_file()
        link = f"https://huggingface.co/{hub_id}/blob/main/{link}" if there else link if is_file else ""
    return {"license": name, "license_name": _first(said.get("license_name")) or None, "license_link": link or None}


def _strings(value: Any) -> list[str]:
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


def _first(value: Any) -> str:
    return next(iter(_strings(value)), "")
