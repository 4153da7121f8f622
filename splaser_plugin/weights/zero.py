"""DeepSpeed's ZeRO: a model in parts that computes whole, and an optimizer with fp32 copies of the weights."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from splaser_plugin.distributed import gather, is_partitioned, whole
from splaser_plugin.errors import ModelError
from splaser_plugin.files.output import size

MOST_OF_MEMORY = 0.8
"""How much of the free memory a gathered model may take: the rest is for the answers' keys, values and logits."""
OFFLINE = "Save the trained model and run `splaser laser` on the checkpoint (with `--adapter DIR` for a LoRA adapter)."
NO_ZERO = f"DeepSpeed without ZeRO can't be lasered in. Set zero_optimization.stage to 1, 2 or 3. {OFFLINE}"
NO_PLAIN_ZERO = (
    *("offload_param", "offload_optimizer", "cpu_offload", "cpu_offload_param"),
    *("zero_hpz_partition_size", "zero_quantized_weights", "mics_shard_size"),
)
"""Settings of DeepSpeed's `zero_optimization` that keep weights, or the optimizer's copies of them, in other places."""


def check_engine(model: Any) -> None:
    """Raise ModelError for a model in an engine of DeepSpeed that isn't plain ZeRO-1, 2 or 3.

    What is inside an engine has the engine's hooks. Under ZeRO its parameters know the rest: by their optimizer under
    ZeRO-3, else by the mapping to it.
    """
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is None or not isinstance(model, nn.Module):
        return
    if isinstance(model, deepspeed.DeepSpeedEngine):
        check_deepspeed(model._config._param_dict)
        return
    if _is_in_engine(model) and not is_trained_by_deepspeed(model):
        raise ModelError(NO_ZERO)
    for parameter in model.parameters():
        optimizer, mapping = getattr(parameter, "_z3_optimizer", None), getattr(parameter, "_hp_mapping", None)
        settings = {key: getattr(optimizer, key, None) for key in NO_PLAIN_ZERO}
        if mapping is not None:
            settings["offload_optimizer"] = mapping.use_offload
        _refuse_moved(settings)


def _is_in_engine(model: nn.Module) -> bool:
    """Whether forward passes of the model are an engine's: without ZeRO its optimizer leaves no other trace."""
    hooks = (*model._forward_pre_hooks.values(), *model._forward_hooks.values())
    return any(getattr(hook, "__module__", "") == "deepspeed.runtime.engine" for hook in hooks)


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Raise ModelError for what isn't plain ZeRO-1, 2 or 3, and may keep weights in other places.

    config: DeepSpeed's, as a dictionary.
    """
    zero = config.get("zero_optimization") or {}
    if zero.get("stage", 0) not in (1, 2, 3):
        raise ModelError(NO_ZERO)
    _refuse_moved(zero)


def _refuse_moved(settings: Mapping[str, Any]) -> None:
    """Raise ModelError for settings of `zero_optimization` that keep weights in other places."""
    used = [key for key in NO_PLAIN_ZERO if _is_on(settings.get(key))]
    if used:
        raise ModelError(
            f"DeepSpeed's {used[0]} was never tried with the laser. Leave it out of zero_optimization. {OFFLINE}"
        )


def _is_on(setting: Any) -> bool:
    """Whether a setting of DeepSpeed, a dictionary with a device or a value, is more than its default."""
    if isinstance(setting, Mapping):
        return setting.get("device") not in (None, "none")
    return setting is True or setting not in (None, False, 1, -1)


@contextmanager
def whole_where_it_fits(model: Any) -> Iterator[None]:
    """Inside, a ZeRO-3 model is whole in every process, which then computes by itself as with any other model.

    Where memory has no room for that, DeepSpeed gathers one layer after the other in every forward pass. Every process
    ends with the main one's weights.
    Raises ModelError when there is no room and, as before training, no engine of DeepSpeed that gathers layers.
    """
    parameters: Iterable[Any] = model.parameters() if isinstance(model, nn.Module) else ()
    parts = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not parts:
        yield
        return
    optimizer = getattr(parts[0], "_z3_optimizer", None)
    needed = sum(part.ds_numel * part.element_size() for part in parts)
    room = MOST_OF_MEMORY * _free_bytes(parts[0].device)
    if not all(gather(lambda: [needed <= room])):
        if optimizer is None:
            raise ModelError(
                f"the model is in parts and takes {size(needed)} as a whole, more than fits on one device, and "
                "DeepSpeed gathers no layers before training. Use when='before'."
            )
        yield
        return
    with whole(parts, changed=True), _computing_alone(optimizer):
        yield


@contextmanager
def masters_following(model: Any) -> Iterator[None]:
    """Afterwards, an error's included, DeepSpeed's optimizer has each weight that was changed inside.

    Its next step would write back its own fp32 copies of them. The copies of unchanged weights keep the digits that a
    weight in low precision doesn't have. Entered before `whole_where_it_fits`, so that it ends after it.
    """
    try:
        yield
    finally:
        for parameter in model.parameters() if isinstance(model, nn.Module) else ():
            _set_master(parameter)


@torch.no_grad()
def _set_master(parameter: Any) -> None:
    """Of the part of the optimizer's copy that this process has, what its weights were not rounded from."""
    if not parameter.requires_grad:
        return
    if hasattr(parameter, "_z3_optimizer"):
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        master, weight = safe_get_local_fp32_param(parameter), parameter.ds_tensor.flatten()
        safe_set_local_fp32_param(parameter, torch.where(master.to(weight.dtype) == weight, master, weight.float()))
    elif getattr(parameter, "_hp_mapping", None) is not None:
        master, place = parameter._hp_mapping.get_hp_fragment(), parameter._hp_mapping.lp_fragment_address
        weight = parameter.flatten().narrow(0, place.start, place.numel)
        master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight.float()))


def is_trained_by_deepspeed(model: nn.Module) -> bool:
    """Whether an engine of DeepSpeed has the parameters, and takes every gradient of them for itself."""
    return any(
        hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping") for parameter in model.parameters()
    )


@contextmanager
def _computing_alone(optimizer: Any) -> Iterator[None]:
    """Inside, forward passes neither gather nor release anything. optimizer: that of ZeRO-3, or None before it is."""
    if optimizer is None:
        yield
        return
    offload = optimizer.parameter_offload
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        yield
    finally:
        offload._register_deepspeed_module(offload.module)


def _free_bytes(device: torch.device) -> float:
    """Memory of an accelerator that this process may still take; of a CPU, as if there was no end of it."""
    if device.type == "cpu":
        return sys.float_info.max
    module = torch.get_device_module(device)
    kept = module.memory_reserved(device) - module.memory_allocated(device)
    return float(module.mem_get_info(device)[0] + kept)
