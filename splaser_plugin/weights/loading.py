"""A causal language model and its tokenizer from a folder, a GGUF file or a hub id."""

from __future__ import annotations

import copy
import logging
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn

from splaser_plugin.checkpoints.checkpoint import open_checkpoint
from splaser_plugin.checkpoints.quantised import (
    quantisation,
    read_weights,
    with_weights,
)
from splaser_plugin.checkpoints.skeleton import answering_class, empty_model, skeleton_of
from splaser_plugin.errors import CheckpointError, ConfigError, ModelError
from splaser_plugin.files.sources import path_of
from splaser_plugin.files.text import first_line_of, shown
from splaser_plugin.weights.adapter_folder import find_adapter, library_errors, merge
from splaser_plugin.weights.devices import pick_device
from splaser_plugin.weights.factored_folder import load_factored
from splaser_plugin.weights.factored_format import stored_layers
from splaser_plugin.weights.model_source import ModelSource, find_model
from splaser_plugin.weights.spread import arguments_of, every_process_loads, resolved_map

OTHER_SHAPES = "its tensors have other shapes than its metadata says, or than transformers makes of that."


def load_model(
    model: str | Path | ModelSource,
    *,
    device: str = "auto",
    dtype: str = "auto",
    adapter: str | Path = "",
    allow_pickle: bool = False,
    device_map: str = "none",
    max_memory: tuple[str, ...] = (),
) -> tuple[Any, Any]:
    """A model in evaluation mode on its device or devices, and its tokenizer.

    model: a folder that transformers can load, a .gguf file, a hub id, or what `find_model` found. dtype: `auto`
    keeps the checkpoint's. adapter: folder of a PEFT adapter to merge into it, whose tokenizer is taken where it
    has one; empty for none. allow_pickle: load weights that torch has pickled, if there are no others; they are
    unpickled as weights only. Code that comes with a model never runs. device_map, max_memory: see
    `config.placement.PlaceConfig`; under `none` whatever `accelerate launch` was told goes.
    Raises CheckpointError when there is nothing to load there or it is damaged, ModelError when it is no causal
    language model, ConfigError when it can't be spread so.
    """
    device_map = resolved_map(device_map)
    place = pick_device(device)
    source = model if isinstance(model, ModelSource) else find_model(model, allow_pickle=allow_pickle)
    folder = tempfile.TemporaryDirectory(prefix="splaser-", ignore_cleanup_errors=True)
    spread = arguments_of(device_map, max_memory, folder.name)
    if adapter and spread:
        raise ConfigError(
            f"--adapter with --device-map {device_map}: an adapter is merged on one device. Merge it, save the model, "
            "and give that."
        )
    stored = find_adapter(path_of(adapter), allow_pickle) if adapter else None
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # the run says itself where the weights are
    loaded = _load(source, dtype if dtype == "auto" else getattr(torch, dtype), spread)
    if spread:
        weakref.finalize(loaded, folder.cleanup)  # the model reads from it
        return loaded.eval(), load_tokenizer(source)
    if source.gguf:
        _forget_gguf(loaded)
    of_base, tokenizer = load_tokenizer(source), load_tokenizer(source, adapter)
    if adapter:
        loaded = merge(loaded, path_of(adapter), stored, vocabulary=len(tokenizer), of_base=len(of_base))
    return loaded.to(place).eval(), tokenizer


def load_tokenizer(source: ModelSource, adapter: str | Path = "") -> Any:
    """The tokenizer that `load_model` gives for the same model and adapter, loaded once for a source.

    Raises CheckpointError when it can't be loaded, or when the configuration, which transformers reads first, can't.
    """
    known, place = source.read, ("tokenizer", str(adapter))
    if place not in known:
        if adapter:
            known[place] = _tokenizer_of_adapter(path_of(adapter), load_tokenizer(source))
        else:
            _config(source)
            known[place] = _tokenizer(source.name, source.folder, _files(source))
    return known[place]


def stored_context(source: ModelSource) -> int | None:
    """`context_length` of the model, which isn't loaded for it. Raises CheckpointError as `load_tokenizer` does."""
    return _context_of(_config(source))


def _config(source: ModelSource) -> Any:
    """Read once for a source, and left as it is: of a .gguf file that takes seconds."""
    from transformers import AutoConfig

    known, place = source.read, ("config", "")
    if place not in known:
        try:
            known[place] = AutoConfig.from_pretrained(source.folder, **_files(source))
        except library_errors() as error:
            raise _unloadable(_reason(error, source), source) from error
    return known[place]


def _files(source: ModelSource) -> dict[str, Any]:
    """What every `from_pretrained` is told of the files."""
    return {"trust_remote_code": False, **({"gguf_file": source.gguf} if source.gguf else {})}


def _load(source: ModelSource, dtype: str | torch.dtype, spread: dict[str, Any]) -> Any:
    """spread: of `arguments_of`."""
    from transformers import AutoModelForCausalLM

    name, folder = source.name, source.folder
    files = _files(source)
    try:
        config = _config(source)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(f"{name} is an encoder-decoder model; only causal language models can be lasered.")
        is_factored = bool(stored_layers(config.to_dict(), folder))
        if quantisation(config.to_dict()) and not source.gguf and not is_factored and not source.quantised:
            raise ModelError(
                f"{name} has quantised weights, which can't be reduced. Give the model in bfloat16 or float32."
            )
        if spread and (source.gguf or source.quantised or is_factored):
            raise ModelError(
                f"{name} can't be spread over devices as it is stored. Load it on one device, or save it as plain "
                "safetensors first (splaser expand, for factored layers)."
            )
        load_tokenizer(source)  # what is wrong with it is said before the weights are read
        if is_factored:
            return load_factored(source.checkpoint or open_checkpoint(folder), dtype=dtype)
        kind = AutoModelForCausalLM if source.gguf else answering_class(config)
        if not source.gguf:
            files |= {"use_safetensors": source.checkpoint is not None, "weights_only": True}
        if source.quantised:
            loaded: Any = _dequantised(source, config, dtype)
        else:
            with every_process_loads():
                loaded = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **files, **spread)
    except library_errors() as error:
        raise _unloadable(_reason(error, source), source) from error
    model, found = loaded
    if source.gguf and not _has_planned_shapes(model, folder):
        raise _unloadable(OTHER_SHAPES, source)
    if missing := sorted(found["missing_keys"]):
        why = "Its config.json asks for another model than its weights are."
        if source.gguf:
            why = "Its metadata asks for more than the file holds: if it is a part of a split file, merge it first."
        raise CheckpointError(
            f"{name}: it has no weights for {shown(missing[0])}, as for {len(missing)} in all, so that they would be "
            f"random. {why}"
        )
    return model


def _dequantised(source: ModelSource, config: Any, dtype: str | torch.dtype) -> tuple[Any, dict[str, Any]]:
    """What `from_pretrained` gives for the weights that the codes and scales stand for.

    They are read as a scan reads them, for what transformers itself would load differs from that for some layouts.
    """
    from transformers import GenerationConfig

    if source.checkpoint is None:
        raise ValueError("quantised weights come from a checkpoint")
    config = copy.deepcopy(config)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        vars(part).pop("quantization_config", None)
    if not isinstance(dtype, torch.dtype):
        dtype = config.get_text_config().dtype or config.dtype or torch.bfloat16
    weights = with_weights(source.checkpoint, source.quantised)
    kind = type(skeleton_of(weights).model)
    tensors = dict(read_weights(source.checkpoint, source.quantised, list(weights.tensors), dtype))
    model, found = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True)
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model, found


def _unloadable(reason: str, source: ModelSource) -> CheckpointError:
    return CheckpointError(
        f"{source.name}: can't be loaded as a causal language model ({reason}) "
        "Give a folder saved by save_pretrained, a .gguf file, or a hub id that can be reached."
    )


def _reason(error: Exception, source: ModelSource) -> str:
    """What an error of the loader means; where it points to a report that is not shown, what stands there."""
    if "above report" not in str(error):
        return first_line_of(error)
    if source.gguf:
        return OTHER_SHAPES
    return f"{skeleton_of(source.checkpoint or open_checkpoint(source.folder)).problem or 'shapes differ'}."


def _tokenizer(name: str, folder: Path, files: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, **files)
    except Exception as error:  # tokenizers raises nothing more special for a damaged file
        raise CheckpointError(
            f"{name}: its tokenizer can't be loaded ({type(error).__name__}: {first_line_of(error)}). Give a "
            "model with the tokenizer that its save_pretrained wrote."
        ) from error


def _tokenizer_of_adapter(folder: Path, of_base: Any) -> Any:
    """The one that was saved with the adapter, as it was trained with that; else the base model's."""
    if not (folder / "tokenizer_config.json").is_file():
        return of_base
    tokenizer = _tokenizer(f"--adapter {folder}", folder, {"trust_remote_code": False})
    tokenizer.chat_template = tokenizer.chat_template or of_base.chat_template
    return tokenizer


def _has_planned_shapes(model: nn.Module, folder: Path) -> bool:
    """Whether parameters are as the configuration plans them: transformers 5.20 takes a .gguf file's at any shape."""
    planned = {name: parameter.shape for name, parameter in empty_model(model.config, folder).named_parameters()}
    return all(planned.get(name, it.shape) == it.shape for name, it in model.named_parameters())


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
    return _context_of(getattr(model, "config", None))


def _context_of(config: Any) -> int | None:
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
