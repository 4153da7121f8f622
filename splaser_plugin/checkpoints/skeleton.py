"""The model that transformers would load from a folder: its class without weights, and where each weight comes from.

The model is made on the meta device, from config.json, by the auto class that loads it; code that comes with a model
never runs. Which stored tensors become which parameter is transformers' own answer: its renamings, its fused and
split experts, the prefix of the base model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from splaser_plugin.checkpoints.checkpoint import Checkpoint
from splaser_plugin.errors import CheckpointError
from splaser_plugin.files.text import first_line_of, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@dataclass(frozen=True)
class Source:
    """What one parameter is made of."""

    stored: tuple[str, ...]
    """Names of the tensors on disk, in the order that the conversion takes them."""
    conversion: Conversion | None = None
    """What is computed of them; None where the parameter is the one stored tensor itself."""


@dataclass(frozen=True)
class Conversion:
    """One of transformers' conversions (`WeightConverter`), of one or several stored tensors to parameters."""

    converter: Any
    target: str
    """The parameter that transformers files the conversion under."""
    patterns: tuple[tuple[str, str], ...]
    """(pattern of the converter, stored name) for each tensor it takes, in order."""

    def of(self, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """The parameters by name. tensors: by stored name; those that are left out don't take part."""
        converter = deepcopy(self.converter)
        for pattern, name in self.patterns:
            if name in tensors:
                converter.add_tensor(self.target, name, pattern, tensors[name])
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def expert(self, index: int, count: int) -> tuple[str, ...] | None:
        """Stored names of what expert `index` of `count` alone is made of; None where they aren't stored one by one."""
        by_pattern: dict[str, list[str]] = {}
        for pattern, name in self.patterns:
            by_pattern.setdefault(pattern, []).append(name)
        if any(len(names) != count for names in by_pattern.values()):
            return None
        return tuple(names[index] for names in by_pattern.values())


@dataclass(frozen=True)
class Skeleton:
    """A model without its weights, and what the checkpoint has for it."""

    model: Any
    """The model on the meta device."""
    sources: Mapping[str, Source]
    """By the name of the parameter or buffer in the model's state dict."""
    unexpected: tuple[str, ...]
    """Names of stored tensors that no part of the model takes."""
    missing: tuple[str, ...]
    """Names in the state dict that no stored tensor becomes, apart from tied ones."""
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Name in the state dict to (shape that the files give, shape that config.json asks for)."""

    @property
    def lacks_only_its_head(self) -> bool:
        """Whether the output head alone has no weights."""
        head = self.model.get_output_embeddings()
        mine = {id(parameter) for parameter in head.parameters()} if head is not None else set()
        return all(id(state_of(self.model, name)) in mine for name in self.missing) and not self.mismatched

    @property
    def problem(self) -> str | None:
        """Why the files don't make this model; None where they do."""
        if self.missing:
            return f"there are no weights for {shown(self.missing[0])}, as for {len(self.missing)} in all"
        for name, (got, expected) in self.mismatched.items():
            return f"{shown(name)} has shape {got}, expected {expected} by config.json"
        return None


def skeleton_of(checkpoint: Checkpoint) -> Skeleton:
    """The model that the folder's config.json describes, and where its weights come from.

    Files that lack more than the head of the model that answers prompts are those of the bare model (an encoder).
    Raises CheckpointError when transformers knows no model by that config.json.
    """
    from transformers import AutoModel

    config = model_config(checkpoint.folder)
    tensors = _empty(checkpoint)
    skeleton = _placed(empty_model(config, checkpoint.folder), tensors)
    if skeleton.problem is None or skeleton.lacks_only_its_head or type(config) not in mapping_of(AutoModel):
        return skeleton
    bare = _placed(empty_model(config, checkpoint.folder, AutoModel), tensors)
    return bare if bare.problem is None else skeleton


def unplaced(model: Any, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the stored tensors that a loaded model of these files doesn't take."""
    return _placed(model, _empty(checkpoint)).unexpected


def _empty(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The stored tensors on the meta device."""
    return {
        name: torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        for name, stored in checkpoint.tensors.items()
    }


def model_config(folder: Path) -> Any:
    """transformers' configuration of the model in `folder`. Raises CheckpointError when it knows none by that."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except library_errors() as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers knows no such model ({first_line_of(error)})."
        ) from error


def is_composite(config: Any) -> bool:
    """Whether the model has a language model among others: towers for images or sound."""
    return config.get_text_config(decoder=True) is not config


def auto_class(config: Any) -> Any:
    """The auto class that loads the model with this configuration: what answers prompts, if any does."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    kinds = [AutoModelForCausalLM, AutoModelForImageTextToText]
    if is_composite(config):
        kinds.reverse()
    if getattr(config, "is_encoder_decoder", False):
        kinds.insert(0, AutoModelForSeq2SeqLM)
    for kind in kinds:
        if type(config) in mapping_of(kind):
            return kind
    return AutoModel


def answering_class(config: Any) -> Any:
    """The auto class for models that answer prompts: as `auto_class`, and for what it doesn't know the causal one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = auto_class(config)
    return kind if kind is AutoModelForImageTextToText else AutoModelForCausalLM


def mapping_of(kind: Any) -> Any:
    """An auto class' table of configuration to model classes."""
    return kind._model_mapping


def empty_model(config: Any, folder: Path, kind: Any = None) -> Any:
    """The model of this configuration on the meta device, in float32. kind: the auto class, if another is meant.

    Raises CheckpointError when the configuration makes no model.
    """
    config = deepcopy(config)
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    try:
        with quiet(), torch.device("meta"):
            return (kind or auto_class(config)).from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    except library_errors() as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{folder / 'config.json'}: makes no model ({reason[:200]}).") from error


def library_errors() -> tuple[type[Exception], ...]:
    """What transformers raises for a config.json that isn't a model's: it checks little of it before use."""
    from huggingface_hub.errors import StrictDataclassError

    return (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        LookupError,
        ArithmeticError,
        AttributeError,
        ImportError,
        NotImplementedError,
        AssertionError,
        StrictDataclassError,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers warns of nothing: an empty model isn't used."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _placed(model: Any, tensors: Mapping[str, Tensor], conversions: Sequence[Any] | None = None) -> Skeleton:
    """Where each of `tensors` goes in `model`, as transformers' loader decides it (`core_model_loading`)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state = model.state_dict()
    conversions = get_model_conversion_mapping(model) if conversions is None else conversions
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix

    sources: dict[str, Source] = {}
    collected: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    unexpected: list[str] = []
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            unexpected.append(name)
        elif pattern is None:
            sources.setdefault(target, Source((name,)))
        else:
            collected.setdefault(target, (by_pattern[pattern], []))[1].append((pattern, name))
    shapes = {target: tuple(tensors[source.stored[0]].shape) for target, source in sources.items()}
    for target, (converter, patterns) in collected.items():
        conversion = Conversion(converter, target, tuple(patterns))
        stored = tuple(name for _, name in patterns)
        try:
            made = conversion.of({name: tensors[name] for name in stored}, model)
        except library_errors() as error:
            raise CheckpointError(
                f"{shown(stored[0])} can't be made into {shown(target)} ({first_line_of(error)}). "
                "config.json asks for another model than the weights are."
            ) from error
        for name, tensor in made.items():
            sources[name] = Source(stored, conversion)
            shapes[name] = tuple(tensor.shape)
    mismatched = {
        name: (shape, tuple(state[name].shape))
        for name, shape in shapes.items()
        if name in state and shape != tuple(state[name].shape)
    }
    return Skeleton(model, sources, tuple(unexpected), tuple(_missing(model, state, sources)), mismatched)


def _missing(model: Any, state: Mapping[str, Tensor], sources: Mapping[str, Source]) -> Iterable[str]:
    stored = {id(state_of(model, name)) for name in sources if name in state}
    ignored = [*(model._keys_to_ignore_on_load_missing or ())]
    for name in state:
        is_there = name in sources or id(state_of(model, name)) in stored
        if not is_there and not any(_matches(pattern, name) for pattern in ignored):
            yield name


def _matches(pattern: str, name: str) -> bool:
    return re.search(pattern, name) is not None


def state_of(model: Any, name: str) -> Any:
    """The parameter or buffer itself, so that tied ones are the same object."""
    module, _, last = name.rpartition(".")
    return getattr(model.get_submodule(module), last)
