"""Text from anywhere, as it may be printed, quoted in a message, or shown on a page.

What else escapes text builds on these: rich's markup in `cli.terminal`, Markdown in `artifacts.card`.
"""

from __future__ import annotations

import reprlib
import unicodedata

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 160
MESSAGE_CHARS = 4000


def printable(text: str, max_chars: int = MESSAGE_CHARS) -> str:
    r"""`text` as a terminal may get it, on one line: what isn't printable is spelled out, and the middle left out.

    Escapes, other control characters and changes of writing direction are spelled as in Python: `\x1b`.
    """
    if len(text) > max_chars:
        text = f"{text[: max_chars // 2]} ... {text[-(max_chars // 2) :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line_of(error: BaseException) -> str:
    """Of another library's message, at most 200 of its characters, printable; the error's kind where it has none.

    A line that ends in a colon goes on with the next one.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    ends = next((place for place, line in enumerate(lines) if not line.endswith(":")), len(lines))
    return printable(" ".join(lines[: ends + 1])[:200] or type(error).__name__)


def shown(value: object) -> str:
    """`value` as a message may carry it: quoted, shortened, control and escape characters spelled out."""
    return _repr.repr(value)


def visible(text: str) -> str:
    """Untrusted text as a page may show it: control characters, bidirectional overrides and lone surrogates
    are spelled out; line breaks, tabs and every script's own characters stay.
    """
    return "".join(repr(char)[1:-1] if _is_unsafe(char) else char for char in text)


def _is_unsafe(char: str) -> bool:
    if char in "\n\t":
        return False
    return unicodedata.category(char) in ("Cc", "Cs") or unicodedata.bidirectional(char) in _BIDI_CONTROLS


_BIDI_CONTROLS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
