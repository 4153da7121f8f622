"""A vLLM server: weights go to it by way of a folder that it reads, prompts and answers over HTTP."""

from __future__ import annotations

import atexit
import http.client
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from splaser_plugin.errors import ModelError, ScoreError
from splaser_plugin.generation.requests import KEYS, WORK_S, RefusedError, SilentError, ask, stream
from splaser_plugin.generation.vllm_copies import Written, check_fits

WEIGHTS = "model.safetensors"
GREEDY = {
    "temperature": 0,
    "top_p": 1,
    "top_k": 0,
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
"""What a server would otherwise take from the model's own generation settings."""
NOT_FINITE = "Out of range float values"
"""How the message begins where a server has no finite log-probabilities to send."""
NO_SERVER = "no vLLM server answers there"
START = "Start one: `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL`, or use --engine transformers."
MODELS = "/v1/models"
RESET = "/reset_prefix_cache"
RESETS, RESET_WAIT_S = 20, 0.1
"""How often a server is asked to throw away what it keeps of prompts, as it can't while it answers."""


class Server:
    """A copy of the model in a vLLM server, which gets its own weights back at the end of this process.

    longest: tokens of the longest prompt and its answer. Raises ModelError when it isn't there, can't take weights, or
    hasn't this kind of model.
    """

    def __init__(self, url: str, model: Any, *, longest: int) -> None:
        self._url = url.rstrip("/")
        self.where = f"in the server at {self._url}"
        self._whose = f"--engine-url {self._url}"
        served = self._asked(MODELS)
        try:
            self._name = served["data"][0]["id"]
            root = served["data"][0].get("root") or self._name
        except (LookupError, TypeError, AttributeError) as error:
            raise ModelError(f"{self._whose}: {NO_SERVER}. {START}") from error
        check_fits(self._config(root), _stored_config(root), model, longest=longest, whose=self._whose)
        self._root = root
        _restore_at_exit(self._url, root)

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """See `Copy.load`."""
        with tempfile.TemporaryDirectory(prefix="splaser-vllm-") as folder:
            Path(folder).chmod(0o755)  # the server may be another user's
            save_file({name: tensor.contiguous() for name, tensor in tensors}, Path(folder) / WEIGHTS)
            (Path(folder) / WEIGHTS).chmod(0o644)
            advice = (
                f"It has to see {folder} (set TMPDIR to a folder that both see) and to serve this model; or use "
                "--engine transformers."
            )
            try:
                self._asked("/collective_rpc", _reload(folder), advice=advice, silence_s=WORK_S)
            except ModelError as error:
                if isinstance(error.__cause__, RefusedError):
                    restore(self._url, self._root)  # it would end at its next answer
                raise
        if not _forgets(lambda: self._asked(RESET, {})):
            raise ModelError(f"{self._whose}: the server is at work for others. Give one that nobody else uses.")

    def answers(self, prompts: Sequence[Sequence[int]], rooms: Sequence[int], ends: Sequence[int]) -> list[Written]:
        """See `Copy.answers`."""
        found: list[Written] = [([], []) for _ in prompts]
        for room in sorted(set(rooms)):
            places = [place for place, own in enumerate(rooms) if own == room]
            asked = {
                "model": self._name,
                "prompt": [list(prompts[place]) for place in places],
                "max_tokens": room,
                "stop_token_ids": list(ends),
                "ignore_eos": True,
                "logprobs": 0,
                "return_token_ids": True,
                "add_special_tokens": False,
                "stream": True,
                **GREEDY,
            }
            with self._told("/v1/completions"):
                for part in stream(self._url + "/v1/completions", asked):
                    for choice in part["choices"]:
                        tokens, likelihoods = found[places[choice["index"]]]
                        tokens += choice["token_ids"] or []
                        likelihoods += _likelihoods(choice)
        return found

    def stop(self) -> None:
        """See `Copy.stop`."""

    def _config(self, root: str) -> dict[str, Any]:
        """What `check_fits` reads."""
        try:
            found = self._asked("/server_info?config_format=json")["vllm_config"]["model_config"]
        except ModelError as error:
            if isinstance(error.__cause__, RefusedError):
                raise ModelError(
                    f"{self._whose}: this server takes no weights. Start it anew with VLLM_SERVER_DEV_MODE=1 in its "
                    f"environment: `VLLM_SERVER_DEV_MODE=1 vllm serve {root}`, or use --engine transformers."
                ) from error
            raise
        return {**found, "dtype": found["dtype"].removeprefix("torch.")}

    def _asked(
        self, path: str, body: Any = None, *, advice: str = "Use --engine transformers.", silence_s: float | None = None
    ) -> Any:
        """What the server answers, None for nothing. advice: what to do where it refuses. Raises ModelError."""
        with self._told(path, advice):
            return ask(self._url + path, body, silence_s=silence_s)

    @contextmanager
    def _told(self, path: str, advice: str = "Use --engine transformers.") -> Iterator[None]:
        """Inside, failures of requests are told in one line."""
        place = path.partition("?")[0]
        try:
            yield
        except RefusedError as error:
            if error.said.startswith(NOT_FINITE):
                raise ScoreError("the model's logits are nan, so that it has no answers.") from error
            if error.code in (401, 403):
                advice = f"Set {KEYS[0]} to the key that it was started with, or use --engine transformers."
            raise ModelError(f"{self._whose}: {place} answers {error}. {advice}") from error
        except SilentError as error:
            raise ModelError(
                f"{self._whose}: {place} has answered {error}, as if the server hung. Start it anew, and run this "
                "again: with the same --output it goes on where it stopped."
            ) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ModelError(f"{self._whose}: {NO_SERVER} ({getattr(error, 'reason', error)}). {START}") from error


def _reload(folder: str) -> dict[str, Any]:
    """What has a server load the weights of a folder."""
    return {"method": "reload_weights", "kwargs": {"weights_path": folder}}


def _likelihoods(choice: Any) -> list[float]:
    """Of the tokens in a part of an answer; JSON has null for nan."""
    found = (choice["logprobs"] or {}).get("token_logprobs") or []
    return [math.nan if likelihood is None else likelihood for likelihood in found]


def _stored_config(root: str) -> Any:
    """The configuration of the model that is served; None where that isn't on this machine."""
    try:
        return AutoConfig.from_pretrained(root, local_files_only=True)
    except (OSError, ValueError):
        return None


@cache
def _restore_at_exit(url: str, root: str) -> None:
    atexit.register(restore, url, root)


def restore(url: str, root: str) -> None:
    """Have a server load its own weights again, if it still runs; say so where it can't."""
    try:
        ask(url + MODELS)  # one that hangs isn't waited for as long as weights take
        ask(url + "/collective_rpc", _reload(root), silence_s=WORK_S)
        is_restored = _forgets(lambda: ask(url + RESET, {}))
    except (RefusedError, SilentError):
        is_restored = False
    except (OSError, http.client.HTTPException):  # it is gone
        return
    if not is_restored:
        print(f"{url}: the vLLM server may still have a candidate's weights. Start it anew.", file=sys.stderr)


def _forgets(reset: Callable[[], Any]) -> bool:
    """Whether a server throws away what it keeps of prompts, asked by `reset`."""
    for _ in range(RESETS):
        found = reset()
        if found is None or found["success"]:  # older ones answer nothing
            return True
        time.sleep(RESET_WAIT_S)
    return False
