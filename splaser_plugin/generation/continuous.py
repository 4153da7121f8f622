"""transformers' continuous batching: a prompt takes the place of an answer as soon as that ends, in a paged cache."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import transformers
from transformers import GenerationConfig

from splaser_plugin.errors import ModelError, ScoreError
from splaser_plugin.generation.engines import answering, obstacle
from splaser_plugin.generation.evaluation import evaluating, plain_generation
from splaser_plugin.progress import count_items

LEAST_VERSION = (5, 24)
"""Of transformers, the first with the interface used here."""
PAGE_TOKENS = 256
CPU_BATCH_TOKENS = 256
"""Most tokens in one forward pass on the CPU, where transformers can't tell it from the device's memory."""
WAIT_S = 1.0


class ContinuousBatching:
    """The engine `continuous`.

    A manager keeps the keys and values of prompts that it has seen, which a change of a weight makes wrong: every
    call has a new one. Raises ModelError for a model that it can't take.
    """

    name = "continuous"

    def __init__(self, model: Any, ends: Sequence[int], *, pad: int, batch_size: int) -> None:
        _check(model)
        self.model = model
        self.at_once = batch_size
        self._ends = list(ends) or [-1]
        self._pad = pad

    def fixed(self) -> ContinuousBatching:
        return self

    def write(self, prompts: Sequence[Sequence[int]], rooms: Sequence[int], expected: Sequence[int]) -> list[list[int]]:
        """See `Engine.write`."""
        if not prompts:
            return []
        longest = max(len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True))
        with answering(self), _silent(), plain_generation(self.model), evaluating(self.model):
            found = self._written(prompts, rooms, self._config(longest))
        if any(map(math.isnan, (value for output in found for value in output.logprobs))):
            raise ScoreError("the model's logits are nan, so that it has no answers.")
        return [list(output.generated_tokens) for output in found]

    def _written(self, prompts: Sequence[Sequence[int]], rooms: Sequence[int], config: Any) -> list[Any]:
        """What transformers' manager gives for each prompt."""
        if hasattr(self.model, "_cached_continuous_batching_manager"):
            self.model.destroy_cached_continuous_batching_manager()
        generation = GenerationConfig(do_sample=False, eos_token_id=self._ends, pad_token_id=self._pad)
        found: dict[int, Any] = {}
        with self.model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config, warmup=False
        ) as manager:
            for place in sorted(range(len(prompts)), key=lambda place: list(prompts[place])):
                manager.add_request(list(prompts[place]), request_id=str(place), max_new_tokens=rooms[place])
            while len(found) < len(prompts):
                output = manager.get_result(timeout=WAIT_S)
                if output is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching stopped before all answers were there")
                if output is not None and output.error is not None:
                    raise RuntimeError(output.error)
                if output is not None and output.is_finished():
                    found[int(output.request_id)] = output
                    count_items(1)
        return [found[place] for place in range(len(prompts))]

    def _config(self, longest: int) -> Any:
        """longest: tokens of the longest prompt and its answer."""
        is_on_cpu = self.model.device.type == "cpu"
        pages = self.at_once * (math.ceil(longest / PAGE_TOKENS) + 1)
        return transformers.ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=pages if is_on_cpu else None,
            max_batch_tokens=max(CPU_BATCH_TOKENS, self.at_once) if is_on_cpu else None,
            max_requests_per_batch=self.at_once,
            return_logprobs=True,
            auto_switch_to_flash=False,
        )


def is_installed() -> bool:
    """Whether this transformers has it."""
    return tuple(map(int, transformers.__version__.split(".")[:2])) >= LEAST_VERSION


def _check(model: Any) -> None:
    if not is_installed():
        raise ModelError(
            f"--engine continuous needs transformers {'.'.join(map(str, LEAST_VERSION))} or newer, and this is "
            f"{transformers.__version__}. Use --engine transformers, or upgrade it."
        )
    reason = obstacle(model)
    if not reason and not hasattr(model, "continuous_batching_context_manager"):
        reason = "has no continuous batching"
    if reason:
        raise ModelError(f"--engine continuous: {type(model).__name__} {reason}. Use --engine transformers.")


@contextmanager
def _silent() -> Iterator[None]:
    """Without the log lines of a manager: what goes wrong is raised."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
