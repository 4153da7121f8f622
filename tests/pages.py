"""The pages of documentation and the blocks in them."""

from __future__ import annotations

import re
import shlex

from tests.builders import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands_of(code):
    """The words of each command of a block; a line that ends with a backslash goes on."""
    return [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").strip().splitlines()]
