"""The name that a user gives for a model, pairs, a text or an embedder: one rule for what is a path and what a hub id.

What is there is a path. What isn't, but begins with ., / or ~, has a backslash or more than one /, was meant as one.
All else is a hub id, NAME or OWNER/NAME.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def path_of(name: str | Path) -> Path:
    """The path that a name is, if it is one: ~ is the user's home."""
    path = Path(name)
    with suppress(RuntimeError):  # a home that nobody has
        path = path.expanduser()
    return path


def looks_like_path(name: str | Path) -> bool:
    """Whether a name that is no file or folder here was meant as one, and not as a hub id."""
    return isinstance(name, Path) or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def is_hub_id(name: str | Path) -> bool:
    """Whether a name can be that of something on the hub, and is of nothing here."""
    return not looks_like_path(name) and _HUB_ID.fullmatch(str(name)) is not None and not path_of(name).exists()
