"""vLLM as an engine: its copy of the model, in this process or in a server, is given each block that changes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from splaser_plugin.checkpoints.roles import has_adapters
from splaser_plugin.distributed import process_count
from splaser_plugin.errors import ModelError, ScoreError, SplaserError
from splaser_plugin.generation.engines import PROBES, answering, obstacle
from splaser_plugin.generation.vllm_copies import Copy, Local, Written, refusal
from splaser_plugin.generation.vllm_server import Server
from splaser_plugin.progress import count_items

PROBE_TOKENS = 4
BLOCK = re.compile(r"(.*?\.\d+)\.(.+)")
"""A parameter's name: its block, and its name in there."""


class Vllm:
    """The engine `vllm`.

    vLLM fuses what reads the same input, and may pack the result, so that the whole block of a changed weight goes to
    it, under the names that a checkpoint has; it keeps nothing of earlier prompts.

    Raises ModelError for a model that it can't take.

    Args:
        model: The model that it is to answer as.
        ends: Token ids that end an answer.
        longest: Tokens of the longest prompt and its answer.
        batch_size: Prompts at once, where it is started here.
        url: Address of a server that has the copy.
        llm: A `vllm.LLM` of this process that is there already. Without these, one is started.
    """

    name = "vllm"

    def __init__(
        self, model: Any, ends: Sequence[int], *, longest: int, batch_size: int, url: str = "", llm: Any = None
    ) -> None:
        check_takes(model)
        self.model = model
        self.at_once = batch_size
        self._ends = list(ends)
        self._copy: Copy
        if url:
            self._copy = Server(url, model, longest=longest)
        elif llm is not None:
            self._copy = Local(llm, model, longest=longest)
        else:
            self._copy = Local.started(model, longest=longest, at_once=batch_size)
        self.where = self._copy.where
        self._states = _states(model)
        try:
            self._check_follows(has_others=bool(url) or llm is not None)
        except SplaserError:
            self.stop()
            raise

    def stop(self) -> None:
        """See `Copy.stop`."""
        self._copy.stop()

    def fixed(self) -> Vllm:
        return self

    def write(self, prompts: Sequence[Sequence[int]], rooms: Sequence[int], expected: Sequence[int]) -> list[list[int]]:
        """See `Engine.write`."""
        self._follow()
        going = [place for place, room in enumerate(rooms) if room > 0]
        with answering(self):
            found = self._answers([prompts[place] for place in going], [rooms[place] for place in going])
        if any(math.isnan(likelihood) for _, likelihoods in found for likelihood in likelihoods):
            raise ScoreError("the model's logits are nan, so that it has no answers.")
        count_items(len(prompts))
        said: list[list[int]] = [[] for _ in prompts]
        for place, (tokens, _) in zip(going, found, strict=True):
            said[place] = tokens
        return said

    def _answers(self, prompts: Sequence[Sequence[int]], rooms: Sequence[int]) -> list[Written]:
        return self._copy.answers(prompts, rooms, self._ends)

    def _follow(self) -> None:
        """Push what has changed since the last time."""
        now = _states(self.model)
        changed = [name for name in now if now[name] != self._states.get(name)]
        places = {name: BLOCK.fullmatch(name) for name in changed}
        outside = [name for name, place in places.items() if place is None]
        if outside:
            raise ModelError(
                f"--engine vllm follows changes of blocks alone, and {outside[0]} has changed. Use --engine "
                "transformers."
            )
        self._push(sorted({place[1] for place in places.values() if place}))
        self._states = now

    def _push(self, blocks: Sequence[str], without: str = "") -> None:
        """Give vLLM all parameters of some blocks. without: one that is zero there."""
        if blocks:
            self._copy.load(_tensors(self.model, set(blocks), without))

    def _check_follows(self, *, has_others: bool) -> None:
        """Raise ModelError unless it answers, and follows a change of every kind of matrix.

        has_others: whether its weights may be others than the model's.
        """
        try:
            if has_others:
                push_all(self._copy, self.model)
            name = self._not_followed()
        except SplaserError:
            raise
        except Exception as error:
            raise refusal(self.model, error) from error
        if name is not None:
            raise ModelError(
                f"--engine vllm doesn't follow a change of {name} in {type(self.model).__name__}. Use --engine "
                "transformers."
            )

    def _not_followed(self) -> str | None:
        """A matrix that changes no answer when it is zero, among the first of each kind; None where there is none.

        vLLM passes over names that it doesn't know, without a word.
        """
        first: dict[str, str] = {}
        for name, parameter in self.model.named_parameters():
            if (place := BLOCK.fullmatch(name)) and parameter.ndim > 1:
                first.setdefault(place[2], place[1])
        before = self._probe()
        for kind, block in first.items():
            name = f"{block}.{kind}"
            self._push([block], without=name)
            changed = self._probe()
            self._push([block])
            if changed == before or self._probe() != before:
                return name
        return None

    def _probe(self) -> list[Written]:
        return self._answers(PROBES[:1], [PROBE_TOKENS])


def push_all(copy: Copy, model: Any) -> None:
    """Give a copy all parameters of the model, whatever it has."""
    copy.load(_tensors(model))


def check_takes(model: Any) -> None:
    """Raise ModelError for what no vLLM takes."""
    reason = obstacle(model)
    if process_count() > 1:
        reason = reason or "is here in several processes"
    elif has_adapters(model):
        reason = reason or "has adapters"
    if reason:
        raise ModelError(f"--engine vllm: {type(model).__name__} {reason}. Use --engine transformers.")


def _tensors(model: Any, blocks: set[str] | None = None, without: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters by a checkpoint's names, block by block. blocks: only those. without: one that is zero."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        place = BLOCK.fullmatch(name)
        block = place[1] if place else ""
        if blocks is None or block in blocks:
            value = parameter.detach()
            parts.setdefault(block, {})[name] = torch.zeros_like(value) if name == without else value
    for part in parts.values():
        stored: Mapping[str, Tensor] = revert_weight_conversion(model, part)
        yield from stored.items()


def _states(model: Any) -> dict[str, tuple[int, int]]:
    """Where each parameter is, and how often it was written to."""
    return {name: (parameter.data_ptr(), parameter._version) for name, parameter in model.named_parameters()}
