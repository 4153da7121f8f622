"""A causal language model and its tokenizer from a folder, a GGUF file or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from splaser_plugin.distributed import best_device
from splaser_plugin.errors import CheckpointError, ConfigError, ModelError
from splaser_plugin.factored import CONFIG_KEY
from splaser_plugin.factored_folder import load as load_factored


def pick_device(name: str) -> torch.device:
    """`auto`, or a device by its torch name. Raises ConfigError when there is no such device here."""
    if name == "auto":
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {name}: not usable here ({str(error).splitlines()[0]}). Try --device cpu."
        ) from error
    return device


def load_model(
    name: str | Path, *, device: str = "auto", dtype: str = "auto", adapter: str | Path = ""
) -> tuple[Any, Any]:
    """A model in evaluation mode on its device, and its tokenizer.

    name: a folder that transformers can load, a .gguf file, or a hub id. dtype: `auto` keeps the checkpoint's.
    adapter: folder of a PEFT adapter to merge into it; empty for none.
    Raises CheckpointError when there is nothing to load there, ModelError when it is no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place = pick_device(device)
    source, extra = _source(name)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        config = AutoConfig.from_pretrained(source, **extra)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(f"{name} is an encoder-decoder model; only causal language models can be lasered.")
        if getattr(config, "quantization_config", None) and not extra:
            raise ModelError(
                f"{name} has quantised weights, which can't be reduced. Give the model in bfloat16 or float32."
            )
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
        load = load_factored if hasattr(config, CONFIG_KEY) else AutoModelForCausalLM.from_pretrained
        model: Any = load(source, dtype=wanted, **extra)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}: can't be loaded as a causal language model ({str(error).strip().splitlines()[0]}) "
            "Give a folder saved by save_pretrained, a .gguf file, or a hub id that can be reached."
        ) from error
    if extra:
        _forget_gguf(model)
    if adapter:
        model = _merge(model, adapter)
    return model.to(place).eval(), tokenizer


def _source(name: str | Path) -> tuple[str, dict[str, str]]:
    """Where transformers is to load from, and the extra argument for a GGUF file."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"{name}: there is no such file. Check the path.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{name}: this folder has no config.json. Give a folder saved by save_pretrained.")
        if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
            raise CheckpointError(f"{name}: this folder has no weights (*.safetensors). Save the model there first.")
        return str(path), {}
    if path.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise CheckpointError(f"{name}: there is no such model folder. Check the path.")
    return str(name), {}


def _merge(model: Any, adapter: str | Path) -> Any:
    from peft import PeftModel

    folder = Path(adapter).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"--adapter {adapter}: there is no adapter_config.json. Give a folder that PEFT saved.")
    try:
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"--adapter {adapter}: can't be merged into this model ({str(error).strip().splitlines()[0]}). "
            "Give the base model that the adapter was trained on."
        ) from error


def _forget_gguf(model: Any) -> None:
    """The weights are plain floats by now; with the quantisation's traces transformers refuses to save them."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model, "quantization_method"):
        model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def context_length(model: nn.Module) -> int | None:
    """The longest input in tokens, or None where the configuration gives none."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
