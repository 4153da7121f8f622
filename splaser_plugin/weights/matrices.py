"""Which parameters of a causal language model are weight matrices, and how each one is called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from splaser_plugin.errors import MatrixError, ModelError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from splaser_plugin.checkpoints.checkpoint import Checkpoint

CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Families whose checkpoints store linear weights as (inputs, outputs)."""


@dataclass(frozen=True)
class Matrix:
    """One weight matrix: a whole parameter, or one expert's slice of a fused 3-D parameter."""

    name: str
    """Module name, as in `model.layers.3.mlp.down_proj`; an expert's ends in its index: `...down_proj[5]`."""
    parameter: str
    """Name of the parameter that holds it, as in the state dict."""
    type: str
    """Module name inside its block, without expert numbers: `mlp.down_proj`."""
    block: int | None
    """Index of the transformer block; None outside the blocks."""
    shape: tuple[int, int]
    """(rows, columns) as stored."""
    expert: int | None = None
    transposed: bool = False
    """Stored as (inputs, outputs), the other way round from a linear layer (GPT-2's Conv1D)."""

    def view(self, parameter: Tensor) -> Tensor:
        """This matrix's part of its parameter: no copy, (rows, columns)."""
        part = parameter if self.expert is None else parameter[self.expert]
        return part.view(self.shape)


def overview(matrices: Sequence[Matrix]) -> str:
    """How much that is, for people."""
    blocks = len({matrix.block for matrix in matrices} - {None})
    entries = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)
    return f"{blocks} block{'s' if blocks != 1 else ''}, {len(matrices):,} matrices of {entries:,} entries"


@dataclass(frozen=True)
class Skipped:
    """A parameter that is not among the matrices, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class _Parameter:
    name: str
    shape: tuple[int, ...]
    embedding: bool = False
    transposed: bool = False
    tied_to: str | None = None


def model_matrices(
    model: nn.Module, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[Matrix], list[Skipped]]:
    """Weight matrices of a loaded model, in the model's order, and the parameters left out, with reasons.

    include: patterns of dotted segments (`mlp.down_proj`, `layers.3`, `*` inside a segment); only what
    matches one of them is kept. Embeddings, heads and norms are kept only if a pattern without `*` names
    them. exclude: patterns to leave out.

    Raises MatrixError when a pattern matches nothing, when a tied weight is asked for by name, or when
    nothing is left; ModelError when the weights are quantised.
    """
    return _classify(_parameters_of(model), include, exclude)


def stored_matrices(
    checkpoint: Checkpoint, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[Matrix], list[Skipped]]:
    """The same as `model_matrices`, from a checkpoint's headers and config.json alone."""
    config = checkpoint.config
    transposed = config.get("model_type") in CONV1D_MODEL_TYPES
    tied = config.get("tie_word_embeddings", False)
    embedding = next((name for name in checkpoint.tensors if _segments(name)[-2:-1] == ["embed_tokens"]), None)
    parameters = []
    for name, tensor in checkpoint.tensors.items():
        if not tensor.dtype.is_floating_point:
            continue
        is_head = _segments(name)[-2:-1] == ["lm_head"]
        other = "lm_head.weight" if name == embedding else embedding if is_head else None
        parameters.append(
            _Parameter(
                name,
                tensor.shape,
                embedding=looks_like_embedding(name),
                transposed=transposed and len(tensor.shape) == 2 and block_index(name) is not None,
                tied_to=other if tied else None,
            )
        )
    return _classify(parameters, include, exclude)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its name, tied ones under each of theirs. Under PEFT: by the base model's own names."""
    plain = ((plain_name(name), each) for name, each in model.named_parameters(remove_duplicate=False))
    return {name: parameter for name, parameter in plain if name is not None}


def plain_name(name: str) -> str | None:
    """What the base model calls a weight that PEFT has wrapped; None for what belongs to an adapter."""
    segments = name.split(".")
    if "original_module" in segments or any(segment.startswith("lora_") for segment in segments):
        return None
    if "modules_to_save" in segments:
        place = segments.index("modules_to_save")
        del segments[place : place + 2]
    return ".".join(segment for segment in segments if segment != "base_layer")


def _parameters_of(model: nn.Module) -> list[_Parameter]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    embeddings, conv1d = set[int](), set[int]()
    for module in model.modules():
        kind = embeddings if isinstance(module, nn.Embedding) else conv1d if isinstance(module, Conv1D) else set()
        kind.update(id(parameter) for parameter in module.parameters(recurse=False))
    named = named_parameters(model)
    sharers: dict[int, list[str]] = {}
    for name, parameter in named.items():
        sharers.setdefault(id(parameter), []).append(name)
    parameters = []
    for name, parameter in named.items():
        if not parameter.dtype.is_floating_point:
            raise ModelError(
                f"{name} is {parameter.dtype}: quantised weights can't be scanned or reduced. "
                "Load the model in bfloat16 or float32."
            )
        others = [other for other in sharers[id(parameter)] if other != name]
        parameters.append(
            _Parameter(
                name,
                tuple(parameter.shape),
                embedding=id(parameter) in embeddings,
                transposed=id(parameter) in conv1d and parameter.ndim == 2,
                tied_to=others[0] if others else None,
            )
        )
    return parameters


def _classify(
    parameters: Iterable[_Parameter], include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[Matrix], list[Skipped]]:
    parameters = list(parameters)
    module_names = [_module_name(parameter.name) for parameter in parameters]
    patterns = {pattern: compile_pattern(pattern) for pattern in (*include, *exclude)}
    for pattern, regex in patterns.items():
        if not any(regex.search(name) for name in module_names):
            raise MatrixError(
                f"pattern '{pattern}' matches no parameter of this model; {nearest(pattern, module_names)}."
            )

    matrices: list[Matrix] = []
    skipped: list[Skipped] = []
    for parameter, name in zip(parameters, module_names, strict=True):
        wanted = not include or any(patterns[pattern].search(name) for pattern in include)
        named = any("*" not in pattern and patterns[pattern].search(name) for pattern in include)
        reason = _reason_to_skip(parameter, named=named)
        if wanted and named and parameter.tied_to and parameter.name.endswith("weight"):
            raise MatrixError(
                f"{name} shares its weight with {_module_name(parameter.tied_to)}, so a change to one changes "
                "both. Tied weights are neither scanned nor reduced: leave it out of --include."
            )
        if reason is None and not wanted:
            reason = "not in --include"
        if reason is None and any(patterns[pattern].search(name) for pattern in exclude):
            reason = "in --exclude"
        if reason is None:
            matrices.extend(_matrices_in(parameter, name))
        elif not parameter.name.endswith("bias"):
            skipped.append(Skipped(name, reason))
    if not matrices:
        raise MatrixError(f"no weight matrix is left of {len(parameters)} parameters. Loosen --include and --exclude.")
    return matrices, skipped


def _reason_to_skip(parameter: _Parameter, *, named: bool) -> str | None:
    """Why this parameter is no matrix to work on; None when it is one."""
    if parameter.tied_to is not None:
        return f"shares its weight with {_module_name(parameter.tied_to)}"
    if parameter.name.endswith("bias"):
        return "a bias"
    if 0 in parameter.shape:
        return "empty"
    if len(parameter.shape) == 1:
        return None if named else "a vector (norm or scale)"
    if len(parameter.shape) == 3:
        return None if "experts" in _segments(parameter.name) else "3-D, and no stack of experts"
    if len(parameter.shape) != 2:
        return f"{len(parameter.shape)}-D"
    if named:
        return None
    if parameter.embedding:
        return "an embedding"
    if block_index(parameter.name) is None:
        return "outside the blocks (a head or a projection of the embeddings)"
    return None


def _matrices_in(parameter: _Parameter, name: str) -> list[Matrix]:
    kind = type_in_block(name)
    block = block_index(name)
    if len(parameter.shape) == 3:
        experts, rows, columns = parameter.shape
        return [
            Matrix(f"{name}[{index}]", parameter.name, kind, block, (rows, columns), expert=index)
            for index in range(experts)
        ]
    rows, columns = parameter.shape if len(parameter.shape) == 2 else (1, parameter.shape[0])
    return [Matrix(name, parameter.name, kind, block, (rows, columns), transposed=parameter.transposed)]


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A regular expression for whole dotted segments: `layers.1` never matches `layers.11`.

    Raises MatrixError when the pattern is empty or has an empty segment.
    """
    segments = pattern.strip().split(".")
    if not all(segments):
        raise MatrixError(f"pattern '{pattern}' has an empty segment. Write it like mlp.down_proj or layers.3.")
    body = r"\.".join(re.escape(segment).replace(r"\*", r"[^.]*") for segment in segments)
    return re.compile(rf"(?:^|\.){body}(?=$|\.|\[)")


def by_name(matrices: Iterable[Matrix]) -> Mapping[str, Matrix]:
    """Matrices by their name. Raises MatrixError when a name occurs twice."""
    named: dict[str, Matrix] = {}
    for matrix in matrices:
        if matrix.name in named:
            raise MatrixError(f"{matrix.name} occurs twice in this model, so its name doesn't tell which is meant.")
        named[matrix.name] = matrix
    return named


def _segments(name: str) -> list[str]:
    return name.split(".")


def _module_name(parameter_name: str) -> str:
    return parameter_name.removesuffix(".weight")


def block_index(name: str) -> int | None:
    """The first number among the segments of a parameter or module name; None outside the blocks."""
    return next((int(segment) for segment in _segments(name) if segment.isdecimal()), None)


def type_in_block(name: str) -> str:
    """A name without what stands before and at the block's number, and without expert numbers."""
    segments = _segments(name)
    start = next((i + 1 for i, segment in enumerate(segments) if segment.isdecimal()), 0)
    return ".".join(segment for segment in segments[start:] if not segment.isdecimal())


def looks_like_embedding(name: str) -> bool:
    """For checkpoints, where module classes aren't known: by the module's own name."""
    module = _segments(_module_name(name))[-1]
    return module in {"wte", "wpe"} or "embed" in module.split("_") or module.startswith("embed")
