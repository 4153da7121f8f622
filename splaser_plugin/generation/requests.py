"""Requests to a vLLM server: JSON there and back, with its key, and no longer than it may be silent."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from splaser_plugin.errors import ModelError
from splaser_plugin.files.text import printable

KEYS = ("VLLM_API_KEY", "OPENAI_API_KEY")
"""Environment variables of a server's key, the first that is set: vLLM's server reads one, its own clients another."""
QUICK_S = 60.0
"""Longest silence of a server that has nothing to do for its answer."""
WORK_S = 600.0
"""Longest silence of one that loads weights, or writes: a token of any answer ends it."""
SAID = 200
"""Characters of a server's message that are told."""
LAST = "[DONE]"
"""How a stream ends."""


class RefusedError(Exception):
    """The server says no."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(f"{code}: {said}")
        self.code = code
        self.said = said
        """The first line of its message."""


class SilentError(Exception):
    """The server has said nothing for so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"nothing for {seconds:g} s")
        self.seconds = seconds


def ask(url: str, body: Any = None, *, silence_s: float | None = None) -> Any:
    """The JSON at an address, None for nothing; with a body it is posted there.

    silence_s: how long the server may be silent; QUICK_S where None.
    Raises RefusedError, SilentError, and otherwise what urllib does; ModelError for a key that no server has.
    """
    with _opened(url, body, silence_s or QUICK_S) as answer:
        received = answer.read()
    return json.loads(received) if received else None


def stream(url: str, body: Any) -> Iterator[Any]:
    """Each JSON of an answer that comes in parts, as server-sent events. Raises as `ask` does."""
    with _opened(url, body, WORK_S) as answer:
        for line in answer:
            kind, _, text = line.decode().strip().partition(":")
            if kind != "data":
                continue
            if text.strip() == LAST:
                return
            part = json.loads(text)
            if "error" in part:
                raise RefusedError(part["error"].get("code") or 500, _first_line(part["error"]["message"]))
            yield part
    raise http.client.HTTPException("its answer broke off")


@contextmanager
def _opened(url: str, body: Any, silence_s: float) -> Iterator[http.client.HTTPResponse]:
    sent = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=sent, headers={"Content-Type": "application/json"})
    if key := _key():
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=silence_s) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        raise RefusedError(error.code, _said(error)) from error
    except OSError as error:
        if isinstance(getattr(error, "reason", error), TimeoutError):
            raise SilentError(silence_s) from error
        raise


def _key() -> str:
    """The server's key; empty for none."""
    name = next((name for name in KEYS if os.environ.get(name, "").strip()), "")
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ModelError(f"{name} has characters that no key of a server has. Set it to the server's key, or unset it.")
    return key


def _said(error: urllib.error.HTTPError) -> str:
    try:
        said = json.loads(error.read())["error"]["message"]
    except (OSError, ValueError, LookupError, TypeError):
        said = error.reason
    return _first_line(said)


def _first_line(said: object) -> str:
    """Of a server's message, without the key if it repeats that."""
    text = str(said).strip().partition("\n")[0]
    if key := _key():
        text = text.replace(key, "[the key]")
    return printable(text[:SAID]).rstrip(".")
