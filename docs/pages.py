"""A hook of MkDocs: the pages that lie outside docs/ join the site, and links between them and docs/ lead to pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "RELEASE.md": "release.md",
}
"""Files of the repository's root, and what they are called on the site."""
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside."""
    for source, name in OUTSIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Make each link hold on the site, where what is no page of it is shown in the repository."""
    outside = page.file.src_uri in OUTSIDE.values()
    folder = ROOT if outside else ROOT / "docs"

    def on_site(found: re.Match[str]) -> str:
        path, anchor = found[1], found[2] or ""
        target = (folder / path).resolve().relative_to(ROOT)
        if str(target) in OUTSIDE:
            return OUTSIDE[str(target)] + anchor
        if target.parts[0] == "docs":
            return target.relative_to("docs").as_posix() + anchor
        return f"{config.repo_url}/blob/main/{target.as_posix()}{anchor}"

    if outside:
        source = next(path for path, uri in OUTSIDE.items() if uri == page.file.src_uri)
        page.edit_url = f"{config.repo_url}/edit/main/{source}"
    return LINK.sub(on_site, markdown)
