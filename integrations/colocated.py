"""The vLLM that a trainer runs in its own process: TRL's colocate mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.errors import ModelError
from splaser_plugin.generation.vllm import check_takes, push_all
from splaser_plugin.generation.vllm_copies import Copy, Local


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
        if llm is not None and (copy := _copy(llm, model)) is not None:
            push_all(copy, model)


def _copy(llm: Any, model: Any) -> Copy | None:
    """What a run may have given weights to; None where it was refused."""
    try:
        check_takes(model)
        return Local(llm, model, longest=0)
    except ModelError:
        return None
