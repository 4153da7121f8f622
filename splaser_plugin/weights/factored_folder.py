"""Models with factored layers in a folder: written, loaded, and turned into plain ones.

In the folder a factored layer has its left factor under the name of its weight, and its right one beside it as
`right_factor`; config.json lists the layers with their ranks. The weight's shape is then not what the
configuration says, so whatever loads the folder without knowing of factors stops there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from splaser_plugin.checkpoints.checkpoint import Checkpoint, open_checkpoint
from splaser_plugin.checkpoints.folder import read_config, resolve_model
from splaser_plugin.checkpoints.skeleton import answering_class
from splaser_plugin.checkpoints.trust import check_model_folder
from splaser_plugin.errors import CheckpointError, nearest
from splaser_plugin.files.text import shown
from splaser_plugin.weights.factored import CONFIG_KEY, FactoredLinear, Factors, as_stored
from splaser_plugin.weights.in_memory import Weights


def save_model(weights: Weights, folder: Path, state: Mapping[str, Tensor] | None) -> None:
    """Write the model by its `save_pretrained`, as factors what was reduced to factors and hasn't changed since.

    state: of `Weights.state_dict`.
    """
    model: Any = weights.model
    layers = unchanged_factors(weights)
    if not layers:
        with _undistributed(model):
            model.save_pretrained(folder, state_dict=state)
        return
    state = dict(model.state_dict() if state is None else state)
    for name, factors in layers.items():
        state[f"{name}.weight"], state[f"{name}.right_factor"] = factors.left, factors.right
    setattr(model.config, CONFIG_KEY, {name: factors.rank for name, factors in layers.items()})
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        delattr(model.config, CONFIG_KEY)


@contextmanager
def _undistributed(model: Any) -> Iterator[None]:
    """Hide that transformers itself sharded the model: it would gather weights that are whole already, for which it
    waits for all processes."""
    distributed = getattr(model.config, "distributed_config", None)
    if distributed is None:
        yield
        return
    model.config.distributed_config = None
    try:
        yield
    finally:
        model.config.distributed_config = distributed


def unchanged_factors(weights: Weights) -> dict[str, Factors]:
    """Module name to the factors that a matrix was reduced to, where the model still has their product."""
    return {
        matrix.name: factors
        for matrix, factors in (weights.factors or {}).items()
        if torch.equal(as_stored(factors.product(), matrix), weights.read(matrix))
    }


def parameter_counts(weights: Weights) -> tuple[int, int]:
    """Numbers in the model, and in what `save_model` writes of it."""
    dense = sum(parameter.numel() for parameter in {id(each): each for each in weights.parameters.values()}.values())
    saved = 0
    for factors in unchanged_factors(weights).values():
        outputs, inputs = factors.left.shape[0], factors.right.shape[1]
        saved += outputs * inputs - factors.rank * (outputs + inputs)
    return dense, dense - saved


def load(model: str | Path, **arguments: Any) -> Any:
    """A causal language model of transformers' own class, whose factored layers compute with their factors.

    model: a folder or hub id, factored or not. arguments: of `from_pretrained` (dtype, device_map, ...).
    Raises CheckpointError, with the file and the tensor, when anything is missing, damaged or at odds.
    """
    from transformers import AutoConfig

    folder = resolve_model(str(model))
    check_model_folder(folder)
    ranks = stored_ranks(folder, read_config(folder))
    if not ranks:
        return answering_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, **arguments)
    checkpoint = open_checkpoint(folder)
    planned = _plan(folder)
    _install(planned, ranks, folder)
    _check_shapes(planned, checkpoint)
    loader = _factored_class(type(planned), ranks, folder)
    # sizes that are at odds under other names are reported below, by the tensor's name
    loaded, report = loader.from_pretrained(
        folder,
        # one class can be several kinds of model, which differ in how their tensors are called
        config=AutoConfig.from_pretrained(folder),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **arguments,
    )
    _check_report(report, checkpoint)
    _check_dtypes(ranks, checkpoint)
    for name, rank in ranks.items():
        if loaded.get_submodule(name).factors.left.shape[1] != rank:
            raise CheckpointError(
                f"{folder / 'config.json'}: {CONFIG_KEY}: {name} shares its weight with another layer, so it can't be "
                "factored. Save the model again."
            )
    loaded.__class__ = type(planned)
    return loaded


def stored_ranks(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Module name to rank of the factored layers that a config.json lists; {} for a dense model.

    Raises CheckpointError when it is no such list.
    """
    ranks = config.get(CONFIG_KEY, {})
    if not isinstance(ranks, dict) or not all(type(rank) is int and rank > 0 for rank in ranks.values()):
        raise CheckpointError(
            f"{folder / 'config.json'}: {CONFIG_KEY} is {shown(ranks)}, expected module names to ranks of at least 1."
        )
    return ranks


def _plan(folder: Path) -> Any:
    """The model that config.json describes, dense and on the meta device.

    Raises CheckpointError when it describes none.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder)
            return answering_class(config).from_config(config)
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        LookupError,
        ArithmeticError,
        AttributeError,
        StrictDataclassError,
    ) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"{folder / 'config.json'}: makes no causal language model ({reason[:200]}). Save the model again."
        ) from error


def _install(model: nn.Module, ranks: Mapping[str, int], folder: Path) -> None:
    """Put an empty factored layer in the place of each one listed."""
    from transformers.pytorch_utils import Conv1D

    known = {name: each for name, each in model.named_modules() if type(each) in (nn.Linear, Conv1D)}
    where = f"{folder / 'config.json'}: {CONFIG_KEY}"
    for name, rank in ranks.items():
        if name not in known:
            raise CheckpointError(f"{where}: {shown(name)} is no linear layer of this model; {nearest(name, known)}.")
        layer: Any = known[name]
        rows, columns = layer.weight.shape
        if rank > min(rows, columns):
            raise CheckpointError(
                f"{where}: {name}: rank {rank}, but its shape ({rows}, {columns}) allows at most {min(rows, columns)}."
            )
        from_conv1d = isinstance(layer, Conv1D)
        empty = FactoredLinear(
            rows if from_conv1d else columns,
            columns if from_conv1d else rows,
            rank,
            bias=layer.bias is not None,
            from_conv1d=from_conv1d,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, empty)


def _factored_class(kind: type[Any], ranks: Mapping[str, int], folder: Path) -> type[Any]:
    """The model's class with the factored layers in place when transformers begins to load the weights.

    It looks, name and module, like the class itself, since transformers goes by both.
    """

    def __init__(self: Any, config: Any, *rest: Any, **options: Any) -> None:  # noqa: N807
        kind.__init__(self, config, *rest, **options)
        _install(self, ranks, folder)

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


def _check_shapes(planned: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError, before any memory is taken, when a tensor has another shape than its parameter."""
    for name, parameter in planned.named_parameters():
        stored = checkpoint.tensors.get(name)
        if stored is not None and stored.shape != tuple(parameter.shape):
            raise _wrong_shape(f"{stored.shard}: tensor {shown(name)}", stored.shape, tuple(parameter.shape))


def _wrong_shape(where: str, got: tuple[int, ...], expected: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(f"{where} has shape {got}, expected {expected} by config.json. Save the model again.")


def _check_report(report: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless every tensor of the model was in the files, in its shape, and no other."""

    def where(name: str) -> str:
        stored = checkpoint.tensors.get(name)
        return f"{stored.shard if stored else checkpoint.folder}: tensor {shown(name)}"

    for name, got, expected in sorted(report["mismatched_keys"]):
        raise _wrong_shape(where(name), tuple(got), tuple(expected))
    for name in sorted(report["missing_keys"]):
        raise CheckpointError(f"{where(name)} is missing. Save the model again.")
    for name in sorted(report["unexpected_keys"]):
        raise CheckpointError(f"{where(name)} belongs to no layer of this model. Save the model again.")


def _check_dtypes(names: Iterable[str], checkpoint: Checkpoint) -> None:
    for name in (f"{layer}.{part}" for layer in names for part in ("weight", "right_factor")):
        stored = checkpoint.tensors.get(name)
        if stored is not None and not stored.dtype.is_floating_point:
            raise CheckpointError(
                f"{stored.shard}: tensor {shown(name)} is {stored.dtype}, expected floating point. "
                "Save the model again."
            )
