"""The vLLM that a trainer runs in its own process: TRL's colocate mode."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.errors import ModelError
from splaser_plugin.files.text import first_line_of
from splaser_plugin.generation.vllm import check_takes, push_all
from splaser_plugin.generation.vllm_copies import Local

logger = logging.getLogger(__name__)


def find_llm(trainer: Any, config: LaserConfig) -> Any:
    """The trainer's `vllm.LLM`, for a run of these options; None where it has none, or another engine is asked for.

    Raises ModelError when it is asked for and can't be used.
    """
    if config.engine not in ("auto", "vllm") or config.engine_url or "semantic" not in config.scorers:
        return None
    generation: Any = getattr(trainer, "vllm_generation", None)
    reason = ""
    if getattr(generation, "mode", None) != "colocate":
        reason = "this trainer runs no vLLM in its own process. Give it use_vllm=True and vllm_mode='colocate'"
    elif generation.enable_sleep_mode:
        reason = "the trainer's vLLM sleeps between its steps, without weights. Set vllm_enable_sleep_mode=False"
    if reason and config.engine == "vllm":
        raise ModelError(f"--engine vllm: {reason}, give --engine-url, or use --engine transformers.")
    return None if reason else generation.llm


@contextmanager
def lent(trainer: Any, model: Any, config: LaserConfig) -> Iterator[Any]:
    """Inside, the `vllm.LLM` of `find_llm`; afterwards that has the model's weights as they are then."""
    llm = find_llm(trainer, config)
    try:
        yield llm
    finally:
        if llm is not None:
            _give_back(llm, model)


def _give_back(llm: Any, model: Any) -> None:
    """Give it the model's weights, unless a run was refused it. A failure is logged: the run's result is kept."""
    try:
        check_takes(model)
        copy = Local(llm, model, longest=0)
    except ModelError:
        return
    try:
        push_all(copy, model)
    except Exception as error:  # vLLM raises anything
        logger.warning(
            "the trainer's vLLM doesn't take the model's weights (%s: %s), so that its answers may be of others. Start "
            "it anew, and use engine='transformers'.",
            type(error).__name__,
            first_line_of(error),
        )
