"""How one model is spread over several devices as it is loaded: what `from_pretrained` is told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from splaser_plugin.config.placement import memory_limits
from splaser_plugin.distributed import process_count
from splaser_plugin.errors import ConfigError, ModelError

LAUNCHED_WITH_FSDP = "ACCELERATE_USE_FSDP"
FSDP_VERSION = "FSDP_VERSION"
ONLY_MAIN_LOADS = "FSDP_CPU_RAM_EFFICIENT_LOADING"
TENSOR_PARALLEL_SIZE = "PARALLELISM_CONFIG_TP_SIZE"
"""What `accelerate launch` tells the processes that it starts."""


def resolved_map(device_map: str) -> str:
    """`none`, `auto`, `fsdp` or `tp`: what was asked for here, or of `accelerate launch`.

    Raises ConfigError when that doesn't go with the processes there are.
    """
    launched = _asked_of_launcher()
    if device_map == "none":
        device_map = launched
    elif launched not in ("none", device_map):
        raise ConfigError(f"--device-map {device_map}: `accelerate launch` was told {launched}. Leave one of them out.")
    count = process_count()
    if device_map == "auto" and count > 1:
        raise ConfigError(
            f"--device-map auto gives one process all devices, and there are {count}. Start splaser without a "
            "launcher, or give --device-map fsdp or tp."
        )
    if device_map in ("fsdp", "tp") and count == 1:
        raise ConfigError(
            f"--device-map {device_map} spreads the model over processes, and there is one. Start several, as in "
            "`accelerate launch --num_processes 2 --no_python splaser laser ...`, or give --device-map auto."
        )
    return device_map


def _asked_of_launcher() -> str:
    if int(os.environ.get(TENSOR_PARALLEL_SIZE, "1")) > 1:
        if int(os.environ[TENSOR_PARALLEL_SIZE]) != process_count():
            raise ConfigError(
                f"`accelerate launch` was told a tensor parallel size of {os.environ[TENSOR_PARALLEL_SIZE]} for "
                f"{process_count()} processes, and one model takes all of them. Give both the same number."
            )
        return "tp"
    if os.environ.get(LAUNCHED_WITH_FSDP, "").lower() not in ("true", "1"):
        return "none"
    if os.environ.get(FSDP_VERSION, "1") != "2":
        raise ModelError("FSDP version 1 flattens the weights. Use version 2: `accelerate launch --fsdp_version 2`.")
    return "fsdp" if process_count() > 1 else "none"


def arguments_of(device_map: str, max_memory: tuple[str, ...], folder: str) -> dict[str, Any]:
    """What `from_pretrained` is to be given. folder: for weights on disk that the model's own files don't have so.

    Raises ModelError when this version of transformers can't do it.
    """
    if device_map == "auto":
        limits = {"max_memory": memory_limits(max_memory)} if max_memory else {}
        return {"device_map": "auto", "offload_folder": folder, **limits}
    if device_map == "none":
        return {}
    try:
        from transformers.distributed import DistributedConfig

        size: dict[str, Any] = {{"fsdp": "fsdp_size", "tp": "tp_size"}[device_map]: process_count()}
        return {"distributed_config": DistributedConfig(**size)}
    except (ImportError, TypeError) as error:
        raise ModelError(
            f"--device-map {device_map}: this version of transformers doesn't spread models over processes. Install "
            "a newer one: `pip install --upgrade transformers`."
        ) from error


@contextmanager
def every_process_loads() -> Iterator[None]:
    """Inside, transformers loads the weights in every process: launched with FSDP it may leave them to the first,
    from which accelerate would send them to the others as it prepares a training.
    """
    before = os.environ.pop(ONLY_MAIN_LOADS, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[ONLY_MAIN_LOADS] = before
