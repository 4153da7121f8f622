"""Models with factored layers in a folder: written and loaded.

In the folder a factored layer has some of its numbers under the name of its weight and the rest beside it, and
config.json lists the layers, see `splaser_plugin.weights.factored_format`. The weight's shape is then not what the
configuration says, so whatever loads the folder without knowing of factors stops there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from splaser_plugin.checkpoints.checkpoint import Checkpoint
from splaser_plugin.checkpoints.folder import inspect, resolve_model
from splaser_plugin.checkpoints.roles import shape_of
from splaser_plugin.checkpoints.skeleton import answering_class, library_errors
from splaser_plugin.checkpoints.trust import check_model_folder
from splaser_plugin.errors import CheckpointError
from splaser_plugin.files.text import shown
from splaser_plugin.weights.factored import is_transposed, layer_name
from splaser_plugin.weights.factored_experts import EACH, stacks_of
from splaser_plugin.weights.factored_format import OLD_KEY, Stored, stored_layers, written
from splaser_plugin.weights.factored_layers import order_of
from splaser_plugin.weights.gauge import Gauge
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.matrices import Matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OFFLOADED_SHARD = "2GB"
"""Largest file of an offloaded model, which transformers brings into memory whole before it writes it."""


def save_model(weights: Weights, folder: Path, state: Mapping[str, Tensor] | None) -> None:
    """Write the model by its `save_pretrained`, as factors what was reduced to factors and hasn't changed since.

    state: of `Weights.state_dict`.
    """
    from splaser_plugin.weights.factored_config import FactoredConfig

    model: Any = weights.model
    kept = unchanged_factors(weights)
    if weights.is_offloaded:
        with warnings.catch_warnings(), _mapped(model):
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            model.save_pretrained(folder, max_shard_size=OFFLOADED_SHARD)
        return
    if not kept:
        with _undistributed(model):
            model.save_pretrained(folder, state_dict=state)
        return
    state = dict(model.state_dict() if state is None else state)
    for experts in {matrix.parameter.rpartition(".")[0] for matrix in kept if matrix.expert is not None}:
        _split(experts, model.get_submodule(experts), state)
    layers = {}
    for matrix, form in kept.items():
        name, form = layer_name(matrix), form.mT if is_transposed(model, matrix) else form
        state[f"{name}.weight"], state[f"{name}.interpolation"] = form.skeleton, form.interpolation
        state[f"{name}.order"] = order_of(form)
        layers[name] = Stored("rows" if form.by_rows else "columns", form.rank)
    model.config.quantization_config = FactoredConfig(written(layers))
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        del model.config.quantization_config


@contextmanager
def _undistributed(model: Any) -> Iterator[None]:
    """Hide that transformers itself sharded the model: it would gather weights that are whole already, for which it
    waits for all processes.
    """
    distributed = getattr(model.config, "distributed_config", None)
    if distributed is None:
        yield
        return
    model.config.distributed_config = None
    try:
        yield
    finally:
        model.config.distributed_config = distributed


@contextmanager
def _mapped(model: Any) -> Iterator[None]:
    """Inside, the model has the map by which `save_pretrained` knows that weights are offloaded.

    accelerate's `cpu_offload` and `disk_offload` leave none.
    """
    if hasattr(model, "hf_device_map"):
        yield
        return
    model.hf_device_map = {"": "cpu"}
    try:
        yield
    finally:
        del model.hf_device_map


def _split(name: str, experts: Any, state: dict[str, Tensor]) -> None:
    """Put the matrix of each expert in the place of the stacks, as (outputs, inputs)."""
    for stack in stacks_of(experts):
        for index, matrix in enumerate(state.pop(f"{name}.{stack}")):
            upright = matrix.mT if experts.is_transposed else matrix
            state[f"{name}.{EACH}{stack}.{index}.weight"] = upright.clone(memory_format=torch.contiguous_format)


def unchanged_factors(weights: Weights) -> dict[Matrix, Gauge]:
    """What a matrix was reduced to, where the model still has just that."""
    return {
        matrix: form
        for matrix, form in (weights.factors or {}).items()
        if torch.equal(form.product(), weights.read(matrix))
    }


def parameter_counts(weights: Weights) -> tuple[int, int]:
    """Numbers in the model, and in what `save_model` writes of it."""
    dense = sum(
        math.prod(shape_of(parameter))
        for parameter in {id(parameter): parameter for parameter in weights.parameters.values()}.values()
    )
    saved = sum(matrix.shape[0] * matrix.shape[1] - form.size for matrix, form in unchanged_factors(weights).items())
    return dense, dense - saved


def load(model: str | Path, **arguments: Any) -> PreTrainedModel:
    """A causal language model of transformers' own class, whose factored layers compute with their factors.

    transformers' own `from_pretrained` loads such a folder too, wherever splaser_plugin is imported. This checks more:
    every tensor is there, in its shape, and none is left over. And it loads what splaser 0.1 saved.

    Args:
        model: A folder or hub id, factored or not.
        **arguments: Those of `from_pretrained` (dtype, device_map, ...).

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: Something is missing, damaged or at odds; the message has the file and the tensor.
    """
    return load_factored(check_model_folder(inspect(resolve_model(str(model)))), **arguments)


def load_factored(checkpoint: Checkpoint, **arguments: Any) -> PreTrainedModel:
    """As `load`, of weights that were checked."""
    from transformers import AutoConfig

    folder, config = checkpoint.folder, checkpoint.config
    layers = stored_layers(config, folder)
    if not layers:
        return answering_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, **arguments)
    from splaser_plugin.weights.factored_config import FactoredConfig

    if OLD_KEY in config:
        arguments["quantization_config"] = FactoredConfig(written(layers))
    # sizes that are at odds under other names are reported below, by the tensor's name
    found: Any = _auto_class(folder).from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
    )
    loaded, report = found
    _check_report(report, checkpoint)
    return loaded


def _auto_class(folder: Path) -> Any:
    """The auto class that loads the model. Raises CheckpointError when config.json describes none."""
    from transformers import AutoConfig

    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder)
            kind = answering_class(config)
            kind.from_config(config)
            return kind
    except library_errors() as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"{folder / 'config.json'}: makes no causal language model ({reason[:200]}). Save the model again."
        ) from error


def _check_report(report: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless every tensor of the model was in the files, in its shape, and no other."""
    from splaser_plugin.weights.quantizer import wrong_shape

    def where(name: str) -> str:
        stored = checkpoint.tensors.get(name)
        return f"{stored.shard if stored else checkpoint.folder}: tensor {shown(name)}"

    for name, got, expected in sorted(report["mismatched_keys"]):
        raise wrong_shape(where(name), tuple(got), tuple(expected))
    for name in sorted(report["missing_keys"]):
        raise CheckpointError(f"{where(name)} is missing. Save the model again.")
    for name in sorted(report["unexpected_keys"]):
        raise CheckpointError(f"{where(name)} belongs to no layer of this model. Save the model again.")
