"""Sentences on stderr in lines that a terminal doesn't break inside a word."""

from __future__ import annotations

import os
import sys
import textwrap


def fitted(line: str, mark: str = "") -> str:
    """The line as a terminal has room for it; elsewhere as it is. Paths stay whole, to be copied.

    mark: ends every line but the last.
    """
    if not sys.stderr.isatty():
        return line
    columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
    lines = textwrap.wrap(line, columns - len(mark), break_long_words=False, break_on_hyphens=False)
    return f"{mark}\n".join(lines)
