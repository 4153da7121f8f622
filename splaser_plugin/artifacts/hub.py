"""Upload a finished output folder to the model hub."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from splaser_plugin.artifacts.card import PLACE, public_name
from splaser_plugin.artifacts.recipe import Recipe
from splaser_plugin.checkpoints.folder import hub_errors
from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.errors import ConfigError, OutputError
from splaser_plugin.files.text import first_line_of
from splaser_plugin.scanning.records import Scan

STAYS_HERE = ("results.json", "report.html", "run.yaml", "journal.jsonl")
"""What holds the texts of the pairs, or paths of this machine."""


def check_repo(repo: str) -> None:
    """Refuse, before any work, what can't be pushed to; no network.

    Raises ConfigError when it is no repository's id, OutputError when nobody is logged in.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub: got '{repo}', expected NAME or OWNER/NAME ({error})") from error
    if not get_token():
        raise OutputError(f"--push-to-hub {repo}: no token of the hub is found. Run hf auth login, or set HF_TOKEN.")


def push_to_hub(folder: Path, repo: str) -> str:
    """Upload the model, its card, recipe and scan in one commit; gives the repository's address.

    A repository that doesn't exist yet is made private. Paths in recipe and scan become bare names, and what holds
    the texts of the pairs stays here. Raises OutputError when there is no model, or the hub is out of reach or refuses.
    """
    folder = folder.expanduser().resolve()
    if not (folder / "recipe.json").is_file() or not (folder / "README.md").is_file():
        raise OutputError(f"{folder}: there is no lasered model. Give the output folder of splaser laser.")
    api = HfApi()
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            staged = _staged(folder, Path(temporary) / "model")
            created = api.create_repo(repo, private=True, exist_ok=True)
            _say_place(staged / "README.md", created.repo_id)
            api.upload_folder(repo_id=created.repo_id, folder_path=staged, commit_message="Lasered by splaser")
    except hub_errors() as error:
        raise OutputError(
            f"--push-to-hub {repo}: {first_line_of(error)}. The model is whole in {folder}; push it with "
            f"{shlex.join(['splaser', 'push', str(folder), repo])}"
        ) from error
    return str(created)


def _staged(folder: Path, staged: Path) -> Path:
    """What goes up: the same files without another copy on the disk, but for recipe and scan."""
    shutil.copytree(folder, staged, copy_function=_link, ignore=shutil.ignore_patterns(*STAYS_HERE))
    recipe = Recipe.load(staged / "recipe.json")
    public = replace(recipe, model=public_name(recipe.model), config=_public(recipe.config), unknown_settings={})
    public.save(staged / "recipe.json")
    if (staged / "scan.json").is_file():
        scan = Scan.load(staged / "scan.json")
        replace(scan, model=public_name(scan.model)).save(staged / "scan.json")
    return staged


def _say_place(card: Path, repo: str) -> None:
    """Write the repository's id into the code on the card; the file is a link, so another takes its place."""
    text = card.read_text(encoding="utf-8")
    card.unlink()
    card.write_text(text.replace(PLACE, repo), encoding="utf-8")


def _public(config: LaserConfig) -> LaserConfig:
    """The same options, of paths only the last part."""
    options = config.to_dict().items()
    return LaserConfig.from_dict(
        {name: public_name(value) if isinstance(value, str) else value for name, value in options}
    )


def _link(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
